"""How likely a method finds given tokens behind what its cache holds: one compiled loop of decoding steps.

Axis legend
  B  batch      N  slots of the padded tokens      V  vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from unigist_jax.inference.append import check_room
from unigist_jax.inference.methods import Method
from unigist_jax.model import Llama
from unigist_jax.prompts import check_prompts, pad_prompts


class Scored(NamedTuple):
    """Of one sequence's tokens but the first: log probability (nats), and whether it has the highest logit."""

    log_probs: Float[np.ndarray, " n"]
    is_best: Any  # bool [n]


def score(method: Method, model: Llama, cache: Any, token_lists: Sequence[Sequence[int]]) -> list[Scored]:
    """Scores B token lists, each behind its sequence of `cache`, which is left as it is.

    The first token of a list is read but not scored: what it follows gave no logits here. Raises ValueError for an
    empty list or more tokens than the cache has room for.
    """
    counts = check_prompts(token_lists, model.config.vocab_size, None)
    check_room(np.asarray(cache.length) + counts, cache.capacity)
    slots = 1 << int(counts.max() - 1).bit_length()
    scores = _score(method, model, cache, jnp.asarray(pad_prompts(token_lists, slots)), jnp.int32(counts.max()))
    log_probs, is_best = (np.asarray(x) for x in scores)
    return [Scored(log_probs[b, : n - 1], is_best[b, : n - 1]) for b, n in enumerate(counts)]


@partial(jax.jit, static_argnames=("method",))
def _score(method: Method, model: Llama, cache: Any, tokens: Int32[Array, "B N"], steps: Int32[Array, ""]):
    """Sequences that have ended read padding on; their slots are never read again, since the cache is dropped."""

    def step(state):
        index, log_probs, is_best, cache = state
        logits, cache = method.decode_logits(model, cache, tokens[:, index])
        target = tokens[:, jnp.minimum(index + 1, tokens.shape[1] - 1)]
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), target[:, None], axis=-1)[:, 0]
        best = jnp.argmax(logits, axis=-1) == target
        return index + 1, log_probs.at[:, index].set(picked), is_best.at[:, index].set(best), cache

    state = jnp.int32(0), jnp.zeros(tokens.shape), jnp.zeros(tokens.shape, bool), cache
    _, log_probs, is_best, _ = jax.lax.while_loop(lambda state: state[0] < steps - 1, step, state)
    return log_probs, is_best
