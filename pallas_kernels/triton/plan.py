"""What the host decides before the Triton kernels run: sizes, splits, and how far the keys of a tile are seen.

Axis legend
  U   units of the segment          N   keys of one source, cut into tiles of `keys`
  S   1 or B: one row where all sequences see alike

A key tile is seen by the positions from its diagonal, which the kernels compute, up to where a document or a window
ends: two integers a tile, in units. `first` keys begin the tile, `last` keys end it:

  units             0  1  2 │ 3  4  5  6 │ 7  8          full: the first unit that does not see key `first`
  the tile's keys           │ ▒  █  █  ▒ │                      any more (7); seen: the unit after the last that
                            └ diagonal   └ full, seen           still sees some key of the tile (7)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

PROGRAMS = 1024  # that fill a GPU with some to spare for the tail: about eight a multiprocessor


def reach(lo: Int32[Array, "S U"], num_keys: int, keys: int) -> Int32[Array, "S N 2"]:
    """For each key tile `seen` and `full` as drawn above.

    Args:
      lo: first visible key of each unit, in the source's own index.
    """
    num_units = lo.shape[1]
    begin = jnp.arange(-(-num_keys // keys), dtype=jnp.int32)[:, None] * keys
    unit = jnp.arange(num_units, dtype=jnp.int32)
    lo = lo[:, None]
    seen = jnp.max(jnp.where(lo < begin + keys, unit + 1, 0), axis=-1)
    full = jnp.min(jnp.where(lo > begin, unit, num_units), axis=-1)
    return jnp.stack([seen, full], axis=-1)


def splits(programs: int, most: int) -> int:
    """Parts of each program's work, so that there are about `PROGRAMS` of them, at most `most` parts each."""
    return max(1, min(-(-PROGRAMS // programs), most))


def place_of(first_unit: jax.Array | int, first_raw_unit: jax.Array | int) -> Int32[Array, " 2"]:
    """The segment's first unit and the first unit of the raw keys, as the kernels read them."""
    return jnp.stack([jnp.asarray(first_unit, jnp.int32), jnp.asarray(first_raw_unit, jnp.int32)])
