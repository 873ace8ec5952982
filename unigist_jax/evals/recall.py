"""Recall: facts hidden in a long context, asked for after it was compressed.

The context and the question are prefilled, the answer is generated from the method's own cache. A record counts if the
expected string stands in the output, case-folded (RULER's metric). Beside it, the share of answer tokens that the model
puts first given the right ones before: a finer measure, for models too small to get whole answers right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unigist_jax.data import RecallRecord, Tokenizer, recall_record
from unigist_jax.data.recall import paragraphs
from unigist_jax.inference import generate
from unigist_jax.layout import GistLayout
from unigist_jax.model import Llama

EXTRA_TOKENS = 4  # generated beyond the answer's own length
CAPACITY_STEP = 256
TEST_SEED = 1_000_003  # training draws its records from other seeds


def make_records(
    tokenizer: Tokenizer,
    *,
    kind: str,
    length: int,
    count: int,
    filler: Sequence[str] = (),
    digits: int = 7,
    seed: int = TEST_SEED,
) -> list[RecallRecord]:
    """`count` records of about `length` tokens each, their facts at depths spread evenly from 0 to 1."""
    haystack = paragraphs(filler)
    return [
        recall_record(
            kind,
            np.random.default_rng([seed, index]),
            num_tokens=length - 1,
            count_tokens=lambda text: len(tokenizer.encode(text)),
            filler=haystack,
            depth=index / max(1, count - 1),
            digits=digits,
        )
        for index in range(count)
    ]


def evaluate_recall(
    model: Llama,
    tokenizer: Tokenizer,
    records: Sequence[RecallRecord],
    *,
    method: str,
    layout: GistLayout | None = None,
    chunk_size: int | None = None,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """One dict a record: kind, depth, tokens, answer, output, correct, token_accuracy."""
    layout = model.checked_layout(layout)
    all_prompts = [
        [*tokenizer.encode(record.context, bos=True).tolist(), *tokenizer.encode(record.question).tolist()]
        for record in records
    ]
    all_answers = [tokenizer.encode(record.answer).tolist() for record in records]
    longest = max(map(len, all_prompts)) + max(map(len, all_answers)) + EXTRA_TOKENS
    capacity = -(-longest // CAPACITY_STEP) * CAPACITY_STEP  # one for all: compiled once
    samples = []
    for start in range(0, len(records), batch_size):
        part, prompts, answers = (x[start : start + batch_size] for x in (records, all_prompts, all_answers))
        generated = generate(
            model,
            prompts,
            max_new_tokens=max(map(len, answers)) + EXTRA_TOKENS,
            stop_tokens=[tokenizer.eos_id],
            method=method,
            layout=layout,
            chunk_size=chunk_size,
            capacity=capacity,
        )
        hits = _answer_hits(model, prompts, answers, "full" if method == "full" else "gist", layout)
        for record, prompt, tokens, accuracy in zip(part, prompts, generated.tokens, hits, strict=True):
            output = tokenizer.decode(tokens)
            samples.append(
                {
                    "kind": record.kind,
                    "depth": record.depth,
                    "tokens": len(prompt),
                    "answer": record.answer.strip(),
                    "output": output,
                    "correct": record.answer.strip().casefold() in output.casefold(),
                    "token_accuracy": accuracy,
                }
            )
        if progress is not None:
            progress(len(samples))
    return samples


def summarize(samples: Sequence[dict[str, Any]], depth_buckets: int = 5) -> dict[str, Any]:
    """Accuracy and token accuracy over all samples and by depth."""

    def mean(key, chosen):
        return float(np.mean([sample[key] for sample in chosen])) if chosen else None

    by_depth = []
    for bucket in range(depth_buckets):
        inside = [s for s in samples if min(int(s["depth"] * depth_buckets), depth_buckets - 1) == bucket]
        by_depth.append(
            {
                "depth": (bucket + 0.5) / depth_buckets,
                "samples": len(inside),
                "accuracy": mean("correct", inside),
                "token_accuracy": mean("token_accuracy", inside),
            }
        )
    return {
        "samples": len(samples),
        "accuracy": mean("correct", samples),
        "token_accuracy": mean("token_accuracy", samples),
        "by_depth": by_depth,
    }


def _answer_hits(model, prompts, answers, attention, layout) -> list[float]:
    """Share of each answer's tokens that have the highest logit given everything right before them, in one pass."""
    longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    tokens = np.zeros((len(prompts), -(-longest // layout.ratio) * layout.ratio), np.int32)
    for row, prompt, answer in zip(tokens, prompts, answers, strict=True):
        row[: len(prompt) + len(answer)] = prompt + answer
    widest = max(map(len, answers))
    first = np.array([len(prompt) - 1 for prompt in prompts], np.int32)
    best = np.asarray(_best_tokens(model, jnp.asarray(tokens), first, widest, attention=attention, layout=layout))
    return [float(np.mean(row[: len(answer)] == answer)) for row, answer in zip(best, answers, strict=True)]


@partial(jax.jit, static_argnames=("count", "attention", "layout"))
def _best_tokens(model, tokens, first, count, *, attention, layout):
    """The most likely next token at `count` positions from `first` [B] on, [B, count]."""
    hidden = model.hidden_states(tokens, attention=attention, layout=layout)
    index = jnp.minimum(first[:, None] + jnp.arange(count), tokens.shape[1] - 1)
    return jnp.argmax(model.logits(jnp.take_along_axis(hidden, index[..., None], axis=1)), axis=-1)
