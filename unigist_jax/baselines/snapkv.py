"""SnapKV: the keys that the last queries of the context attend to (Li et al., arXiv 2404.14469).

Axis legend
  B  batch      N  padded context      W  observing queries      H  KV heads, A query heads each
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from unigist_jax.baselines import compressed
from unigist_jax.baselines.compressed import Policy, even_budgets

WINDOW = 64  # queries that observe; their own keys are kept before all others
POOL = 5  # neighbouring keys whose weights are averaged


def observed_attention(
    q: Float[Array, "B N Hq D"], k: Float[Array, "B N H D"], lengths: Int32[Array, " B"]
) -> Float[Array, "B H N"]:
    """The weight that each context's last `WINDOW` queries give each key before them, pooled over neighbours.

    Mean over the queries and over the query heads of a KV head. The window's own keys score above 1, the newest most.
    """
    batch, length, heads, dim = k.shape
    observer = (lengths - WINDOW)[:, None] + jnp.arange(WINDOW)  # negative in contexts shorter than the window
    queries = jnp.take_along_axis(q, jnp.maximum(observer, 0)[:, :, None, None], axis=1)
    grouped = queries.reshape(batch, WINDOW, heads, -1, dim)
    scores = jnp.einsum("bwhad,bkhd->bhawk", grouped, k, preferred_element_type=jnp.float32) * dim**-0.5
    position = jnp.arange(length)
    visible = position <= jnp.maximum(observer, 0)[..., None]
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), axis=-1)
    before = position < (lengths - WINDOW)[:, None, None]
    weight = jnp.where(before, weights.mean(axis=(2, 3)), 0.0)
    padded = jnp.pad(weight, [(0, 0), (0, 0), (POOL // 2, POOL // 2)])
    pooled = sum(padded[..., i : i + length] for i in range(POOL)) / POOL
    in_window = 2.0 + position - (lengths - WINDOW)[:, None, None]
    return jnp.where(before, pooled, in_window)


prefill = partial(compressed.prefill, Policy(observed_attention, even_budgets))
