"""Documents of any length into rows of one length, for one-pass training with packed documents.

Every document is padded alone to whole gist units, so that no unit holds tokens of two documents. What remains at the
end of a row is padding too, of the row's last document: no real token sees it, since it comes after all of them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Bool, Int32

from unigist_jax.layout import GistLayout

OPEN_ROWS = 8  # rows that a document may still go to; more waste less and mix the order of documents further


@dataclasses.dataclass(frozen=True, eq=False)
class PackedRows:
    """N rows of T raw tokens, U = T / ratio gist units each.

    Attributes:
      tokens: int32 [N, T]. The target of raw i is `tokens[:, i + 1]`.
      doc_start: int32 [N, U], first unit of the document that holds each unit.
      loss_mask: bool [N, T], True where raw i has a target: raw i + 1 exists, is not padding, belongs to the same
        document, and is to be learned.
      documents: int32 [N, U], the number of the document that each unit is of, as they were given, padding with the
        row's last; None for rows that were not made here.
      filled: int32 [N], how many raws of each row are no padding; None likewise. Their ids do not tell: tokenizers that
        have no mark for padding, such as Llama 3's, pad with one that ends documents too.
    """

    tokens: Int32[np.ndarray, "N T"]
    doc_start: Int32[np.ndarray, "N U"]
    loss_mask: Bool[np.ndarray, "N T"]
    documents: Int32[np.ndarray, "N U"] | None = None
    filled: Int32[np.ndarray, " N"] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def row_length(self) -> int:
        """`T`, raws of a row."""
        return self.tokens.shape[1]

    @property
    def is_packed(self) -> bool:
        """Whether any row holds more than one document."""
        return bool(self.doc_start.any())

    def take(self, rows: np.ndarray) -> PackedRows:
        """The rows of these numbers, in this order."""
        return PackedRows(self.tokens[rows], self.doc_start[rows], self.loss_mask[rows])


def pack_documents(
    documents: Iterable[np.ndarray],
    *,
    row_length: int,
    layout: GistLayout,
    pad_id: int,
    loss_masks: Iterable[np.ndarray] | None = None,
) -> PackedRows:
    """Packs documents into rows, each into the first of a few open rows with room for it.

    Args:
      documents: integer arrays [n], read once. A document longer than a row is cut into pieces, each a document of its
        own. Empty ones are skipped.
      row_length: `T`, a multiple of `layout.ratio`.
      layout: gives the ratio.
      pad_id: the id to fill with; documents may hold it too.
      loss_masks: for each document bool [n], True for the tokens to be learned. None: all of them.

    Returns:
      The rows, in the order in which they were begun. The same documents give the same rows.

    Raises:
      ValueError: if `row_length` is not a positive multiple of the ratio, a document is not 1-D, a mask does not have
        its document's length, masks and documents differ in number, or no document has a token.
      TypeError: if a document does not hold integers.
    """
    if row_length < 1:
        raise ValueError(f"row_length={row_length} must be at least one unit of ratio={layout.ratio} tokens")
    num_units = layout.num_units(row_length)
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    used: list[int] = []  # units of each row that are taken
    filled: list[int] = []  # raws of each row that are no padding
    open_rows: list[int] = []
    for index, tokens, learned in _pieces(documents, loss_masks, row_length):
        needed = -(-len(tokens) // layout.ratio)
        row = next((row for row in open_rows if used[row] + needed <= num_units), None)
        if row is None:
            row = len(rows)
            tokens_of_row, mask_of_row = np.full(row_length, pad_id, np.int32), np.zeros(row_length, bool)
            starts, numbers = np.zeros(num_units, np.int32), np.zeros(num_units, np.int32)
            rows.append((tokens_of_row, starts, mask_of_row, numbers))
            used.append(0)
            filled.append(0)
            open_rows.append(row)
            if len(open_rows) > OPEN_ROWS:
                open_rows.remove(max(open_rows, key=used.__getitem__))
        row_tokens, doc_start, loss_mask, documents_of_row = rows[row]
        begin = used[row] * layout.ratio
        row_tokens[begin : begin + len(tokens)] = tokens
        loss_mask[begin : begin + len(tokens) - 1] = learned[1:]
        doc_start[used[row] :] = used[row]
        documents_of_row[used[row] :] = index
        used[row] += needed
        filled[row] += len(tokens)
    if not rows:
        raise ValueError("there is no document with tokens to pack; check the corpus and its split")
    return PackedRows(*(np.stack(parts) for parts in zip(*rows, strict=True)), np.asarray(filled, np.int32))


def packing_report(rows: PackedRows) -> dict[str, int | float]:
    """How full rows of `pack_documents` are: `rows`, `documents` (pieces), `tokens`, `targets`, `padding_share`."""
    tokens = int(rows.filled.sum())
    return {
        "rows": len(rows),
        "documents": int((rows.doc_start == np.arange(rows.doc_start.shape[1])).sum()),
        "tokens": tokens,
        "targets": int(rows.loss_mask.sum()),
        "padding_share": 1 - tokens / rows.tokens.size,
    }


def _pieces(
    documents: Iterable[np.ndarray], loss_masks: Iterable[np.ndarray] | None, row_length: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Checked pieces of at most `row_length` tokens, each with its document's number and its mask."""
    pairs = zip(documents, itertools.repeat(None)) if loss_masks is None else zip(documents, loss_masks, strict=True)
    for index, (document, mask) in enumerate(pairs):
        tokens = np.asarray(document)
        if tokens.ndim != 1:
            raise ValueError(f"document {index} has the shape {tokens.shape}; a document is one row of ids")
        if not len(tokens):
            continue
        if not np.issubdtype(tokens.dtype, np.integer):
            raise TypeError(f"document {index} holds {tokens.dtype}, not integers")
        learned = np.ones(len(tokens), bool) if mask is None else np.asarray(mask, bool)
        if learned.shape != tokens.shape:
            raise ValueError(
                f"document {index} has {len(tokens)} tokens, but its loss mask has the shape {learned.shape}"
            )
        for begin in range(0, len(tokens), row_length):
            yield index, tokens[begin : begin + row_length], learned[begin : begin + row_length]
