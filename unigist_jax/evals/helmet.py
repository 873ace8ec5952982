"""HELMET (princeton-nlp/HELMET) from the user's own copy of its data: reader, prompts and metrics of six categories.

The context is read and compressed before the question is seen. Prompts are this project's own wording, so scores are to
be compared within it. For tuned models they can be a user's message by the tokenizer's chat template, which the context
begins and the question ends. A record is one JSON line; what each category reads:

  rag        question, answers, ctxs [{title, text}]                 data/kilt/*.jsonl           SubEM
  rerank     query, ctxs [{id, label, text}]                         data/msmarco/*.jsonl        NDCG@5
  recall     context, question, answer (text or list)                data/json_kv, data/ruler    share of the answers
  longqa     context, question, answer (text or list)                                            ROUGE-L recall
  choice     context, question (with options A-D), answer (letter)                               accuracy
  icl        context (solved examples), question, answer (label)                                 accuracy
  summary    context, answer (text or list)                                                      ROUGE-Lsum F1

The last five may have demos [{question, answer}], solved examples in front of the context. HELMET reads its long-QA,
ICL and summary sets from other places at run time; export them to lines of this form.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unigist_jax.data import Tokenizer
from unigist_jax.evals import metrics
from unigist_jax.evals.recall import CAPACITY_STEP
from unigist_jax.inference import generate
from unigist_jax.inference.methods import get_method
from unigist_jax.layout import GistLayout
from unigist_jax.model import Llama


class Category(NamedTuple):
    """What precedes the context, what asks behind it, tokens to generate, the metric `(output, record)`, and the
    module that it needs, if any."""

    instruction: str
    question: str
    max_new_tokens: int
    metric: str
    score: Callable[[str, HelmetRecord], float]
    module: str | None = None


@dataclasses.dataclass(frozen=True)
class HelmetRecord:
    """One question on one context.

    Attributes:
      context, question: the text that is compressed, and what follows it.
      answers: right ones.
      labels: graded relevance by id, for ranking.
    """

    context: str
    question: str
    answers: tuple[str, ...]
    labels: Mapping[str, float] | None = None


CATEGORIES = {
    "rag": Category(
        "Answer the question at the end from the documents, in a few words.",
        "\n\nQuestion: {question}\nAnswer:",
        20,
        "SubEM",
        lambda output, record: metrics.substring_match(output, record.answers),
    ),
    "rerank": Category(
        "Each document below has an id. Rank the ids by relevance to the query at the end, as in 3 > 1 > 2.",
        "\n\nQuery: {question}\nRanking:",
        200,
        "NDCG@5",
        lambda output, record: metrics.ranking_ndcg(output, record.labels or {}, 5),
        "sklearn",
    ),
    "recall": Category(
        "Remember what the text says; a question about it follows.",
        "\n\n{question}",
        100,
        "share of answers",
        lambda output, record: metrics.expected_share(output, record.answers),
    ),
    "longqa": Category(
        "Read the story; a question about it follows. Answer briefly.",
        "\n\nQuestion: {question}\nAnswer:",
        10,
        "ROUGE-L recall",
        lambda output, record: metrics.rouge(output, record.answers, "rougeL", "recall"),
        "rouge_score",
    ),
    "choice": Category(
        "Read the story; a question about it follows. Answer with the letter of the right option.",
        "\n\nQuestion: {question}\nAnswer:",
        10,
        "accuracy",
        lambda output, record: metrics.choice(output, record.answers),
    ),
    "icl": Category(
        "Give the text at the end its label, as in the examples.",
        "\n\n{question}\nlabel:",
        20,
        "accuracy",
        lambda output, record: metrics.exact_label(output, record.answers),
    ),
    "summary": Category(
        "Summarise the text.",
        "\n\nSummary:",
        400,
        "ROUGE-Lsum F1",
        lambda output, record: metrics.rouge(output, record.answers, "rougeLsum", "fmeasure"),
        "rouge_score",
    ),
}

COLUMNS = {  # the paper's six, in its order
    "RAG": ("rag",),
    "rerank": ("rerank",),
    "long QA": ("longqa", "choice"),
    "ICL": ("icl",),
    "synthetic recall": ("recall",),
    "summary": ("summary",),
}


def source(entry: str) -> tuple[str, Path]:
    """The category and the file of `CATEGORY=FILE`, once its first record has been read and its metric is there.

    Raises:
      ValueError: for an unknown category, no file, a metric whose package is not installed, and as `read_helmet`.
      FileNotFoundError: if there is no such file.
    """
    category, _, file = entry.partition("=")
    if category not in CATEGORIES or not file:
        raise ValueError(f"--helmet={entry}: write it as CATEGORY=FILE, CATEGORY one of {', '.join(CATEGORIES)}")
    module = CATEGORIES[category].module
    if module and not importlib.util.find_spec(module):
        raise ValueError(f"--helmet={entry}: its metric needs {module}; pip install -r requirements-eval.txt")
    read_helmet(Path(file), category, 1)
    return category, Path(file)


def read_helmet(path: Path, category: str, most: int = 0) -> list[HelmetRecord]:
    """The first `most` records of a file of JSON lines (0: all).

    Raises:
      ValueError: for an unknown category, a line that is not JSON, or one that lacks a field; naming the line.
      FileNotFoundError: if there is no such file.
    """
    if category not in CATEGORIES:
        raise ValueError(f"unknown HELMET category {category!r}; choose one of {', '.join(CATEGORIES)}")
    records = []
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if most and len(records) == most:
                break
            if not line.strip():
                continue
            try:
                records.append(_record(json.loads(line), category))
            except (ValueError, KeyError, TypeError) as error:
                reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
                raise ValueError(
                    f"{path}, line {number}: {reason}; a {category} record is described in helmet.py"
                ) from error
    if not records:
        raise ValueError(f"{path} holds no record")
    return records


def _record(entry: Mapping[str, Any], category: str) -> HelmetRecord:
    kind, labels = CATEGORIES[category], None
    if category == "rag":
        documents = [f"Document (Title: {ctx['title']}): {ctx['text']}" for ctx in entry["ctxs"]]
        context, question, answers = "\n\n".join(documents), entry["question"], entry["answers"]
    elif category == "rerank":
        documents = [f"[id: {ctx['id']}] {ctx['text']}" for ctx in entry["ctxs"]]
        context, question, answers = "\n\n".join(documents), entry["query"], []
        labels = {str(ctx["id"]): float(ctx["label"]) for ctx in entry["ctxs"]}
    else:
        context, question, answers = entry["context"], entry.get("question", ""), entry["answer"]
        if "demos" in entry:
            shown = [f"{demo['question']}\n{demo['answer']}" for demo in entry["demos"]]
            context = "\n\n".join([*shown, context])
    answers = [answers] if isinstance(answers, (str, int, float)) else answers
    return HelmetRecord(
        f"{kind.instruction}\n\n{context}", kind.question.format(question=question), tuple(map(str, answers)), labels
    )


def short_name(path: Path) -> str:
    """The file's name after its directory's: RULER's tasks are directories of files called alike."""
    return "-".join(filter(None, (path.parent.name, path.stem)))


def evaluate_helmet(
    model: Llama,
    tokenizer: Tokenizer,
    records: Sequence[HelmetRecord],
    category: str,
    *,
    method: str,
    layout: GistLayout | None = None,
    chunk_size: int | None = None,
    batch_size: int = 8,
    chat: bool = False,
    skip: int = 0,
    done: Callable[[list[dict[str, Any]]], None] | None = None,
) -> None:
    """Asks all records but the first `skip`, greedily; arguments as for `evals.recall.evaluate_recall`.

    `chat` makes each record a user's message; ValueError if the tokenizer has no chat template. `done` is called with
    the samples of each batch: output, answers, score, tokens, cache_bytes.
    """
    chosen, kind = get_method(method, model), CATEGORIES[category]
    for start in range(skip, len(records), batch_size):
        batch = records[start : start + batch_size]
        contexts, questions = zip(*(encoded(record, tokenizer, chat) for record in batch), strict=True)
        needed = max(map(len, contexts)) + max(map(len, questions)) + kind.max_new_tokens
        capacity = -(-needed // CAPACITY_STEP) * CAPACITY_STEP
        _, cache = chosen.prefill(model, contexts, capacity=capacity, chunk_size=chunk_size, layout=layout)
        cache_bytes = cache.nbytes // len(batch)
        generated = generate(
            model,
            questions,
            max_new_tokens=kind.max_new_tokens,
            stop_tokens=tokenizer.stop_ids,
            method=method,
            cache=cache,
        )
        samples = []
        for record, context, tokens in zip(batch, contexts, generated.tokens, strict=True):
            output = tokenizer.decode(tokens)
            sample = {"output": output, "answers": record.answers, "score": float(kind.score(output, record))}
            samples.append(sample | {"tokens": len(context), "cache_bytes": cache_bytes})
        if done is not None:
            done(samples)


def encoded(record: HelmetRecord, tokenizer: Tokenizer, chat: bool) -> tuple[list[int], list[int]]:
    """The ids of the context, which is compressed, and of the question behind it; see `evaluate_helmet`."""
    if chat:
        parts = tokenizer.encode_cut_chat([{"role": "user", "content": record.context}], record.question)
    else:
        parts = tokenizer.encode(record.context, bos=True), tokenizer.encode(record.question)
    return parts[0].tolist(), parts[1].tolist()


def mean_score(samples: Sequence[Mapping[str, Any]]) -> float:
    """The category's figure, in percent."""
    return 100 * sum(sample["score"] for sample in samples) / len(samples)


def table(results: Collection[Mapping[str, Any]]) -> str:
    """The paper's table, in percent: a row a method, a column a category that was asked, and their average.

    Args:
      results: of one file and method each, with `category`, `method` and `score`; a column is the mean over its files.
    """
    asked = {result["category"] for result in results}
    columns = {name: categories for name, categories in COLUMNS.items() if asked & {*categories}}
    lines = [["method", *columns, "average"], ["---"] * (len(columns) + 2)]
    for method in dict.fromkeys(result["method"] for result in results):
        of_method = [result for result in results if result["method"] == method]
        means = [
            statistics.fmean(result["score"] for result in of_method if result["category"] in categories)
            for categories in columns.values()
        ]
        lines.append([method, *(f"{mean:.1f}" for mean in (*means, statistics.fmean(means)))])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
