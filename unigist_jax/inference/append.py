"""Reading further tokens, a question say, behind what a cache already holds.

Axis legend
  B  batch      N  slots of the padded tokens      V  vocabulary

Gist caches read them in chunks, as prefill does, where all sequences are in the same unit: many questions on one
document. Otherwise they go token by token. Every cache is a frozen pytree with `length` [B], and decoding writes at
index `length` only. So a sequence whose tokens are used up is frozen by keeping its `length`: what further steps write
there is rewritten before anything sees it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from unigist_jax.inference.methods import Method
from unigist_jax.model import Llama
from unigist_jax.prompts import check_prompts, pad_prompts


def append(
    method: Method, model: Llama, cache: Any, token_lists: Sequence[Sequence[int]]
) -> tuple[Float[Array, "B V"], Any]:
    """Reads B token lists of any lengths, each behind its sequence: in chunks where the method can, else step by step.

    Args:
      method: the method that filled the cache.
      model: the model that filled it.
      cache: holds B sequences; donated.
      token_lists: at least one token for each.

    Returns:
      float32 logits after each list's last token, and the cache.

    Raises:
      ValueError: for an empty list, a token outside the vocabulary, another number of lists than sequences, or more
        tokens than the cache has room for; before anything is computed.
    """
    counts = check_prompts(token_lists, model.config.vocab_size, None)
    held = np.asarray(cache.length)
    if len(held) != len(counts):
        raise ValueError(
            f"{len(counts)} token lists for a cache of {len(held)} sequences; take its sequences with "
            "`cache.select(rows)` first"
        )
    check_room(held + counts, cache.capacity)
    if method.extend is not None and len(set(held // cache.layout.ratio)) == 1:
        return method.extend(model, cache, token_lists)
    slots = 1 << int(counts.max() - 1).bit_length()  # few sizes, each compiled once
    return _append(method, model, cache, jnp.asarray(pad_prompts(token_lists, slots)), jnp.asarray(counts))


def check_room(needed: Int32[np.ndarray, " B"], capacity: int) -> None:
    """Raises ValueError if a sequence would need more than `capacity` raws, naming both and the remedy."""
    if needed.max() > capacity:
        raise ValueError(
            f"sequence {needed.argmax()} would hold {needed.max()} tokens, but the cache has room for {capacity}; "
            "make it with a larger capacity or let it grow (`cache.grow`)"
        )


def keep_length(cache: Any, held: Any, active: Bool[Array, " B"]) -> Any:
    """`cache`, one step after `held`, with the sequences that are not active frozen."""
    return dataclasses.replace(cache, length=jnp.where(active, cache.length, held.length))


@partial(jax.jit, static_argnames=("method",), donate_argnames=("cache",))
def _append(method: Method, model: Llama, cache: Any, tokens: Int32[Array, "B N"], counts: Int32[Array, " B"]):
    def step(state):
        index, logits, held = state
        new, cache = method.decode_logits(model, held, tokens[:, index])
        active = index < counts
        return index + 1, jnp.where(active[:, None], new, logits), keep_length(cache, held, active)

    logits = jnp.zeros((tokens.shape[0], model.config.vocab_size), jnp.float32)
    _, logits, cache = jax.lax.while_loop(lambda state: state[0] < counts.max(), step, (jnp.int32(0), logits, cache))
    return logits, cache
