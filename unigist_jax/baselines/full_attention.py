"""Full attention: the method that keeps every raw. The yardstick of every compressed cache.

Axis legend
  B  batch      T  tokens read      N  token slots
  Hkv KV heads  D  head dim         E  hidden size      V  vocabulary

Prompts are read whole, one compiled layer at a time, so that attention is one causal call of the fastest kernel there
is (cuDNN's on NVIDIA GPUs) and only the feed-forward is cut into parts. A step of decoding is that of gist attention
with ratio 1 and no window: every token is its own gist, and the kernels that read a compressed cache in place read this
one too.

  gists   [ x0 x1 … x(i-1) ]   and the new token in a ring of one slot   [ xi ]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import GistKV
from unigist_jax.layout import GistLayout
from unigist_jax.model import Llama
from unigist_jax.model.attention import full_attention, step_attention
from unigist_jax.model.layers import rotary
from unigist_jax.model.llama import taken_layer
from unigist_jax.pages import token_slots
from unigist_jax.prompts import check_prompts, pad_prompts
from unigist_jax.rows import select_rows, set_slots
from unigist_jax.sharding import constrain

MLP_ROWS = 16_384  # rows of hidden states that the feed-forward takes at once
EVERY_TOKEN = GistLayout(ratio=1, num_sinks=0, window=0)


class TokenKV(NamedTuple):
    """One layer's keys (rotated) and values."""

    k: Float[Array, "B N Hkv D"]
    v: Float[Array, "B N Hkv D"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FullCache:
    """Keys and values of every token in every layer, and the tokens seen by each sequence."""

    layers: tuple[TokenKV, ...]
    length: Int32[Array, " B"]

    @property
    def capacity(self) -> int:
        """Raws that each sequence can hold."""
        return self.layers[0].k.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, as allocated."""
        return sum(x.nbytes for x in jax.tree.leaves(self.layers))

    def select(self, rows: Sequence[int]) -> FullCache:
        """A copy that holds these sequences, in this order; repeats are allowed."""
        return FullCache(*select_rows((self.layers, self.length), rows))

    def grow(self, capacity: int) -> FullCache:
        """The same sequences with room for at least `capacity` raws each. Consumes this cache, layer by layer."""
        slots = token_slots(capacity)
        if slots <= self.capacity:
            return self
        layers = []
        for old in self.layers:
            layers.append(_with_slots(old, slots))
            for x in old:
                x.delete()
        return FullCache(tuple(layers), self.length)


def prefill(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    capacity: int | None = None,
    chunk_size: int | None = None,
    layout: GistLayout | None = None,
) -> tuple[Float[Array, "B V"], FullCache]:
    """Reads prompts in one pass; arguments and errors as for `unigist_jax.inference.prefill`.

    `chunk_size` and `layout` mean nothing here: nothing is compressed.
    """
    lengths = check_prompts(prompts, model.config.vocab_size, capacity)
    longest = int(lengths.max())
    lengths = jnp.asarray(lengths)
    slots = token_slots(capacity or longest)
    x, angles = _enter(model, jnp.asarray(pad_prompts(prompts, token_slots(longest))))
    layers = []
    for index in range(model.config.num_layers):
        x, held = _layer(*model.layer_arguments(index), x, angles, slots)
        layers.append(held)
    return _last_logits(model, x, lengths), FullCache(tuple(layers), lengths)


@jax.jit
def _enter(model, tokens):
    return model.embed(tokens), rotary(model.config, jnp.arange(tokens.shape[1]))


@partial(jax.jit, static_argnames=("slots",), donate_argnames=("x",))
def _layer(layers, index, x: Float[Array, "B T E"], angles, slots: int):
    """The prompts through one layer, and its cache. Slots behind a prompt's end are written before they are seen."""

    def attend(q, k, v):
        return full_attention(q, k, v, None), _with_slots(TokenKV(k, v), slots)

    return taken_layer(layers, index)(x, angles, attend, _mlp_parts(*x.shape[:2]))


def _mlp_parts(batch: int, tokens: int) -> int:
    """Parts, a power of two that divides `tokens`, of at most `MLP_ROWS` rows in all sequences where there are any."""
    parts = 1
    while batch * tokens > parts * MLP_ROWS and tokens % (2 * parts) == 0:
        parts *= 2
    return parts


@partial(jax.jit, static_argnames=("slots",))
def _with_slots(kv: TokenKV, slots: int) -> TokenKV:
    padded = (jnp.pad(x, [(0, 0), (0, slots - x.shape[1]), (0, 0), (0, 0)]) for x in kv)
    return TokenKV(*(constrain(x, "batch", None, "heads", None) for x in padded))


@jax.jit
def _last_logits(model, x, lengths):
    return model.logits(jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1))[:, 0]


def decode_logits(model: Llama, cache: FullCache, tokens: Int32[Array, " B"]) -> tuple[Float[Array, "B V"], FullCache]:
    """Appends one token to every sequence; float32 logits of the next one."""
    index_of = cache.length
    angles = rotary(model.config, index_of[:, None])
    x, layers = model.embed(tokens[:, None]), []
    for index, held in enumerate(cache.layers):

        def attend(q, k, v, held=held):
            new = TokenKV(set_slots(held.k, index_of, k[:, 0]), set_slots(held.v, index_of, v[:, 0]))
            no_sinks = jnp.zeros((0, *k.shape[2:]), k.dtype)
            kv = GistKV(no_sinks, no_sinks, *new, k, v)
            pair = jnp.concatenate([q, q], axis=1)  # the op's second row, that of the token's gist, is not needed
            return step_attention(pair, kv, EVERY_TOKEN, index_of, model.config.attention_backend)[:, :1], new

        x, kv = model.layer(index)(x, angles, attend)
        layers.append(kv)
    return model.logits(x)[:, 0], FullCache(tuple(layers), cache.length + 1)
