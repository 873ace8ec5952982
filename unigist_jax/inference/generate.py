"""Generation: prompts are read, or questions behind a filled cache, then one compiled loop decodes and samples.

Axis legend
  B  batch      N  slots of a block of steps      S  stop tokens      V  vocabulary

One `while_loop` on the device takes up to N steps and ends early once every sequence has. A sequence that has drawn a
stop token is frozen (`append.py`), so a ragged batch keeps its static shapes. Tokens reach the host once a block: all
of them at the end, or some times a second where a callback wants to see them as they come. The next block is launched
before the host waits for one, so that the device never waits for the host.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Key

from unigist_jax.baselines.full_attention import FullCache
from unigist_jax.inference.append import append, check_room, keep_length
from unigist_jax.inference.cache import GistCache
from unigist_jax.inference.methods import Method, get_method
from unigist_jax.inference.sampling import Sampling, sample
from unigist_jax.layout import GistLayout
from unigist_jax.model import Llama
from unigist_jax.prompts import check_prompts

STREAM_STEPS = 8, 64  # of a block for a callback: at least (and the first), at most
STREAM_SECONDS = 0.25  # that such a block should take
_NOTHING = -1  # in place of a token of a sequence that has ended


class Generated(NamedTuple):
    """What `generate` returns.

    Attributes:
      tokens: generated tokens of each sequence, without its prompt and without the stop token.
      stopped: whether each sequence ended at a stop token (else at `max_new_tokens`).
      cache: the cache after the last step. It holds a stopped sequence whole, of any other all but the last token.
    """

    tokens: list[list[int]]
    stopped: list[bool]
    cache: GistCache | FullCache | Any


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop_tokens: Collection[int] = (),
    seed: int = 0,
    chunk_size: int | None = None,
    capacity: int | None = None,
    layout: GistLayout | None = None,
    method: str | None = None,
    cache: GistCache | FullCache | Any | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> Generated:
    """Continues prompts of any lengths, each from its own compressed cache.

    Args:
      model: the model.
      prompts: B token lists, each at least one token.
      max_new_tokens: tokens to generate for each, at least 1.
      sampling: greedy by default.
      stop_tokens: a sequence ends when it draws one of these.
      seed: of the sampling; the same seed, prompts and batch give the same tokens.
      chunk_size, layout: as for `prefill`.
      capacity: raws a sequence may hold, prompt and generated; None: what this call needs.
      method: "unigist" or a baseline's name (`unigist_jax.inference.methods`); None: by the model's `attention`.
      cache: what the prompts continue: prompt i the sequence i, or all of them the only one. Donated, unless it is one
        sequence for several prompts. Grown where it is too short; `chunk_size`, `capacity` and `layout` are its own.
      on_token: called as `on_token(sequence, token)` for every token, some steps at a time.

    Raises:
      ValueError: for a bad prompt, stop token, chunk size or method, or if prompt and new tokens exceed the capacity;
        before any work is done.
    """
    chosen = get_method(method, model)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    lengths = check_prompts(prompts, model.config.vocab_size, None)
    if outside := [token for token in stop_tokens if not 0 <= token < model.config.vocab_size]:
        raise ValueError(f"stop token {outside[0]} is outside the vocabulary 0 … {model.config.vocab_size - 1}")
    if cache is None:
        longest = int(lengths.max())
        needed = longest + max_new_tokens
        if capacity is not None and needed > capacity:
            raise ValueError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones need a cache for {needed}, but capacity "
                f"is {capacity}; raise the capacity or shorten the prompt"
            )
        capacity = capacity or needed
        logits, cache = chosen.prefill(model, prompts, capacity=capacity, chunk_size=chunk_size, layout=layout)
    else:
        cache = _with_room(cache, lengths, max_new_tokens)
        logits, cache = append(chosen, model, cache, prompts)
    return continue_from(
        model, chosen, logits, cache, max_new_tokens, sampling, stop_tokens=stop_tokens, seed=seed, on_token=on_token
    )


def _with_room(cache, lengths: np.ndarray, max_new_tokens: int):
    """The cache with a sequence for each prompt, and room for it and the new tokens."""
    if len(lengths) > 1 and len(cache.length) == 1:
        cache = cache.select([0] * len(lengths))
    if len(lengths) != len(cache.length):
        raise ValueError(
            f"{len(lengths)} prompts continue a cache of {len(cache.length)} sequences; give one prompt for each, or a "
            "cache of one sequence (`cache.select`)"
        )
    needed = np.asarray(cache.length) + lengths + max_new_tokens
    if needed.max() > cache.capacity and hasattr(cache, "grow"):
        cache = cache.grow(int(needed.max()))
    check_room(needed, cache.capacity)
    return cache


class _State(NamedTuple):
    """Between two steps: the newest token of each sequence is drawn, but not yet in the cache."""

    tokens: Int32[Array, " B"]
    ended: Bool[Array, " B"]
    cache: Any


def continue_from(
    model: Llama,
    method: Method,
    logits: Float[Array, "B V"],
    cache: GistCache | FullCache | Any,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    *,
    stop_tokens: Collection[int] = (),
    seed: int = 0,
    on_token: Callable[[int, int], None] | None = None,
) -> Generated:
    """Generates from a filled cache (donated) and the logits that follow it; the rest as for `generate`."""
    stops = np.array(sorted(stop_tokens), np.int32)
    key = jax.random.key(seed)
    tokens, ended = _first(logits, key, stops, sampling)
    outputs: list[list[int]] = [[] for _ in range(logits.shape[0])]

    def take(block: np.ndarray) -> bool:
        """Hands over a block's tokens; whether all sequences have ended."""
        for column in block.T.tolist():
            for sequence, token in enumerate(column):
                if token != _NOTHING:
                    outputs[sequence].append(token)
                    if on_token is not None:
                        on_token(sequence, token)
        return bool((block[:, -1] == _NOTHING).all())

    all_ended = take(np.where(ended, _NOTHING, tokens)[:, None])
    state, step, launched = _State(tokens, ended, cache), 1, deque()
    steps = slots = 1 << (max_new_tokens - 1).bit_length()
    if on_token is not None:
        steps, slots = STREAM_STEPS
    began = time.perf_counter()
    while launched or (step < max_new_tokens and not all_ended):
        while len(launched) < 2 and step < max_new_tokens and not all_ended:
            stop = min(step + steps, max_new_tokens)
            block, state = _steps(model, state, key, jnp.int32(step), jnp.int32(stop), stops, sampling, method, slots)
            launched.append((block, stop - step))
            step = stop
        block, count = launched.popleft()
        all_ended = take(np.asarray(block)[:, :count])
        if on_token is not None:
            now = time.perf_counter()
            steps = int(np.clip(count * STREAM_SECONDS / (now - began), *STREAM_STEPS))
            began = now
    return Generated(outputs, np.asarray(state.ended).tolist(), state.cache)


@partial(jax.jit, static_argnames=("sampling",))
def _first(logits: Float[Array, "B V"], key: Key[Array, ""], stops: Int32[Array, " S"], sampling: Sampling):
    tokens = sample(logits, sampling, jax.random.fold_in(key, 0))
    return tokens, jnp.isin(tokens, stops)


@partial(jax.jit, static_argnames=("sampling", "method", "slots"), donate_argnames=("state",))
def _steps(
    model: Llama,
    state: _State,
    key: Key[Array, ""],
    first: Int32[Array, ""],
    stop: Int32[Array, ""],
    stops: Int32[Array, " S"],
    sampling: Sampling,
    method: Method,
    slots: int,
) -> tuple[Int32[Array, "B N"], _State]:
    """Decoding steps `first … stop - 1`, at most `slots`: the tokens drawn, and what comes after."""

    def unfinished(carry):
        step, _, state = carry
        return (step < stop) & ~jnp.all(state.ended)

    def one(carry):
        step, block, state = carry
        logits, cache = method.decode_logits(model, state.cache, state.tokens)
        cache = keep_length(cache, state.cache, ~state.ended)
        tokens = sample(logits, sampling, jax.random.fold_in(key, step))
        ended = state.ended | jnp.isin(tokens, stops)
        block = block.at[:, step - first].set(jnp.where(ended, _NOTHING, tokens))
        return step + 1, block, _State(tokens, ended, cache)

    block = jnp.full((state.tokens.shape[0], slots), _NOTHING, jnp.int32)
    _, block, state = jax.lax.while_loop(unfinished, one, (first, block, state))
    return block, state
