"""What the kernels do with one pair of tiles: products, scores, masks.

Axis legend
  K  keys of a key tile          C  columns of a query tile: positions of one head after another          D  head dim

Scores stand with keys along sublanes and queries along lanes, [K, C]: sums and maxima over keys are additions of whole
registers, and whatever exists once a query (maximum, sum, log-sum-exp, intervals) is a row vector that fills its lanes.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.tpu.plan import KeyAxis

MASKED = -1e9
NN, NT, TN = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))  # contracted axes: a b, a b', a' b


def dot(a: jax.Array, b: jax.Array, contract) -> jax.Array:
    """Matrix product in float32; float32 operands keep all their bits."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def scores_of(k: jax.Array, q: jax.Array) -> jax.Array:
    """Scores in base 2, float32 [K, C]."""
    return dot(k, q, NT) * (q.shape[-1] ** -0.5 * math.log2(math.e))


def mask_scores(scores: jax.Array, intervals, key_tile, axis: KeyAxis, raws: bool) -> jax.Array:
    """The scores with those of unseen keys masked.

    Args:
      intervals: a reference to int32 [4, C]: on the key axis, where gists begin and end, where raws begin and end.
      raws: whether the tile holds raws, or else sinks and gists.
    """
    first = key_tile * axis.keys
    key = lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    lo, hi = (intervals[i : i + 1] - first for i in ((2, 3) if raws else (0, 1)))
    visible = (key >= lo) & (key < hi)
    if axis.num_sinks and not raws:
        visible |= key < axis.num_sinks - first
    return jnp.where(visible, scores, MASKED)
