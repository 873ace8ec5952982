"""What gist and sink embeddings begin as (`LlamaConfig.gist_init`).

Axis legend
  V  vocabulary      E  hidden size      n  sinks, or no axis at all for the one gist
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from unigist_jax.model.config import LlamaConfig


def initial_embeddings(
    config: LlamaConfig,
    key: Any,
    shape: tuple[int, ...],
    vocabulary_mean: Callable[[], Any],
    vocabulary_rows: Callable[[Any], Any],
) -> Float[Array, "*n E"]:
    """Initial embeddings, float32.

    Args:
      config: its `gist_init` and `gist_init_scale`.
      key: of `jax.random`.
      shape: [n, E] or [E].
      vocabulary_mean: gives the mean [E] of the vocabulary's embeddings.
      vocabulary_rows: gives the embeddings [*n, E] of tokens [*n].
    """
    if config.gist_init == "tokens":
        size, count = config.vocab_size, shape[:-1]
        tokens = jax.random.choice(key, size, count, replace=bool(count) and count[0] > size)
        return jnp.asarray(vocabulary_rows(tokens), jnp.float32)
    noise = config.gist_init_scale * jax.random.normal(key, shape)
    return noise + jnp.asarray(vocabulary_mean(), jnp.float32) if config.gist_init == "mean" else noise
