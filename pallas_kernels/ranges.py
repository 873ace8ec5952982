"""Tile arithmetic that every backend shares: the visible key tiles of a tile of queries.

Axis legend
  B  batch            P  query positions            N  keys of one source (sinks, gists or raws)

Every row of every query sees, in each of the three key sources, one contiguous range `[lo, hi)`. A tile of rows then
needs the key tiles from `min(lo)` to `max(hi)`, and of those only the ones not inside every row's range evaluate a
mask: two integer compares.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from unigist_jax.layout import Array, GistLayout, Int, UnitStarts, namespace, segment_ranges


class RowRanges(NamedTuple):
    """Half-open visible range of each query row in one key source, in that source's own index. int32 [B or 1, P]."""

    lo: Int32[Array, "*B P"]
    hi: Int32[Array, "*B P"]


class SourceRanges(NamedTuple):
    """`RowRanges` of the three key sources of gist attention."""

    sinks: RowRanges
    gists: RowRanges
    raws: RowRanges


def source_ranges(
    layout: GistLayout,
    num_units: int,
    num_sinks: int,
    first_unit: Int,
    first_raw_unit: Int,
    starts: UnitStarts,
) -> SourceRanges:
    """Ranges of a gist-shifted segment's rows in sinks, gists, and raws (which begin at unit `first_raw_unit`).

    NumPy arrays if no argument is a JAX array.
    """
    xp = namespace(first_unit, first_raw_unit, *starts)
    ranges = segment_ranges(layout, num_units, xp.asarray(first_unit, dtype=np.int32), starts)
    gist_lo, gist_hi, raw_lo, raw_hi = (x.reshape(-1, x.shape[-1]) for x in ranges)
    offset = xp.asarray(first_raw_unit, dtype=np.int32) * layout.ratio
    zero = xp.zeros_like(gist_lo)
    return SourceRanges(
        sinks=RowRanges(zero, zero + num_sinks),
        gists=RowRanges(gist_lo, gist_hi),
        raws=RowRanges(xp.maximum(raw_lo - offset, 0), raw_hi - offset),
    )


def tile_runs(rows: RowRanges, tile: int) -> tuple[jax.Array, Callable[[jax.Array], tuple[jax.Array, jax.Array]]]:
    """The key tiles that a tile of rows visits: one run of them in each source, walked one after the other.

    Args:
      rows: ranges int32 [B, S, Q] of the tile's rows in S sources, in one index over all keys; `lo >= hi` sees none.
      tile: keys of a key tile.

    Returns:
      How many key tiles to visit, int32 scalar; and a function from the visit's number to (source, key tile).
    """
    seen = rows.lo < rows.hi
    first = jnp.min(jnp.where(seen, rows.lo, jnp.iinfo(jnp.int32).max), axis=(0, 2))
    last = jnp.max(jnp.where(seen, rows.hi, 0), axis=(0, 2))
    begin = jnp.minimum(first, last) // tile
    ends = jnp.cumsum(-(-last // tile) - begin)

    def locate(visit: jax.Array) -> tuple[jax.Array, jax.Array]:
        source = jnp.sum(visit >= ends)
        before = jnp.where(source > 0, ends[source - 1], 0)
        return source, begin[source] + visit - before

    return ends[-1], locate
