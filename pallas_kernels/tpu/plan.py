"""Tiles of the TPU kernels: how queries and keys are cut, and small integer tables of which tile visits which.

Axis legend
  B   batch, S = 1 or B: the tables have a batch axis only where documents or windows differ between sequences
  P   query rows [ raws | gists ], each part padded to whole tiles of `rows`; M query tiles, no tile holds both parts
  J   jobs: groups of `heads` query heads that share a KV head; C = heads * rows, the columns of a query tile
  N   key tiles of `keys` keys; the key axis is [ sinks, gists | raws ], each of the two parts padded to whole tiles

  key tile     0           1           2           3        4         5           6
             [ S S S g g   g g g g g   g g g g g   g g . .| x x x x   x x x x x   x x . . ]
               └ sinks     └ gists, unaligned to tiles     └ raws from unit `first_raw_unit` on

Each row sees the sinks, one interval of the gists and one of the raws, all on this one axis. So a query tile visits the
tiles that hold sinks and two runs of tiles, inside which it needs no mask from `full_first` to `full_last`:

  a tile     [ ▒ | .  .  ▒  █  █  █  ▒  .  . | .  ▒  ▒  . ]      ▒ masked    █ not masked    . never read
                         │  └ full_first  └ last
                         └ first       (full_last: behind the last █)

The tables hold O(T / tile) integers; nothing has both a query and a key axis.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.ranges import source_ranges
from pallas_kernels.tpu.blocks import Blocks
from unigist_jax.layout import GistLayout, UnitStarts

FAR = np.int32(2**30)
LINE = 9  # columns of a query tile's line in `key_table`
FULL_SINKS, GISTS, RAWS = 0, 1, 5  # its columns: one; then first, full_first, full_last, last of each run


class Segment(NamedTuple):
    """Sizes of a gist-shifted segment and of its query tiles."""

    num_raws: int
    num_gists: int
    rows: int
    heads: int
    part: int

    @property
    def raw_tiles(self) -> int:
        """Tiles of raw rows, which come first."""
        return -(-self.num_raws // self.rows)

    @property
    def tiles(self) -> int:
        """Tiles of raw and gist rows together."""
        return self.raw_tiles - (-self.num_gists // self.rows)

    @property
    def columns(self) -> int:
        """Columns of a tile: its rows, for each of its heads."""
        return self.heads * self.rows

    @property
    def parts(self) -> list[slice]:
        """Columns that a kernel takes at once."""
        size = self.columns if self.columns % self.part else self.part
        return [slice(i, i + size) for i in range(0, self.columns, size)]

    def pad(self, x: Array) -> Array:
        """`[raws | gists]` along axis 1 with each part padded by zeros to whole tiles."""
        raws, gists = x[:, : self.num_raws], x[:, self.num_raws :]
        widths = self.raw_tiles * self.rows, (self.tiles - self.raw_tiles) * self.rows
        parts = [
            jnp.pad(part, [(0, 0), (0, width - part.shape[1])] + [(0, 0)] * (x.ndim - 2))
            for part, width in zip((raws, gists), widths, strict=True)
        ]
        return jnp.concatenate(parts, axis=1)

    def unpad(self, x: Array) -> Array:
        """The inverse of `pad`."""
        begin = self.raw_tiles * self.rows
        return jnp.concatenate([x[:, : self.num_raws], x[:, begin : begin + self.num_gists]], axis=1)

    def tile(self, x: Float[Array, "B p Hq *D"]) -> Float[Array, "B J M C *D"]:
        """A query tile of a job as one matrix: its heads one behind the other, each with the tile's rows."""
        batch, _, num_heads, *dim = x.shape
        x = self.pad(x).reshape(batch, self.tiles, self.rows, num_heads // self.heads, self.heads, *dim)
        x = jnp.moveaxis(x, (3, 1, 4, 2), (1, 2, 3, 4))
        return x.reshape(batch, num_heads // self.heads, self.tiles, self.columns, *dim)

    def untile(self, x: Float[Array, "B J M C D"]) -> Float[Array, "B p Hq D"]:
        """The inverse of `tile`."""
        batch, jobs, _, _, dim = x.shape
        x = x.reshape(batch, jobs, self.tiles, self.heads, self.rows, dim)
        x = jnp.moveaxis(x, (1, 2, 3, 4), (3, 1, 4, 2))
        return self.unpad(x.reshape(batch, self.tiles * self.rows, jobs * self.heads, dim))

    def valid_rows(self) -> np.ndarray:
        """Which padded rows are rows of the segment, bool [P]."""
        row, begin = np.arange(self.tiles * self.rows), self.raw_tiles * self.rows
        return (row < self.num_raws) | ((row >= begin) & (row < begin + self.num_gists))


class KeyAxis(NamedTuple):
    """Sizes of the keys and of their tiles."""

    num_sinks: int
    num_gists: int
    num_raws: int
    keys: int

    @property
    def sink_tiles(self) -> int:
        """Tiles that hold sinks; the last of them may hold gists too."""
        return -(-self.num_sinks // self.keys)

    @property
    def raw_tile(self) -> int:
        """The first tile of raws."""
        return -(-(self.num_sinks + self.num_gists) // self.keys)

    @property
    def tiles(self) -> int:
        """Tiles of all keys."""
        return self.raw_tile - (-self.num_raws // self.keys)

    def tile(
        self, sinks: Float[Array, "s Hkv D"], gists: Float[Array, "B G Hkv D"], raws: Float[Array, "B R Hkv D"]
    ) -> Float[Array, "B Hkv N K D"]:
        """All keys (or values) cut into tiles."""
        batch, _, num_kv_heads, dim = gists.shape
        sinks = jnp.broadcast_to(sinks, (batch, *sinks.shape))
        prefix = jnp.concatenate([sinks, gists], axis=1)
        parts = [jnp.pad(x, ((0, 0), (0, -x.shape[1] % self.keys), (0, 0), (0, 0))) for x in (prefix, raws)]
        x = jnp.concatenate(parts, axis=1).reshape(batch, self.tiles, self.keys, num_kv_heads, dim)
        return jnp.moveaxis(x, 3, 1)

    def untile(self, x: Float[Array, "B Hkv N K D"]) -> tuple[Array, Array, Array]:
        """Gradients of sinks (summed over the batch), gists and raws from those of the tiles."""
        x = jnp.moveaxis(x, 1, 3)
        x = x.reshape(x.shape[0], -1, *x.shape[3:])
        raws = self.raw_tile * self.keys
        gists = slice(self.num_sinks, self.num_sinks + self.num_gists)
        return x[:, : self.num_sinks].sum(0), x[:, gists], x[:, raws : raws + self.num_raws]


def cut(q_shape: tuple[int, ...], kv, layout: GistLayout, blocks: Blocks) -> tuple[Segment, KeyAxis]:
    """How the arguments of the op are cut into tiles. Short inputs get smaller tiles."""
    num_units = layout.segment_units(q_shape[1])
    num_raws = num_units * layout.ratio
    rows = min(blocks.rows, -(-num_raws // 128) * 128)
    segment = Segment(num_raws, num_units, rows, blocks.heads(q_shape[2] // kv.gist_k.shape[2]), blocks.part)
    num_sinks, num_gists, raws = kv.sink_k.shape[0], kv.gist_k.shape[1], kv.raw_k.shape[1]
    keys = min(blocks.keys, -(-max(num_sinks + num_gists, raws) // 128) * 128)
    return segment, KeyAxis(num_sinks, num_gists, raws, keys)


def row_intervals(
    layout: GistLayout,
    segment: Segment,
    axis: KeyAxis,
    first_unit: int | jax.Array,
    first_raw_unit: int | jax.Array,
    starts: UnitStarts,
) -> Int32[Array, "S 4 P"]:
    """On the key axis, from where and up to where each padded row sees gists, then raws. Padding: all zero."""
    ranges = source_ranges(layout, segment.num_gists, layout.num_sinks, first_unit, first_raw_unit, starts)
    limits = (axis.num_sinks, axis.num_gists), (axis.raw_tile * axis.keys, axis.num_raws)
    ends = []
    for rows, (begin, count) in zip((ranges.gists, ranges.raws), limits, strict=True):
        ends += [begin + jnp.clip(end, 0, count) for end in rows]
    ends = jnp.broadcast_arrays(*(x.astype(jnp.int32) for x in ends))
    return jnp.stack([segment.pad(x) for x in ends], axis=1)


def column_intervals(segment: Segment, intervals: Int32[Array, "S 4 P"]) -> Int32[Array, "S M 4 C"]:
    """The intervals of each query tile's columns."""
    x = intervals.reshape(-1, 4, segment.tiles, segment.rows).swapaxes(1, 2)
    return jnp.tile(x, (1, 1, 1, segment.heads))


def _bounds(segment: Segment, lo, hi, keys: int) -> list[Int32[Array, "S M"]]:
    """first, full_first, full_last, last of each query tile in one run of key tiles."""

    def per_tile(x, reduce):
        return reduce(x.reshape(x.shape[0], segment.tiles, segment.rows), axis=-1)

    valid = segment.valid_rows()
    seen = (lo < hi) & valid
    last_key = per_tile(jnp.where(seen, hi, 0), jnp.max)
    first_key = jnp.minimum(per_tile(jnp.where(seen, lo, FAR), jnp.min), last_key)
    first, last = first_key // keys, -(-last_key // keys)
    full_first = -(-per_tile(jnp.where(valid, lo, 0), jnp.max) // keys)
    full_last = per_tile(jnp.where(valid, hi, FAR), jnp.min) // keys
    full_first = jnp.clip(full_first, first, last)
    return [first, full_first, jnp.clip(full_last, full_first, last), last]


def key_table(segment: Segment, axis: KeyAxis, intervals: Int32[Array, "S 4 P"]) -> Int32[Array, "S M L"]:
    """For each query tile: its unmasked tiles of sinks, then the bounds of its runs of gists and of raws."""
    gist_lo, gist_hi, raw_lo, raw_hi = jnp.moveaxis(intervals, 1, 0)
    gists = _bounds(segment, gist_lo, gist_hi, axis.keys)
    raws = _bounds(segment, raw_lo, raw_hi, axis.keys)
    # a tile with both sinks and gists needs no mask if every row sees all of those gists
    whole, end = axis.num_sinks // axis.keys, axis.sink_tiles * axis.keys
    sees_all = ((gist_lo <= axis.num_sinks) & (gist_hi >= end)) | ~segment.valid_rows()
    sees_all = sees_all.reshape(-1, segment.tiles, segment.rows).all(-1)
    full_sinks = jnp.where(sees_all, axis.sink_tiles, whole).astype(jnp.int32)
    gists = [jnp.maximum(x, axis.sink_tiles) for x in gists]
    # a query tile that sees nothing (raws were withheld) still visits one tile, whose keys are all masked
    nothing = (gists[0] == gists[3]) & (raws[0] == raws[3]) & (axis.sink_tiles == 0)
    raws = [jnp.where(nothing, axis.raw_tile + int(i == 3), x) for i, x in enumerate(raws)]
    return jnp.stack([full_sinks, *gists, *raws], axis=-1)


def query_table(segment: Segment, axis: KeyAxis, table: Int32[Array, "S M L"]) -> Int32[Array, "S N 4"]:
    """For each key tile the query tiles that visit it: raws `[first, last)`, then gists `[first, last)`.

    Each is one range; a query tile inside it that sees none of the keys finds all of them masked.
    """
    split, tile = segment.raw_tiles, jnp.arange(axis.tiles)

    def count(values):
        """How many of `values` are at most n, for each key tile n. (A binary search would be a loop.)"""
        counts = jnp.zeros((len(values), axis.tiles + 1), jnp.int32)
        counts = counts.at[jnp.arange(len(values))[:, None], jnp.clip(values, 0, axis.tiles)].add(1)
        return jnp.cumsum(counts, axis=1)[:, :-1]

    columns = []
    for part, base in ((slice(None, split), 0), (slice(split, None), split)):
        ends = []
        for run in (GISTS, RAWS):
            first, last = table[:, part, run], table[:, part, run + 3]
            begin = lax.cummin(jnp.where(first < last, first, FAR), axis=1, reverse=True)
            start, stop = count(lax.cummax(last, axis=1)), count(begin)
            ends.append((start, jnp.maximum(start, stop)))
        every = (0, table[:, part].shape[1])
        for end in (0, 1):
            of_key = jnp.where(tile >= axis.raw_tile, ends[1][end], ends[0][end])
            columns.append(base + jnp.where(tile < axis.sink_tiles, every[end], of_key))
    return jnp.stack(columns, axis=-1)


class KeyStream:
    """The key tiles that a query tile visits, unmasked ones first: scalars of its line in a flat `key_table`."""

    def __init__(self, table_ref, line, axis: KeyAxis):
        value = [table_ref[line * LINE + i] for i in range(LINE)]
        full_sinks = value[FULL_SINKS]
        self.full_runs = [(0, full_sinks)]
        self.masked_runs = [(full_sinks, axis.sink_tiles)]
        for run in (GISTS, RAWS):
            first, full_first, full_last, last = value[run : run + 4]
            self.full_runs.append((full_first, full_last))
            self.masked_runs += [(first, full_first), (full_last, last)]

    @property
    def num_full(self):
        """Tiles without a mask."""
        return sum(last - first for first, last in self.full_runs)

    @property
    def count(self):
        """Tiles to visit."""
        return self.num_full + sum(last - first for first, last in self.masked_runs)

    def locate(self, index):
        """The key tile of the stream's place `index`."""
        tile, begin = jnp.int32(0), 0
        for first, last in self.full_runs + self.masked_runs:
            tile = jnp.where(index >= begin, first + index - begin, tile)
            begin = begin + last - first
        return tile


def is_full(table_ref, line, key_tile):
    """Whether a query tile sees every key of a key tile that it visits, from a flat `key_table`."""
    value = [table_ref[line * LINE + i] for i in range(LINE)]
    full = key_tile < value[FULL_SINKS]
    for run in (GISTS, RAWS):
        full |= (key_tile >= value[run + 1]) & (key_tile < value[run + 2])
    return full
