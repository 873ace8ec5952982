"""The tokenizer and the rows that a run's config asks for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from unigist_jax.config import DataConfig
from unigist_jax.data.corpus import load_documents
from unigist_jax.data.pack import PackedRows
from unigist_jax.data.pipeline import Rows, TrainData, load_or_train_tokenizer, prepare_rows
from unigist_jax.data.prepared import PreparedRows, is_prepared, read_manifest
from unigist_jax.data.recall import recall_sentences
from unigist_jax.data.recall_rows import prepare_recall_rows
from unigist_jax.data.tokenize import Tokenizer
from unigist_jax.layout import GistLayout

FILLER_DOCUMENTS = 200
VOCABULARY_SENTENCES = 8000  # recall sentences that a tokenizer is trained on, with `data.recall_vocabulary`


def prepared_directories(data: DataConfig) -> list[str]:
    """The directories of `launch.prepare_data` that a run's source names; none: it names documents.

    Raises:
      ValueError: if it names both, or weights that are not one for each directory.
    """
    entries = [entry.strip() for entry in data.source.split(",") if entry.strip()]
    prepared = [entry for entry in entries if is_prepared(entry)]
    if prepared and len(prepared) < len(entries):
        others = sorted(set(entries) - set(prepared))
        raise ValueError(f"data.source mixes prepared rows with {others}; prepare those too, with launch.prepare_data")
    if data.weights and not prepared:
        raise ValueError(f"data.weights={data.weights!r} are for prepared directories; {data.source!r} names none")
    return prepared


def source_weights(data: DataConfig, counts: list[int]) -> list[float]:
    """The shares of prepared directories: `data.weights`, or else by their numbers of rows. Raises ValueError."""
    if not data.weights:
        return [float(count) for count in counts]
    try:
        weights = [float(text) for text in data.weights.split(",")]
    except ValueError:
        weights = []
    if len(weights) != len(counts) or min(weights) < 0 or not sum(weights):
        raise ValueError(
            f"data.weights={data.weights!r} must be {len(counts)} numbers, one for each directory, not all 0"
        )
    return weights


def train_data(data: DataConfig, layout: GistLayout, tokenizer: Tokenizer, batch_size: int, seed: int) -> TrainData:
    """The batches that a run's config asks for: documents packed here or prepared rows, and recall records."""
    directories = prepared_directories(data)
    if directories:
        sources: list = [_prepared(directory, "train", data, layout, tokenizer) for directory in directories]
        weights = source_weights(data, [len(rows) for rows in sources])
    else:
        sources, weights = [text_rows(data, layout, tokenizer, "train")], [1.0]
    if data.recall_weight:
        share = (1 - data.recall_weight) / sum(weights)
        weights = [weight * share for weight in weights] + [data.recall_weight]
        sources.append(recall_rows(data, layout, tokenizer, seed))
    return TrainData(sources, weights, batch_size, seed)


def heldout_rows(data: DataConfig, layout: GistLayout, tokenizer: Tokenizer, count: int) -> PackedRows:
    """At most `count` held-out rows, spread evenly over all. Raises ValueError if there are none."""
    directories = prepared_directories(data)
    if not directories:
        return spread_rows(text_rows(data, layout, tokenizer, "heldout"), count)
    sources = [_prepared(directory, "heldout", data, layout, tokenizer) for directory in directories]
    if not any(map(len, sources)):
        raise ValueError(f"{data.source} holds no held-out rows; prepare it with a larger --heldout_fraction")
    share = -(-count // sum(len(rows) > 0 for rows in sources))
    parts = [spread_rows(rows, share) for rows in sources if len(rows)]
    arrays = (np.concatenate([getattr(part, name) for part in parts]) for name in ("tokens", "doc_start", "loss_mask"))
    return PackedRows(*arrays)


def texts(data: DataConfig, tokenizer: Tokenizer, split: str, count: int | None = None) -> list[str]:
    """Documents of a split as text, the first `count` or all; of prepared rows, what their first rows decode to."""
    directories = prepared_directories(data)
    if not directories:
        documents = load_documents(
            data.source, split=split, heldout_fraction=data.heldout_fraction, max_documents=data.max_documents
        )
        return list(documents["text"][:count])
    found: list[str] = []
    for directory in directories:
        manifest = read_manifest(directory)
        layout = GistLayout(manifest["ratio"], 0, 0)
        rows = PreparedRows(directory, split, layout, manifest["row_length"], tokenizer.fingerprint)
        for row in range(min(len(rows), count or len(rows))):
            one = rows.take(np.array([row]))
            units = one.tokens.reshape(-1, layout.ratio)
            pieces = [units[one.doc_start[0] == start].ravel() for start in np.unique(one.doc_start)]
            found += [tokenizer.decode(piece[piece != manifest["pad_id"]]) for piece in pieces]
    return [text for text in found if text][:count]


def _prepared(directory: str, split: str, data: DataConfig, layout: GistLayout, tokenizer: Tokenizer) -> PreparedRows:
    return PreparedRows(directory, split, layout, data.row_length, tokenizer.fingerprint)


def run_tokenizer(workdir: Path, data: DataConfig) -> Tokenizer:
    """The run's tokenizer, kept in its work directory: that of `data.tokenizer`, of prepared rows, or a new one."""
    directories = prepared_directories(data)
    if directories and not data.tokenizer:
        data = dataclasses.replace(data, tokenizer=directories[0])
    if not data.tokenizer:
        sentences = VOCABULARY_SENTENCES if data.recall_vocabulary else 0
        return load_or_train_tokenizer(
            workdir,
            data.source,
            data.vocab_size,
            heldout_fraction=data.heldout_fraction,
            max_documents=data.max_documents,
            further_texts=recall_sentences(0, sentences, data.recall_digits),
        )
    tokenizer = Tokenizer.load(data.tokenizer)
    try:
        kept = Tokenizer.load(workdir)
    except FileNotFoundError:
        tokenizer.save(workdir)
        return tokenizer
    if kept.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{workdir} holds another tokenizer than data.tokenizer={data.tokenizer}; use another work directory"
        )
    return tokenizer


def text_rows(data: DataConfig, layout: GistLayout, tokenizer: Tokenizer, split: str) -> PackedRows:
    """Packed rows of the corpus: split "train" or "heldout"."""
    return prepare_rows(
        source=data.source,
        split=split,
        tokenizer=tokenizer,
        layout=layout,
        row_length=data.row_length,
        heldout_fraction=data.heldout_fraction,
        max_documents=data.max_documents,
        joined=data.join_documents,
    )


def recall_filler(data: DataConfig, split: str, tokenizer: Tokenizer) -> list[str]:
    """Texts in which that split's needles hide."""
    return texts(data, tokenizer, split, FILLER_DOCUMENTS)


def recall_rows(
    data: DataConfig, layout: GistLayout, tokenizer: Tokenizer, seed: int, split: str = "train"
) -> PackedRows:
    """Packed rows of recall records, hidden in texts of a split."""
    return prepare_recall_rows(
        tokenizer=tokenizer,
        layout=layout,
        row_length=data.row_length,
        num_records=data.recall_records,
        seed=seed,
        kinds=data.recall_kinds.split(","),
        filler=recall_filler(data, split, tokenizer),
        answer_loss_only=data.recall_answer_only,
        digits=data.recall_digits,
        value_style=data.recall_values,
        questions=data.recall_questions,
        interleaved=data.recall_interleaved,
    )


def spread_rows(rows: Rows, count: int) -> PackedRows:
    """At most `count` rows, spread evenly over all."""
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))
    return rows.take(chosen)
