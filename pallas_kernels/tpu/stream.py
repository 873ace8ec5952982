"""Tiles on their way from HBM: each grid step works on its own list of tiles, and the next one is always being copied.

A grid step (a query tile in the forward pass) visits a number of tiles that only the tables know. A loop inside the
step walks over them with two buffers, and the last tile of a step starts the copy of the next step's first:

  step            0           1     2 (none)  3
  tiles           a  b  c     d  e            f        time ->
  buffer          0  1  0     1  0            1
  copies started  b  c  d     e  f            .        while the tile above is computed; `a` before everything

So no grid step is spent on a tile that is not visited, and only the first tile of a whole row of steps is waited for.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
from jax import lax

BUFFERS = 2


def run_stream(
    step: jax.Array,
    num_steps: int,
    count_of: Callable[[jax.Array], jax.Array],
    copies: Callable[[jax.Array, jax.Array, jax.Array], list],
    serial_ref,
    body: Callable[[jax.Array, jax.Array], None],
) -> None:
    """Calls `body(index, buffer)` for every tile of a grid step once its copy has landed.

    Args:
      step: place along the innermost grid axis, which must run in order; `num_steps` its length.
      count_of: how many tiles a step visits.
      copies: the asynchronous copies of tile `index` of a step into a buffer: (step, index, buffer) -> copies.
      serial_ref: one int32 of scalar memory that keeps, from step to step, the number of tiles so far.
    """
    count = count_of(step)

    def start(step, index, serial):
        for copy in copies(step, index, lax.rem(serial, BUFFERS)):
            copy.start()

    def start_next_step(serial):
        @pl.when(step + 1 < num_steps)
        def _():
            pl.when(count_of(step + 1) > 0)(lambda: start(step + 1, 0, serial))

    @pl.when(step == 0)
    def _():
        serial_ref[0] = 0
        pl.when(count > 0)(lambda: start(step, 0, 0))

    begin = serial_ref[0]

    @pl.loop(0, count)
    def _(index):
        serial = begin + index
        pl.when(index + 1 < count)(lambda: start(step, index + 1, serial + 1))
        pl.when(index + 1 == count)(lambda: start_next_step(serial + 1))
        buffer = lax.rem(serial, BUFFERS)
        for copy in copies(step, index, buffer):
            copy.wait()
        body(index, buffer)

    pl.when(count == 0)(lambda: start_next_step(begin))
    serial_ref[0] = begin + count
