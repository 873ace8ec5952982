"""Generation: prefill, then one compiled step a token, with a streaming callback and stop tokens.

Axis legend
  B  batch      V  vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from unigist_jax.baselines.full_attention import FullCache
from unigist_jax.inference.cache import GistCache
from unigist_jax.inference.methods import Method, get_method
from unigist_jax.inference.sampling import Sampling, sample
from unigist_jax.layout import GistLayout
from unigist_jax.model import Llama


class Generated(NamedTuple):
    """What `generate` returns.

    Attributes:
      tokens: generated tokens of each sequence, without its prompt and without the stop token.
      stopped: whether each sequence ended at a stop token (else at `max_new_tokens`).
      cache: the cache after the last step.
    """

    tokens: list[list[int]]
    stopped: list[bool]
    cache: GistCache | FullCache


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
      on_token: called as `on_token(sequence, token)` for every token as it comes.

    Raises:
      ValueError: for a bad prompt, chunk size or method, or if prompt and new tokens exceed the capacity; before any
        work is done.
    """
    chosen = get_method(method, model)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    longest = max((len(prompt) for prompt in prompts), default=0)
    needed = longest + max_new_tokens
    if capacity is not None and needed > capacity:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones need a cache for {needed}, but capacity is "
            f"{capacity}; raise the capacity or shorten the prompt"
        )
    logits, cache = chosen.prefill(model, prompts, capacity=capacity or needed, chunk_size=chunk_size, layout=layout)
    key = jax.random.key(seed)
    tokens = _sample(logits, sampling, jax.random.fold_in(key, 0))
    stop_tokens = frozenset(stop_tokens)
    outputs: list[list[int]] = [[] for _ in prompts]
    stopped = [False] * len(prompts)
    for step in range(1, max_new_tokens + 1):
        for sequence, token in enumerate(np.asarray(tokens).tolist()):
            if stopped[sequence]:
                continue
            if token in stop_tokens:
                stopped[sequence] = True
                continue
            outputs[sequence].append(token)
            if on_token is not None:
                on_token(sequence, token)
        if all(stopped) or step == max_new_tokens:
            break
        tokens, cache = _step(model, cache, tokens, jax.random.fold_in(key, step), sampling, chosen)
    return Generated(outputs, stopped, cache)


_sample = jax.jit(sample, static_argnames=("sampling",))


@partial(jax.jit, static_argnames=("sampling", "method"), donate_argnames=("cache",))
def _step(model: Llama, cache: GistCache | FullCache, tokens, key, sampling: Sampling, method: Method):
    logits, cache = method.decode_logits(model, cache, tokens)
    return sample(logits, sampling, key), cache
