"""Full attention: the method that keeps every raw. The yardstick of every compressed cache.

Axis legend
  B  batch      N  token slots      Hkv KV heads      D  head dim      V  vocabulary
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.reference import masked_attention
from unigist_jax.layout import GistLayout
from unigist_jax.model import Llama
from unigist_jax.model.attention import full_attention
from unigist_jax.model.layers import rotary
from unigist_jax.prompts import check_prompts, pad_prompts
from unigist_jax.rows import select_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FullCache:
    """Keys (rotated) and values of every token in every layer, and the tokens seen by each sequence."""

    layers: tuple[tuple[Float[Array, "B N Hkv D"], Float[Array, "B N Hkv D"]], ...]
    length: Int32[Array, " B"]

    @property
    def capacity(self) -> int:
        return self.layers[0][0].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(self.layers))

    def select(self, rows: Sequence[int]) -> FullCache:
        """A copy that holds these sequences, in this order; repeats are allowed."""
        return FullCache(*select_rows((self.layers, self.length), rows))


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
    tokens = pad_prompts(prompts, capacity or int(lengths.max()))
    return _one_pass(model, jnp.asarray(tokens), jnp.asarray(lengths))


@jax.jit
def _one_pass(model, tokens, lengths):
    """Keys of the slots after a prompt's end are garbage that decoding overwrites before it sees them."""
    angles = rotary(model.config, jnp.arange(tokens.shape[1]))
    begin = jnp.zeros_like(tokens)
    x, layers = model.embed(tokens), []
    for index in range(model.config.num_layers):
        x, kv = model.layer(index)(x, angles, lambda q, k, v: (full_attention(q, k, v, begin), (k, v)))
        layers.append(kv)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    return model.logits(last)[:, 0], FullCache(tuple(layers), lengths)


def decode_logits(model: Llama, cache: FullCache, tokens: Int32[Array, " B"]) -> tuple[Float[Array, "B V"], FullCache]:
    """Appends one token to every sequence; float32 logits of the next one."""
    rows, index_of = jnp.arange(tokens.shape[0]), cache.length
    angles = rotary(model.config, index_of[:, None])
    visible = (jnp.arange(cache.capacity) <= index_of[:, None])[:, None]
    x, layers = model.embed(tokens[:, None]), []
    for index, (held_k, held_v) in enumerate(cache.layers):

        def attend(q, k, v, held_k=held_k, held_v=held_v):
            held_k, held_v = held_k.at[rows, index_of].set(k[:, 0]), held_v.at[rows, index_of].set(v[:, 0])
            return masked_attention(q, held_k, held_v, visible), (held_k, held_v)

        x, kv = model.layer(index)(x, angles, attend)
        layers.append(kv)
    return model.logits(x)[:, 0], FullCache(tuple(layers), cache.length + 1)
