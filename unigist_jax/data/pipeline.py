"""From a corpus to batches: rows of packed documents, and an order of them that needs no iterator state.

The global batch of a step depends on the seed and the step alone. Training therefore resumes at any step without saved
state, and any number of processes reads the same batches, each process its own share.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from unigist_jax.data.corpus import load_documents
from unigist_jax.data.pack import PackedRows, pack_documents
from unigist_jax.data.tokenize import SENTENCEPIECE_FILE, Tokenizer
from unigist_jax.layout import GistLayout

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]


@runtime_checkable
class Rows(Protocol):
    """Packed rows addressed by number: `PackedRows` in memory, `PreparedRows` on disk."""

    row_length: int

    @property
    def is_packed(self) -> bool: ...

    def __len__(self) -> int: ...

    def take(self, rows: np.ndarray) -> PackedRows: ...


class TrainData:
    """Endless training batches, addressed by step. Every row of a source comes once an epoch, each time in another
    order."""

    def __init__(self, sources: Sequence[Rows], weights: Sequence[float], batch_size: int, seed: int):
        """Mixes the rows of several sources.

        Args:
          sources: rows of one length.
          weights: the sources' shares of the batches, in any unit; 0 leaves a source out.
          batch_size: rows of a global batch.
          seed: fixes the order; 0 to 2**32 - 2.

        Raises:
          ValueError: if an argument is out of range, a source to be used is empty, or rows differ in length.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if not 0 <= seed < 2**32 - 1:
            raise ValueError(f"seed={seed} must lie between 0 and 2**32 - 2")
        if len(weights) != len(sources) or min(weights, default=0) < 0 or sum(weights) <= 0:
            raise ValueError(f"weights {tuple(weights)} must be one for each of {len(sources)} sources, not all 0")
        lengths = sorted({rows.row_length for rows in sources})
        if len(lengths) > 1:
            raise ValueError(f"rows of {lengths} tokens do not mix; prepare all with the same row_length")
        if any(weight and not len(rows) for rows, weight in zip(sources, weights, strict=True)):
            raise ValueError("a source of a mixture has no rows; leave it out, or give it the weight 0")
        self.batch_size = batch_size
        self.is_packed = any(rows.is_packed for rows, weight in zip(sources, weights, strict=True) if weight)
        self._sources = list(sources)
        self._ends = np.cumsum([len(rows) for rows in sources])
        self._order = _row_order([len(rows) for rows in sources], weights, seed).batch(batch_size)

    def batch(self, step: int) -> Batch:
        """The global batch of `step` (from 0): tokens int32 [B, T], doc_start int32 [B, U], loss_mask bool [B, T]."""
        return self.local_batch(step, 0, 1)

    def local_batch(self, step: int, process_index: int, process_count: int) -> Batch:
        """The rows of that batch which belong to one process: `B / process_count` consecutive ones.

        Raises:
          ValueError: if the step is negative, there is no such process, or the batch does not divide among them.
        """
        if step < 0:
            raise ValueError(f"step={step} must not be negative")
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index={process_index} is not one of {process_count} processes")
        if self.batch_size % process_count:
            raise ValueError(f"batch_size={self.batch_size} does not divide among {process_count} processes")
        share = self.batch_size // process_count
        chosen = self._order[step][process_index * share : (process_index + 1) * share]
        return self._gather(chosen)

    def _gather(self, chosen: np.ndarray) -> Batch:
        """Rows by number, counted through all sources."""
        source = np.searchsorted(self._ends, chosen, side="right")
        parts, places = [], []
        for index in np.unique(source):
            place = np.flatnonzero(source == index)
            before = self._ends[index - 1] if index else 0
            parts.append(self._sources[index].take(chosen[place] - before))
            places.append(place)
        order = np.argsort(np.concatenate(places))
        names = ("tokens", "doc_start", "loss_mask")
        return {name: np.concatenate([getattr(part, name) for part in parts])[order] for name in names}


def _row_order(counts: Sequence[int], weights: Sequence[float], seed: int) -> grain.MapDataset:
    """The endless, shuffled order of row numbers, as a `grain.MapDataset` of ints."""
    import grain

    orders, shares, first = [], [], 0
    for index, (count, weight) in enumerate(zip(counts, weights, strict=True)):
        if weight:
            numbers = grain.MapDataset.source(range(first, first + count))
            orders.append(numbers.shuffle(seed=(seed + index) % (2**32 - 1)).repeat())
            shares.append(float(weight))
        first += count
    return orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, weights=shares)


def eval_batches(rows: Rows, batch_size: int) -> Iterator[Batch]:
    """All rows once, in order; the last batch is filled up with rows whose loss mask is False throughout."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    for begin in range(0, len(rows), batch_size):
        chosen = np.arange(begin, begin + batch_size)
        exists = chosen < len(rows)
        found = rows.take(np.where(exists, chosen, 0))
        mask = found.loss_mask & exists[:, None]
        yield {"tokens": found.tokens, "doc_start": found.doc_start, "loss_mask": mask}


# --- rows ----------------------------------------------------------------------------------------------------------


def load_or_train_tokenizer(
    workdir: str | os.PathLike[str],
    source: str,
    vocab_size: int,
    *,
    heldout_fraction: float = 0.05,
    max_documents: int = 0,
    further_texts: Iterable[str] = (),
) -> Tokenizer:
    """The tokenizer of a work directory; the first call trains it on the training split of `source` and keeps it there.

    It is trained on `further_texts` too.

    Raises:
      ValueError: if the kept tokenizer has another `vocab_size` or is damaged; and whatever `load_documents` and
        `Tokenizer.train` raise.
    """
    path = Path(workdir) / SENTENCEPIECE_FILE
    if not path.exists():
        documents = load_documents(
            source, split="train", heldout_fraction=heldout_fraction, max_documents=max_documents
        )
        return Tokenizer.train([*documents["text"], *further_texts], vocab_size, path)
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(
            f"the tokenizer at {path} has vocab_size={tokenizer.vocab_size}, not {vocab_size}; "
            "use that size, delete the file, or choose another work directory"
        )
    return tokenizer


def prepare_rows(
    *,
    source: str,
    split: str,
    tokenizer: Tokenizer,
    layout: GistLayout,
    row_length: int,
    heldout_fraction: float,
    max_documents: int = 0,
    joined: bool = False,
) -> PackedRows:
    """The documents of one split as rows, each document between `bos_id` and `eos_id`.

    Args:
      joined: the documents one behind the other are one text, cut into rows that hold one document each.
      source, split, heldout_fraction, max_documents: as for `load_documents`.
      tokenizer, layout, row_length: as for `pack_documents`.

    Raises:
      Whatever `load_documents` and `pack_documents` raise.
    """
    layout.num_units(row_length)
    documents = load_documents(source, split=split, heldout_fraction=heldout_fraction, max_documents=max_documents)
    encoded: Iterable = (tokenizer.encode(text, bos=True, eos=True) for text in documents["text"])
    if joined:
        encoded = [np.concatenate(list(encoded))]
    return pack_documents(encoded, row_length=row_length, layout=layout, pad_id=tokenizer.pad_id)
