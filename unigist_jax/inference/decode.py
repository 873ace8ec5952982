"""Decoding that evicts every r tokens: one raw a step, and the gist that it may complete, in one static shape.

Axis legend
  B  batch      Q = 2 positions a step: the new raw and its unit's gist      G  gist slots      W  ring slots
  V  vocabulary

Each step runs the gist of the unit in progress beside the new raw. Only when the raw completes its unit is that gist
ever seen; until then each step rewrites its slot. So sequences of any phase share one compiled step, nothing branches,
and the raw of unit u - k - 1 is overwritten by unit u's: compression every r tokens.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from unigist_jax.inference.cache import GistCache, LayerKV
from unigist_jax.inference.gists import write_step
from unigist_jax.model import Llama
from unigist_jax.model.attention import step_attention
from unigist_jax.model.layers import rotary
from unigist_jax.rows import set_slots


def decode_logits(model: Llama, cache: GistCache, tokens: Int32[Array, " B"]) -> tuple[Float[Array, "B V"], GistCache]:
    """`decode_step` before compilation, for use inside a larger jitted function."""
    layout = cache.layout
    raw_index = cache.length
    if tokens.shape != raw_index.shape:
        raise ValueError(f"tokens of shape {tokens.shape} for a cache of {raw_index.shape[0]} sequences; give each one")
    unit = raw_index // layout.ratio
    positions = layout.num_sinks + jnp.stack([raw_index, (unit + 1) * layout.ratio], axis=1)
    angles = rotary(model.config, positions)
    x = jnp.concatenate([model.embed(tokens[:, None]), model.embed_gists(tokens.shape[0], 1)], axis=1)
    layers = []
    for index in range(model.config.num_layers):

        def attend(q, k, v, index=index):
            old = cache.layers[index]
            slot = raw_index % old.raw_k.shape[1]
            raw_k, raw_v = set_slots(old.raw_k, slot, k[:, 0]), set_slots(old.raw_v, slot, v[:, 0])
            gist_k, all_gist_k = write_step(old.gist_k, k[:, 1], unit)
            gist_v, all_gist_v = write_step(old.gist_v, v[:, 1], unit)
            kv = cache.layer_kv(index, all_gist_k, all_gist_v, raw_k, raw_v)
            out = step_attention(q, kv, layout, raw_index, model.config.attention_backend)
            return out, LayerKV(gist_k, gist_v, raw_k, raw_v)

        x, layer_kv = model.layer(index)(x, angles, attend)
        layers.append(layer_kv)
    logits = model.logits(x[:, :1])[:, 0]
    return logits, GistCache(cache.sinks, tuple(layers), cache.length + 1, layout)


@partial(jax.jit, donate_argnames=("cache",))
def decode_step(model: Llama, cache: GistCache, tokens: Int32[Array, " B"]) -> tuple[Float[Array, "B V"], GistCache]:
    """Appends one raw token to every sequence.

    Args:
      model: the model that filled the cache.
      cache: the cache; donated. Every sequence must hold fewer raws than `cache.capacity`: a full one would lose a gist
        (`generate` checks this before it starts).
      tokens: the new raw of each sequence.

    Returns:
      float32 logits of the next token, and the cache.
    """
    return decode_logits(model, cache, tokens)
