"""Recall: facts hidden in a long context, asked for after it was compressed.

The context is read and compressed first; the question goes behind it uncompressed, and the answer is generated from the
method's own cache. A record scores the share of its expected strings that stand in the output, case-folded (RULER's
metric). Beside it, the share of answer tokens that the model puts first given the right ones before: a finer measure,
for models too small to get whole answers right.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from unigist_jax.data import RecallRecord, Tokenizer, recall_record
from unigist_jax.data.recall import JSON_QUESTION, paragraphs
from unigist_jax.evals.scoring import score
from unigist_jax.inference import generate
from unigist_jax.inference.methods import get_method
from unigist_jax.layout import GistLayout
from unigist_jax.model import Llama

TASKS = {  # name: kind of record, and its options
    "needle": ("needle", {}),
    "mk2": ("multi_key", {}),
    "mk3": ("multi_key", {"key_style": "uuid", "value_style": "uuids"}),
    "mv": ("multi_value", {}),
    "json_kv": ("json_kv", {}),
}
EXTRA_TOKENS = 4  # generated beyond the answer's own length
CAPACITY_STEP = 256
TEST_SEED = 1_000_003  # training draws its records from other seeds
JSON_DEPTHS = 6
JSON_TASK = "Extract the value that belongs to the given key in the JSON object below."


def make_records(
    tokenizer: Tokenizer,
    *,
    task: str,
    length: int,
    count: int,
    filler: Sequence[str] = (),
    digits: int = 7,
    values: str = "numbers",
    seed: int = TEST_SEED,
) -> list[RecallRecord]:
    """`count` records of about `length` tokens each: context, question and answer together never more.

    Values are numbers of so many `digits`, or "words", but for the tasks that are of UUIDs.

    Depths are spread evenly from 0 to 1; those of `json_kv`, whose context begins with two solved examples, over six
    places. The same arguments give the same records. Raises ValueError for an unknown task or too short a length.
    """
    if task not in TASKS:
        raise ValueError(f"unknown recall task {task!r}; choose one of {', '.join(TASKS)}")
    kind = TASKS[task][0]
    haystack = paragraphs(filler)

    def count_tokens(text: str) -> int:
        return len(tokenizer.encode(text))

    records = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        depth = (index % JSON_DEPTHS) / (JSON_DEPTHS - 1) if task == "json_kv" else index / max(1, count - 1)
        drawn = dict(num_tokens=length - 1, count_tokens=count_tokens, depth=depth, digits=digits)
        if kind != "json_kv":
            drawn["value_style"] = values
        options = drawn | TASKS[task][1]
        if task == "json_kv":
            records.append(_with_examples(rng, options))
        else:
            records.append(recall_record(kind, rng, filler=haystack, **options))
    return records


def _with_examples(rng: np.random.Generator, options: dict[str, Any]) -> RecallRecord:
    """A JSON record whose context begins with the task and two other pairs of the object, asked and answered."""
    count_tokens, room = options["count_tokens"], 0
    for _ in range(2):  # the second time with room for what the first one's examples took
        record = recall_record("json_kv", rng, **options | {"num_tokens": options["num_tokens"] - room})
        others = [pair for pair in json.loads(record.context).items() if pair[1] not in record.answer]
        if len(others) < 2:
            raise ValueError(f"{options['num_tokens'] + 1} tokens are too few for json_kv's two examples; ask for more")
        chosen = [others[index] for index in rng.choice(len(others), 2, replace=False)]
        examples = "".join(f"{JSON_QUESTION.format(key=key)} {value}" for key, value in chosen)
        front = f"{JSON_TASK}{examples}\n\n"
        room = count_tokens(front) + 4
    return dataclasses.replace(record, context=front + record.context)


def evaluate_recall(
    model: Llama,
    tokenizer: Tokenizer,
    records: Sequence[RecallRecord],
    *,
    method: str,
    layout: GistLayout | None = None,
    chunk_size: int | None = None,
    batch_size: int = 8,
    skip: int = 0,
    done: Callable[[list[dict[str, Any]]], None] | None = None,
) -> list[dict[str, Any]]:
    """Asks for the facts of all records but the first `skip`.

    Args:
      method: any of `unigist_jax.inference.methods.METHODS`.
      layout, chunk_size: as for `unigist_jax.inference.prefill`; the layout's ratio is that of training-free methods.
      done: called with the samples of each batch.

    Returns:
      One dict a record: kind, depth, tokens, distance (tokens from the fact to the answer), answer, output, correct,
      token_accuracy, and cache_bytes (of the sequence, context and room for question and answer).
    """
    chosen = get_method(method, model)
    contexts = [tokenizer.encode(record.context, bos=True).tolist() for record in records]
    questions = [tokenizer.encode(record.question).tolist() for record in records]
    answers = [tokenizer.encode(record.answer).tolist() for record in records]
    lengths = [len(context) + len(question) for context, question in zip(contexts, questions, strict=True)]
    longest = max(lengths) + max(map(len, answers)) + EXTRA_TOKENS
    capacity = -(-longest // CAPACITY_STEP) * CAPACITY_STEP  # one for all: compiled once
    samples: list[dict[str, Any]] = []
    for start in range(skip, len(records), batch_size):
        batch = range(start, min(start + batch_size, len(records)))
        _, cache = chosen.prefill(
            model, [contexts[i] for i in batch], capacity=capacity, chunk_size=chunk_size, layout=layout
        )
        cache_bytes = cache.nbytes // len(batch)
        scored = score(chosen, model, cache, [questions[i] + answers[i] for i in batch])
        generated = generate(
            model,
            [questions[i] for i in batch],
            max_new_tokens=max(map(len, answers)) + EXTRA_TOKENS,
            stop_tokens=tokenizer.stop_ids,
            method=method,
            cache=cache,
        )
        new = []
        for i, tokens, scores in zip(batch, generated.tokens, scored, strict=True):
            output, record = tokenizer.decode(tokens), records[i]
            found = [text.casefold() in output.casefold() for text in record.expected]
            new.append(
                {
                    "kind": record.kind,
                    "depth": record.depth,
                    "tokens": lengths[i],
                    "distance": round((1 - record.depth) * len(contexts[i])) + len(questions[i]),
                    "answer": record.answer.strip(),
                    "output": output,
                    "correct": float(np.mean(found)),
                    "token_accuracy": float(np.mean(scores.is_best[-len(answers[i]) :])),
                    "cache_bytes": cache_bytes,
                }
            )
        samples += new
        if done is not None:
            done(new)
    return samples


def summarize(samples: Sequence[dict[str, Any]], depth_buckets: int = 5) -> dict[str, Any]:
    """Accuracy, token accuracy and mean cache bytes over all samples, and both accuracies by depth."""

    def mean(key, chosen):
        return float(np.mean([sample[key] for sample in chosen])) if chosen else None

    by_depth = []
    for bucket in range(depth_buckets):
        inside = [s for s in samples if min(int(s["depth"] * depth_buckets), depth_buckets - 1) == bucket]
        by_depth.append(
            {
                "depth": (bucket + 0.5) / depth_buckets,
                "samples": len(inside),
                "distance": mean("distance", inside),
                "accuracy": mean("correct", inside),
                "token_accuracy": mean("token_accuracy", inside),
            }
        )
    return {
        "samples": len(samples),
        "accuracy": mean("correct", samples),
        "token_accuracy": mean("token_accuracy", samples),
        "cache_bytes": mean("cache_bytes", samples),
        "by_depth": by_depth,
    }


def markdown(results: Iterable[Mapping[str, Any]]) -> str:
    """A table of summaries that also hold `task`, `length` and `method`."""
    lines = ["| task | tokens | method | recall | answer tokens | records | bytes a cache |", "|---|" + 6 * "---|"]
    for r in results:
        lines.append(
            f"| {r['task']} | {r['length']:,} | {r['method']} | {r['accuracy']:.3f} | {r['token_accuracy']:.3f} "
            f"| {r['samples']} | {r['cache_bytes']:,.0f} |"
        )
    return "\n".join(lines) + "\n"
