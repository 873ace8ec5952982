"""The tokenizer and the rows that a run's config asks for."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from unigist_jax.config import DataConfig
from unigist_jax.data.corpus import load_documents
from unigist_jax.data.pack import PackedRows
from unigist_jax.data.pipeline import load_or_train_tokenizer, prepare_recall_rows, prepare_rows
from unigist_jax.data.tokenize import Tokenizer
from unigist_jax.layout import GistLayout

FILLER_DOCUMENTS = 200


def run_tokenizer(workdir: Path, data: DataConfig) -> Tokenizer:
    """The run's tokenizer, kept in its work directory: a copy of `data.tokenizer`, or one trained on the corpus."""
    if not data.tokenizer:
        return load_or_train_tokenizer(
            workdir,
            data.source,
            data.vocab_size,
            heldout_fraction=data.heldout_fraction,
            max_documents=data.max_documents,
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
    )


def recall_filler(data: DataConfig, split: str) -> list[str]:
    """Texts in which that split's needles hide."""
    documents = load_documents(
        data.source, split=split, heldout_fraction=data.heldout_fraction, max_documents=data.max_documents
    )
    return documents["text"][:FILLER_DOCUMENTS]


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
        filler=recall_filler(data, split),
        answer_loss_only=data.recall_answer_only,
        digits=data.recall_digits,
        questions=data.recall_questions,
    )


def spread_rows(rows: PackedRows, count: int) -> PackedRows:
    """At most `count` rows, spread evenly over all."""
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))
    return PackedRows(rows.tokens[chosen], rows.doc_start[chosen], rows.loss_mask[chosen])
