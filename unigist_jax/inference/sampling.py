"""Choosing the next token from logits: greedy, temperature, top-k, top-p.

Axis legend
  B  batch      V  vocabulary
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Frozen and hashable: static under `jax.jit`.

    Attributes:
      temperature: 0 takes the most likely token; above 0 divides the logits.
      top_k: keeps the k most likely tokens; 0 keeps all.
      top_p: keeps the fewest tokens whose probabilities reach top_p; 1 keeps all.

    Raises:
      ValueError: naming the field, its value and its bounds.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be a number of at least 0 (0 is greedy)")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be at least 0 (0 keeps all tokens)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1 (1 keeps all tokens)")


def filtered_logits(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits after temperature, top-k and then top-p; dropped tokens are -inf. Needs temperature > 0."""
    logits = logits / sampling.temperature
    vocab = logits.shape[-1]
    if 0 < sampling.top_k < vocab:
        kept, _ = jax.lax.top_k(logits, sampling.top_k)
        logits = jnp.where(logits < kept[:, -1:], -jnp.inf, logits)
    if sampling.top_p < 1:
        order = jnp.argsort(-logits, axis=-1)
        probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        keep = jnp.take_along_axis(before < sampling.top_p, jnp.argsort(order, axis=-1), axis=-1)
        logits = jnp.where(keep, logits, -jnp.inf)
    return logits


def sample(logits: Float[Array, "B V"], sampling: Sampling, key: Key[Array, ""]) -> Int32[Array, " B"]:
    """The next token of each sequence."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, filtered_logits(logits, sampling), axis=-1).astype(jnp.int32)
