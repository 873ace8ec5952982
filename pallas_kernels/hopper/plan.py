"""What each tile visits: small integer tables, computed from the rows' intervals before the kernels run.

Axis legend
  P   query rows, padded: [ raws, up to a multiple of `TILE_MULTIPLE` | gists, likewise ]
  M   query tiles of `rows` rows; raw tiles come first, and no tile holds both kinds
  N   key tiles of `keys` keys of one source (sinks, gists or raws)
  S   1 or B: the tables have no batch axis to speak of unless documents or windows differ between sequences

In each source every row sees one interval `[lo, hi)` (see `pallas_kernels.ranges`), so a query tile sees key tiles
`[first, last)`, and inside them `[full_first, full_last)` without a mask:

             key tiles of one source
  a tile   [ .  .  ▒  █  █  █  █  ▒  .  . ]      ▒ masked: two integer compares    █ not masked    . never read
                   │  └ full_first  │  └ last
                   └ first          └ full_last

The tables hold O(T / tile) integers; nothing here has both a query and a key axis. Of NumPy arrays NumPy
arrays are made: tables of positions that are known when a program is traced are constants in it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int32

from pallas_kernels.ranges import RowRanges, source_ranges
from unigist_jax.layout import Array, GistLayout, Int, UnitStarts, namespace

TILE_MULTIPLE = 128
FAR = np.int32(2**30)


class Segment(NamedTuple):
    """Sizes of a gist-shifted segment and of its padded copy."""

    num_raws: int
    num_gists: int

    @property
    def raw_rows(self) -> int:
        """Rows of the padded raws."""
        return -(-self.num_raws // TILE_MULTIPLE) * TILE_MULTIPLE

    @property
    def rows(self) -> int:
        """Rows of the padded segment."""
        return self.raw_rows + -(-self.num_gists // TILE_MULTIPLE) * TILE_MULTIPLE

    def pad(self, x: Array, axis: int = 1) -> Array:
        """`[raws | gists]` along `axis` with each part padded by zeros; x itself where nothing is to pad."""
        if x.shape[axis] == self.rows:
            return x
        xp = namespace(x)
        parts = xp.split(x, [self.num_raws], axis=axis)
        widths = self.raw_rows, self.rows - self.raw_rows

        def to(part, width):
            pads = [(0, 0)] * part.ndim
            pads[axis] = (0, width - part.shape[axis])
            return xp.pad(part, pads)

        return xp.concatenate([to(p, w) for p, w in zip(parts, widths, strict=True)], axis=axis)

    def unpad(self, x: Array, axis: int = 1) -> Array:
        """The inverse of `pad`."""
        if self.num_raws + self.num_gists == self.rows:
            return x
        raws = jax.lax.slice_in_dim(x, 0, self.num_raws, axis=axis)
        gists = jax.lax.slice_in_dim(x, self.raw_rows, self.raw_rows + self.num_gists, axis=axis)
        return jnp.concatenate([raws, gists], axis=axis)


class RowIntervals(NamedTuple):
    """Visible gists and raws of each padded row; padded rows see nothing. int32 [S, P]."""

    gist_lo: Int32[Array, "S P"]
    gist_hi: Int32[Array, "S P"]
    raw_lo: Int32[Array, "S P"]
    raw_hi: Int32[Array, "S P"]


class TileBounds(NamedTuple):
    """Key tiles of one source that each query tile visits, and those it visits unmasked. int32 [S, M]."""

    first: Int32[Array, "S M"]
    full_first: Int32[Array, "S M"]
    full_last: Int32[Array, "S M"]
    last: Int32[Array, "S M"]


def segment_of(layout: GistLayout, num_positions: int) -> Segment:
    """Sizes of a segment of `num_positions` rows."""
    units = layout.segment_units(num_positions)
    return Segment(units * layout.ratio, units)


def row_intervals(
    layout: GistLayout,
    segment: Segment,
    first_unit: Int,
    first_raw_unit: Int,
    starts: UnitStarts,
) -> RowIntervals:
    """The intervals of every padded row, from the closed forms that all backends share."""
    ranges = source_ranges(layout, segment.num_gists, layout.num_sinks, first_unit, first_raw_unit, starts)
    rows = [x.astype(np.int32) for x in (*ranges.gists, *ranges.raws)]
    return RowIntervals(*(segment.pad(x) for x in namespace(*rows).broadcast_arrays(*rows)))


def _valid_rows(segment: Segment) -> np.ndarray:
    row = np.arange(segment.rows)
    return (row < segment.num_raws) | ((row >= segment.raw_rows) & (row < segment.raw_rows + segment.num_gists))


def tile_bounds(segment: Segment, rows: RowRanges, tile: int, keys: int) -> TileBounds:
    """Bounds of each tile of `tile` query rows in a source cut into tiles of `keys` keys."""

    xp = namespace(*rows)

    def per_tile(x, reduce):
        return reduce(x.reshape(x.shape[0], -1, tile), axis=-1)

    valid = _valid_rows(segment)
    seen = (rows.lo < rows.hi) & valid
    last_key = per_tile(xp.where(seen, rows.hi, 0), xp.max)
    first_key = xp.minimum(per_tile(xp.where(seen, rows.lo, FAR), xp.min), last_key)
    first, last = first_key // keys, -(-last_key // keys)
    full_first = -(-per_tile(xp.where(valid, rows.lo, 0), xp.max) // keys)
    full_last = per_tile(xp.where(valid, rows.hi, FAR), xp.min) // keys
    full_first = xp.clip(full_first, first, last)
    return TileBounds(first, full_first, xp.clip(full_last, full_first, last), last)


def heavy_first(layout: GistLayout, segment: Segment, tile: int) -> np.ndarray:
    """Query tiles from the heaviest to the lightest, int32 [M]: by the gists a one-document segment would show them."""
    raw_tiles = np.arange(segment.raw_rows // tile)
    gist_tiles = np.arange((segment.rows - segment.raw_rows) // tile)
    weight = np.concatenate([(raw_tiles + 1) * tile / layout.ratio, (gist_tiles + 1) * tile + tile])
    return np.argsort(-weight, kind="stable").astype(np.int32)


def forward_table(
    layout: GistLayout, segment: Segment, intervals: RowIntervals, tile: int, keys: int, regular: bool
) -> Int32[Array, "S M 16"]:
    """One line a query tile, heavy tiles first: the tile, then `TileBounds` of gists and of raws.

    Every tile visits a key tile at least: a tile of padding gets one of raws, and masks all of it.

    Args:
      regular: every tile sees all gists before it, so that the order is known beforehand; else it is sorted out here.
    """
    gists = tile_bounds(segment, RowRanges(intervals.gist_lo, intervals.gist_hi), tile, keys)
    raws = tile_bounds(segment, RowRanges(intervals.raw_lo, intervals.raw_hi), tile, keys)
    padding = (gists.first == gists.last) & (raws.first == raws.last)
    raws = raws._replace(last=raws.last + padding)
    xp = namespace(*gists)
    order = xp.broadcast_to(heavy_first(layout, segment, tile), gists.first.shape)
    if not regular:
        order = xp.argsort(-(gists.last - gists.first + raws.last - raws.first), axis=1, stable=True).astype(np.int32)
    columns = [order, *(xp.take_along_axis(x, order, axis=1) for x in (*gists, *raws))]
    columns += [xp.zeros_like(order)] * (16 - len(columns))
    return xp.stack(columns, axis=-1)


def _monotone(segment: Segment, bounds: TileBounds, tile: int) -> tuple[Array, Array]:
    """`first` and `last` of each query tile, widened so that neither falls along the raws nor along the gists."""
    split, xp = segment.raw_rows // tile, namespace(*bounds)

    def part(at):
        first, last = bounds.first[:, at], bounds.last[:, at]
        begin = xp.where(first < last, first, FAR)
        if xp is np:
            return np.minimum.accumulate(begin[:, ::-1], axis=1)[:, ::-1], np.maximum.accumulate(last, axis=1)
        return jax.lax.cummin(begin, axis=1, reverse=True), jax.lax.cummax(last, axis=1)

    parts = zip(part(slice(None, split)), part(slice(split, None)), strict=True)
    return tuple(xp.concatenate(pair, axis=1) for pair in parts)


def visitors(segment: Segment, bounds: TileBounds, num_key_tiles: int, tile: int) -> Int32[Array, "S N 4"]:
    """For each key tile the query tiles that visit it: `[raw_first, raw_last)`, then `[gist_first, gist_last)`.

    Each is one range; a query tile inside it that sees none of the keys finds all of them masked.
    """
    split, xp = segment.raw_rows // tile, namespace(*bounds)
    begin, reach = _monotone(segment, bounds, tile)

    def count(values):
        """How many of `values` are at most n, for each key tile n."""
        if xp is np:
            counts = [np.searchsorted(x, np.arange(num_key_tiles), side="right") for x in values]
            return np.stack(counts).astype(np.int32)
        bins = jnp.clip(values, 0, num_key_tiles)  # a binary search would be a loop on the host
        counts = jnp.zeros((len(values), num_key_tiles + 1), jnp.int32)
        counts = counts.at[jnp.arange(len(values))[:, None], bins].add(1)
        return jnp.cumsum(counts, axis=1)[:, :num_key_tiles]

    columns = []
    for at, base in ((slice(None, split), 0), (slice(split, None), split)):
        start, stop = count(reach[:, at]), count(begin[:, at])
        columns += [base + start, base + xp.maximum(start, stop)]
    return xp.stack(columns, axis=-1)


def walk_lines(
    segment: Segment, walks: Int32[Array, "S N 4"], tile: int, pieces: int, num_cut: int
) -> Int32[Array, "S K 6"]:
    """One line for each block of a head: its key tile, the query tiles it visits, and its turn to add to dK and dV.

    The walks of the first `num_cut` key tiles are cut at the ends of `pieces` equal parts of the raws and of the gists.
    Lines go piece by piece, the last part of the row first, and within a piece by key tile; then come the whole walks.
    A turn counts the pieces of the key tile before this one that visit anything; one that visits nothing has -1, unless
    no piece of its key tile does: then one has turn 0, to write zeros. Known lines without a turn are left out.
    """
    xp = namespace(walks)
    parts = np.arange(pieces)[::-1, None, None] + np.array([0, 1])
    split, num_tiles = segment.raw_rows // tile, segment.rows // tile
    edges = np.concatenate([split * parts // pieces, split + (num_tiles - split) * parts // pieces], axis=-1)
    cut = xp.clip(walks[:, None, :num_cut], edges[..., [0, 0, 2, 2]], edges[..., [1, 1, 3, 3]])  # [S, pieces, cut, 4]
    busy = (cut[..., 0] < cut[..., 1]) | (cut[..., 2] < cut[..., 3])
    busy |= ~busy.any(1, keepdims=True) & (np.arange(pieces) == 0)[:, None]
    turns = xp.where(busy, xp.cumsum(busy, axis=1) - busy, -1)

    def lines(key_tiles, walks, turns):
        columns = key_tiles[..., None], walks, turns[..., None]
        return xp.concatenate(columns, axis=-1).astype(np.int32).reshape(len(walks), -1, 6)

    whole = np.broadcast_to(np.arange(num_cut, walks.shape[1]), (len(walks), walks.shape[1] - num_cut))
    pieces_first = lines(np.broadcast_to(np.arange(num_cut), turns.shape), cut, turns)
    if xp is np:
        pieces_first = pieces_first[:, (pieces_first[..., 5] >= 0).any(0)]
    return xp.concatenate([pieces_first, lines(whole, walks[:, num_cut:], np.zeros_like(whole))], axis=1)


def backward_tables(
    segment: Segment,
    ranges: list[RowRanges],
    num_key_tiles: tuple[int, int, int],
    tile: int,
    keys: int,
    pieces: int,
    num_cut: int,
) -> tuple[Int32[Array, "S K 6"], Int32[Array, "S 3 M 4"]]:
    """What the backward pass walks over, for the key tiles of all sources, one source after another.

    Args:
      pieces, num_cut: how many parts the walks of how many key tiles are cut into.

    Returns:
      `walk_lines` of all key tiles. For each source and query tile: what to add to a key tile's index in the source
      to get the number of key tiles, of this source and those before it, that visit the query tile earlier; then the
      range of the source's key tiles that need no mask.
    """
    walks, tiles, earlier = [], [], 0
    for rows, count in zip(ranges, num_key_tiles, strict=True):
        bounds = tile_bounds(segment, rows, tile, keys)
        begin, reach = _monotone(segment, bounds, tile)
        walks.append(visitors(segment, bounds, count, tile))
        xp = namespace(begin)
        tiles.append(xp.stack([earlier - begin, bounds.full_first, bounds.full_last, xp.zeros_like(begin)], axis=-1))
        earlier = earlier + xp.maximum(reach - begin, 0)
    walks = xp.concatenate(walks, axis=1)
    return walk_lines(segment, walks, tile, pieces, num_cut), xp.stack(tiles, axis=1)


def log_sum_exp_of_rows(segment: Segment, lse: Float[Array, "B Hq P"]) -> Float[Array, "B Hq P"]:
    """The log-sum-exp with padded rows set so high that their weights vanish in the backward pass."""
    return jnp.where(_valid_rows(segment), lse, np.float32(2**30))
