"""StreamingLLM: the first 4 keys and the most recent ones (Xiao et al., arXiv 2309.17453).

Two forms: keys keep the positions they had, or are renumbered within the cache, as that paper does.

Axis legend
  B  batch      N  padded context      H  KV heads
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp

from unigist_jax.baselines import compressed
from unigist_jax.baselines.compressed import Policy, even_budgets

NUM_FIRST = 4


def recency(q, k, lengths):
    """Score [B, H, N]: the later the better, but the first keys before all."""
    batch, length, heads = k.shape[:3]
    position = jnp.arange(length)
    score = jnp.where(position < NUM_FIRST, 2 * length - position, position)
    return jnp.broadcast_to(score.astype(jnp.float32), (batch, heads, length))


prefill_in_place = partial(compressed.prefill, Policy(recency, even_budgets))
prefill_renumbered = partial(compressed.prefill, Policy(recency, even_budgets, renumber=True))
