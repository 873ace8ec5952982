"""The compressed KV cache: a fixed-shape pytree of sinks, gists and a ring of the newest raws.

Axis legend
  B  batch      L  layers      G  gist slots      W  ring slots, W >= w + r     s  sinks
  Hkv KV heads  D  head dim

What it holds after n raws of a sequence (r = 2, w = 4, n = 9; unit 4 is in progress):

  sinks  S S S S                    shared by all sequences
  gists  g0 g1 g2 g3 |  .  .  .     one a complete unit; slot n // r is rewritten until its unit is complete
  ring   x6 x7 | x8  . | x4 x5      raw i in slot i mod W: the k units before the current one, and that one

Nothing else is kept: every r tokens cost one gist, and raws that leave the window are overwritten in place. G and W are
rounded up to what the kernels read without a copy (`pallas_kernels.decode_attention.padded_slots`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels import GistKV
from pallas_kernels.decode_attention import padded_slots
from unigist_jax.layout import GistLayout
from unigist_jax.model import Llama, LlamaConfig
from unigist_jax.rows import select_rows


class LayerKV(NamedTuple):
    """One layer's gists and raw ring, keys already rotated, in the model's compute dtype."""

    gist_k: Float[Array, "B G Hkv D"]
    gist_v: Float[Array, "B G Hkv D"]
    raw_k: Float[Array, "B W Hkv D"]
    raw_v: Float[Array, "B W Hkv D"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GistCache:
    """The KV cache of gist attention (UniGist, section on inference). Make one with `GistCache.create`.

    Attributes:
      sink_k, sink_v: keys and values of the sinks in every layer.
      layers: one `LayerKV` a layer; separate arrays, so that a step updates each in place.
      length: raws seen so far by each sequence.
      layout: static.
    """

    sink_k: Float[Array, "L s Hkv D"]
    sink_v: Float[Array, "L s Hkv D"]
    layers: tuple[LayerKV, ...]
    length: Int32[Array, " B"]
    layout: GistLayout = dataclasses.field(metadata={"static": True})

    @classmethod
    def create(cls, model: Llama, batch: int, capacity: int, layout: GistLayout | None = None) -> GistCache:
        """An empty cache for `batch` sequences of at most `capacity` raws (rounded up: `padded_slots`)."""
        layout = model.checked_layout(layout)
        if batch < 1 or capacity < 1:
            raise ValueError(f"a cache for batch={batch}, capacity={capacity}: both must be at least 1")
        sink_k, sink_v = _sink_kv(model)
        heads = (model.config.num_kv_heads, model.config.head_dim)
        slots = gist_slots(layout, capacity), ring_slots(layout)

        def layer():  # distinct buffers, so that each can be donated
            return LayerKV(*(jnp.zeros((batch, slots[i // 2], *heads), model.config.dtype) for i in range(4)))

        layers = tuple(layer() for _ in range(model.config.num_layers))
        return cls(sink_k, sink_v, layers, jnp.zeros((batch,), jnp.int32), layout)

    @property
    def capacity(self) -> int:
        """Raws that each sequence can hold."""
        return self.layers[0].gist_k.shape[1] * self.layout.ratio

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, as allocated."""
        return sum(x.nbytes for x in jax.tree.leaves((self.sink_k, self.sink_v, self.layers)))

    def select(self, rows: Sequence[int]) -> GistCache:
        """A copy that holds these sequences, in this order; repeats are allowed: many questions on one context."""
        layers, length = select_rows((self.layers, self.length), rows)
        sinks = jnp.copy(self.sink_k), jnp.copy(self.sink_v)  # either cache may be donated
        return GistCache(*sinks, layers, length, self.layout)

    def layer_kv(self, index: int) -> GistKV:
        """Everything that layer `index` attends to."""
        return GistKV(self.sink_k[index], self.sink_v[index], *self.layers[index])


_sink_kv = jax.jit(lambda model: model.sink_kv())


def gist_slots(layout: GistLayout, capacity: int) -> int:
    """Gist slots for `capacity` raws: one a unit, the one in progress included."""
    return padded_slots(-(-capacity // layout.ratio))


def ring_slots(layout: GistLayout) -> int:
    """Raw slots of a sequence: the `k` units of the window and the unit in progress."""
    return padded_slots(layout.window + layout.ratio)


def gist_cache_bytes(config: LlamaConfig, layout: GistLayout, num_raws: int, batch: int = 1) -> int:
    """Bytes of keys and values that gist attention holds for `num_raws` raws a sequence.

    `2 L Hkv D bytes (s + B (ceil(n / r) + w + r))`, the slots rounded up: it grows by gists alone, one every r raws.
    """
    tokens = layout.num_sinks + batch * (gist_slots(layout, num_raws) + ring_slots(layout))
    return tokens * _bytes_per_token(config)


def full_cache_bytes(config: LlamaConfig, num_raws: int, batch: int = 1) -> int:
    """Bytes of keys and values that full attention holds for `num_raws` raws a sequence: `2 L Hkv D bytes B n`."""
    return batch * num_raws * _bytes_per_token(config)


def _bytes_per_token(config: LlamaConfig) -> int:
    itemsize = np.dtype(jnp.dtype(config.dtype)).itemsize
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
