"""What the kernels compute and move, counted in closed form: XLA sees a kernel as one opaque call and is told this.

Axis legend: see plan.py.

Counted is what the kernels do for one document whose segment ends where the keys end, masked parts of visited tiles
included. Packed documents and segments in the middle of a cache do less. The arithmetic is on the host, O(T / tile).
"""

from __future__ import annotations

import jax.experimental.pallas as pl
import numpy as np

from pallas_kernels.tpu.plan import KeyAxis, Segment
from unigist_jax.layout import GistLayout


def visits(layout: GistLayout, segment: Segment, axis: KeyAxis) -> int:
    """Pairs of a query tile and a key tile that one job computes."""
    r, keys, rows = layout.ratio, axis.keys, segment.rows

    def upward(x):
        return -(-x // keys)

    first_unit = axis.num_gists - segment.num_gists
    first_raw = first_unit * r + segment.num_raws - axis.num_raws
    total = 0
    for length, per_unit in ((segment.num_raws, r), (segment.num_gists, 1)):
        first = np.arange(0, length, rows)
        last = np.minimum(first + rows, length) - 1
        begin, end = first // per_unit + first_unit, last // per_unit + first_unit
        gists = upward(axis.num_sinks + end + (per_unit == 1))
        gists = np.where(end + (per_unit == 1) > 0, gists, axis.sink_tiles)
        lowest = np.maximum(np.maximum(begin - layout.window_units, 0) * r - first_raw, 0)
        highest = (end + 1) * r if per_unit == 1 else first_unit * r + last + 1
        total += int((gists + upward(highest - first_raw) - lowest // keys).sum())
    return total


def _cost(layout, segment, axis, q, k, products: int, keys_in: int, extra_bytes: int) -> pl.CostEstimate:
    """`products` matrix products a pair, of which each moves `keys_in` arrays of a key tile's size."""
    batch, jobs, _, columns, dim = q.shape
    pairs = batch * jobs * visits(layout, segment, axis)
    area = pairs * axis.keys * columns
    return pl.CostEstimate(
        flops=2 * products * area * dim,
        transcendentals=area,
        bytes_accessed=extra_bytes + pairs * keys_in * axis.keys * dim * k.dtype.itemsize,
    )


def forward_cost(layout: GistLayout, segment: Segment, axis: KeyAxis, q, k) -> pl.CostEstimate:
    """Of the forward kernel; q and k as it takes them."""
    columns = q.size // q.shape[-1]
    return _cost(layout, segment, axis, q, k, 2, 2, 2 * q.nbytes + columns * (4 + 16))


def query_cost(layout: GistLayout, segment: Segment, axis: KeyAxis, q, k) -> pl.CostEstimate:
    """Of the kernel for q's gradient: reads q, dO, two statistics and four ends a column, writes dQ."""
    columns = q.size // q.shape[-1]
    return _cost(layout, segment, axis, q, k, 3, 2, 3 * q.nbytes + columns * (8 + 16))


def key_cost(layout: GistLayout, segment: Segment, axis: KeyAxis, q, k) -> pl.CostEstimate:
    """Of the kernel for the gradients of keys and values: here query tiles stream past each key tile."""
    batch, jobs, _, columns, dim = q.shape
    pairs = batch * jobs * visits(layout, segment, axis)
    streamed = columns * (2 * dim * q.dtype.itemsize + 8 + 16)
    once = k.size * (2 * k.dtype.itemsize + 2 * 4)
    area = pairs * axis.keys * columns
    return pl.CostEstimate(flops=8 * area * dim, transcendentals=area, bytes_accessed=pairs * streamed + once)
