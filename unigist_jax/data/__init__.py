"""Data: documents, a lossless tokenizer, synthetic recall, packing into rows, and batches addressed by step."""

from unigist_jax.data.corpus import load_documents
from unigist_jax.data.pack import PackedRows, pack_documents, packing_report
from unigist_jax.data.pipeline import (
    TrainData,
    eval_batches,
    load_or_train_tokenizer,
    prepare_rows,
)
from unigist_jax.data.recall import RECALL_KINDS, RecallRecord, recall_record
from unigist_jax.data.recall_rows import prepare_recall_rows
from unigist_jax.data.tokenize import StreamDecoder, Tokenizer

__all__ = [
    "RECALL_KINDS",
    "PackedRows",
    "RecallRecord",
    "StreamDecoder",
    "Tokenizer",
    "TrainData",
    "eval_batches",
    "load_documents",
    "load_or_train_tokenizer",
    "pack_documents",
    "packing_report",
    "prepare_recall_rows",
    "prepare_rows",
    "recall_record",
]
