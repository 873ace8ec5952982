"""The gist layout: how raws, gists and sinks are laid out, where they stand, and what each of them sees.

Axis legend
  B  batch
  T  raw tokens of a segment, T = U * r
  U  gist units of a segment; unit u holds r raws and, after them, one gist
  P  positions of a segment, P = (r + 1) * U, stored gist-shifted: [ T raws | U gists ]
  G  gist units of the whole context (the keys), G >= first_unit + U
  s  sinks, a stream of their own in front of everything

Causal order (r = 2, s = 2):          S S | x0 x1 g0 | x2 x3 g1 | x4 x5 g2
Stored order, gist-shifted:    sinks: S S   segment: x0 x1 x2 x3 x4 x5 | g0 g1 g2

Visibility (UniGist, arXiv 2509.15763, Eq. 3): a query in unit u sees every sink, the gists of its document that are not
after it, and the raws of its document from unit u - k up to itself. Both are contiguous ranges, so two integers a unit,
`gist_start[u]` and `raw_start[u]`, describe every mask in this project; no mask array exists outside the oracle.

Every function is pure, and takes and returns NumPy arrays or JAX arrays alike (JAX if any input is JAX).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray
Int = int | Array


def namespace(*arrays: Any):
    """`jax.numpy` if any argument is a JAX array or tracer, else `numpy`."""
    return jnp if any(isinstance(a, jax.Array) for a in arrays) else np


@dataclasses.dataclass(frozen=True)
class GistLayout:
    """The three numbers that fix a gist layout. Frozen and hashable: a static argument under `jax.jit`.

    Attributes:
      ratio: raw tokens per gist, `r` >= 1.
      num_sinks: learned sink tokens in front of everything, `s` >= 0.
      window: raw tokens that stay visible before the current unit, `w` >= 0, a multiple of `ratio`.
      chunk: 0, or raw tokens of a chunk, a multiple of `ratio`: a unit then sees the raws of its own chunk alone, and
        not those of a sliding window (the chunk-wise methods). `window` is `chunk - ratio`, the most that it sees.

    Raises:
      ValueError: if one of them breaks its bound; the message names the value and the nearest legal one.
    """

    ratio: int = 4
    num_sinks: int = 128
    window: int = 128
    chunk: int = 0

    def __post_init__(self):
        for name in ("ratio", "num_sinks", "window", "chunk"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise TypeError(f"GistLayout.{name} must be an int, got {value!r} of type {type(value).__name__}")
        if self.ratio < 1:
            raise ValueError(f"GistLayout.ratio={self.ratio}: needs at least 1 raw token per gist; use ratio >= 1")
        if self.num_sinks < 0:
            raise ValueError(f"GistLayout.num_sinks={self.num_sinks}: must not be negative; use 0 for no sinks")
        if self.chunk < 0 or self.chunk % self.ratio or (self.chunk and self.window != self.chunk - self.ratio):
            chunk = max(1, round(self.chunk / self.ratio)) * self.ratio
            raise ValueError(
                f"GistLayout.chunk={self.chunk} with window={self.window} and ratio={self.ratio}: a chunk is a "
                f"multiple of the ratio, and its window is chunk - ratio; use chunk={chunk}, "
                f"window={chunk - self.ratio}, or chunk=0"
            )
        if self.window < 0 or self.window % self.ratio:
            nearest = max(0, round(self.window / self.ratio)) * self.ratio
            raise ValueError(
                f"GistLayout.window={self.window} is not a non-negative multiple of ratio={self.ratio}; "
                f"the nearest legal window is {nearest}"
            )

    @property
    def window_units(self) -> int:
        """`k`: previous units whose raws stay visible, beside the current unit."""
        return self.window // self.ratio

    def with_ratio(self, ratio: int) -> GistLayout:
        """The same at another ratio; a window, or a chunk, becomes the next multiple of it."""

        def next_multiple(num_raws: int) -> int:
            return -(-num_raws // max(1, ratio)) * ratio

        if self.chunk:
            chunk = next_multiple(self.chunk)
            return GistLayout(ratio, self.num_sinks, chunk - ratio, chunk)
        return GistLayout(ratio, self.num_sinks, next_multiple(self.window))

    def num_units(self, num_raws: int) -> int:
        """Units of `num_raws` raw tokens. Raises ValueError unless it is a multiple of `ratio`."""
        if num_raws < 0 or num_raws % self.ratio:
            padded = -(-max(num_raws, 0) // self.ratio) * self.ratio
            raise ValueError(
                f"a length of {num_raws} raw tokens is not a multiple of ratio={self.ratio}; pad it to {padded}"
            )
        return num_raws // self.ratio

    def segment_length(self, num_units: int) -> int:
        """Positions of a segment, `P = (r + 1) * U`."""
        return (self.ratio + 1) * num_units

    def segment_units(self, num_positions: int) -> int:
        """Units of a segment of `P` positions: the inverse of `segment_length`. Raises ValueError if there is none."""
        if num_positions < 0 or num_positions % (self.ratio + 1):
            raise ValueError(
                f"a segment of {num_positions} positions does not hold whole units of {self.ratio} raws and 1 gist; "
                f"its length must be a multiple of ratio + 1 = {self.ratio + 1}"
            )
        return num_positions // (self.ratio + 1)


class UnitStarts(NamedTuple):
    """What a query in each unit sees, as two first units. int32 [..., U], in units of the whole context."""

    gist_start: Array  # first visible gist
    raw_start: Array  # first unit whose raws are visible


class SegmentRanges(NamedTuple):
    """Half-open ranges of visible keys of each position of a segment, int32 [..., P], in whole-context indices."""

    gist_lo: Array
    gist_hi: Array
    raw_lo: Array
    raw_hi: Array


# --- positions: sinks 0..s-1, raw i at s + i, gist u at the position of the raw right after it ------------------------


def sink_positions(layout: GistLayout) -> np.ndarray:
    """Rotary positions of the sinks, int32 [s]."""
    return np.arange(layout.num_sinks, dtype=np.int32)


def segment_positions(layout: GistLayout, num_units: int, first_unit: Int = 0, doc_start: Array | None = None) -> Array:
    """Rotary positions of a segment, gist-shifted, int32 [..., P].

    Args:
      layout: the layout.
      num_units: `U`, units of the segment (static).
      first_unit: unit of the whole context at which the segment begins; an int or an int32 array [...].
      doc_start: int32 [..., U], first unit of the document of each of the segment's units; positions restart at `s`
        there. None: one document that begins at unit 0.
    """
    xp = namespace(first_unit, doc_start)
    r, s = layout.ratio, layout.num_sinks
    unit = xp.asarray(first_unit, dtype=np.int32)[..., None] + xp.arange(num_units, dtype=np.int32)
    if doc_start is not None:
        unit = unit - doc_start
    raws = unit[..., None] * r + xp.arange(r, dtype=np.int32)
    gists = (unit + 1) * r
    return s + xp.concatenate([raws.reshape(*raws.shape[:-2], num_units * r), gists], axis=-1)


# --- documents ----------------------------------------------------------------------------------------------------


def document_starts(document_ids: Array) -> Array:
    """First unit of the document of each unit, from document ids.

    Args:
      document_ids: integers [..., U]; a document is a maximal run of equal ids.

    Returns:
      `doc_start`, int32 [..., U].
    """
    xp = namespace(document_ids)
    index = xp.arange(document_ids.shape[-1], dtype=np.int32)
    changed = document_ids[..., 1:] != document_ids[..., :-1]
    first = xp.ones((*document_ids.shape[:-1], min(1, document_ids.shape[-1])), dtype=bool)
    begins = xp.where(xp.concatenate([first, changed], axis=-1), index, 0).astype(np.int32)
    if xp is np:
        return np.maximum.accumulate(begins, axis=-1)
    return jax.lax.cummax(begins, axis=begins.ndim - 1)


def refined_starts(doc_start: Array, factor: int) -> Array:
    """`doc_start` [..., U] of rows packed in units `factor` times as long, for the short units: [..., U * factor]."""
    xp = namespace(doc_start)
    return doc_start if factor == 1 else xp.repeat(doc_start * np.int32(factor), factor, axis=-1)


def unit_starts(
    layout: GistLayout,
    num_units: int,
    first_unit: Int = 0,
    doc_start: Array | None = None,
    raw_start: Array | None = None,
) -> UnitStarts:
    """First visible gist and first visible raw unit of each unit of a segment.

    `gist_start[u] = d(u)` and `raw_start[u] = max(d(u), u - k)`, with `d` the first unit of u's document. With chunks,
    `raw_start[u]` is the first unit of u's chunk, counted from `d(u)`.

    Args:
      layout: the layout.
      num_units: `U`, units of the segment (static).
      first_unit: unit at which the segment begins; an int or an int32 array [...].
      doc_start: int32 [..., U] for the segment's units, or None for one document from unit 0.
      raw_start: int32 [..., U] to replace the sliding window or the chunks by another first visible raw unit; still cut
        at the document's start.
    """
    xp = namespace(first_unit, doc_start, raw_start)
    unit = xp.asarray(first_unit, dtype=np.int32)[..., None] + xp.arange(num_units, dtype=np.int32)
    begin = xp.zeros_like(unit) if doc_start is None else xp.asarray(doc_start, dtype=np.int32)
    if raw_start is not None:
        window = xp.asarray(raw_start, dtype=np.int32)
    elif layout.chunk:
        window = unit - (unit - begin) % (layout.chunk // layout.ratio)
    else:
        window = unit - layout.window_units
    return UnitStarts(begin, xp.maximum(begin, window))


def segment_ranges(layout: GistLayout, num_units: int, first_unit: Int, starts: UnitStarts) -> SegmentRanges:
    """Visible gists and raws of every position of a segment, gist-shifted (Eq. 3 as ranges).

    raw i of unit u:  gists [gist_start[u], u)      raws [raw_start[u] * r, i + 1)
    gist u:           gists [gist_start[u], u + 1)  raws [raw_start[u] * r, (u + 1) * r)
    """
    xp = namespace(first_unit, *starts)
    r = layout.ratio
    unit = xp.asarray(first_unit, dtype=np.int32)[..., None] + xp.arange(num_units, dtype=np.int32)

    def positions(per_raw_offset, per_gist, per_unit_raw):
        raws = per_unit_raw[..., None] + per_raw_offset
        raws = raws.reshape(*raws.shape[:-2], num_units * r)
        shape = np.broadcast_shapes(raws.shape[:-1], per_gist.shape[:-1])
        raws = xp.broadcast_to(raws, (*shape, num_units * r))
        return xp.concatenate([raws, xp.broadcast_to(per_gist, (*shape, num_units))], axis=-1)

    same = xp.zeros((r,), dtype=np.int32)
    return SegmentRanges(
        gist_lo=positions(same, starts.gist_start, starts.gist_start),
        gist_hi=positions(same, unit + 1, unit),
        raw_lo=positions(same, starts.raw_start * r, starts.raw_start * r),
        raw_hi=positions(1 + xp.arange(r, dtype=np.int32), (unit + 1) * r, unit * r),
    )


# --- assembling and splitting a segment ------------------------------------------------------------------------------


def assemble_segment(raws: Array, gists: Array, layout: GistLayout, axis: int = -2) -> Array:
    """`[raws | gists]` along `axis`: raws with `T = U * r` entries there, gists with `U`. Raises ValueError if not."""
    num_units = layout.num_units(raws.shape[axis])
    if gists.shape[axis] != num_units:
        raise ValueError(
            f"{raws.shape[axis]} raws make {num_units} units at ratio={layout.ratio}, but {gists.shape[axis]} gists"
        )
    return namespace(raws, gists).concatenate([raws, gists], axis=axis)


def split_segment(segment: Array, layout: GistLayout, axis: int = -2) -> tuple[Array, Array]:
    """The raws (`T` entries along `axis`) and the gists (`U` entries) of a gist-shifted segment."""
    num_raws = layout.segment_units(segment.shape[axis]) * layout.ratio
    before = (slice(None),) * (axis % segment.ndim)
    return segment[(*before, slice(None, num_raws))], segment[(*before, slice(num_raws, None))]
