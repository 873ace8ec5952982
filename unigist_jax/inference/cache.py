"""The compressed KV cache: a fixed-shape pytree of sinks, gists and a ring of the newest raws.

Axis legend
  B  batch      L  layers      G  gist slots, whole pages      W  ring slots, W >= w + r      s  sinks
  Hkv KV heads  D  head dim

What it holds after n raws of a sequence (r = 2, w = 4, n = 9; unit 4 is in progress):

  sinks  S S S S                    shared by all sequences
  gists  g0 g1 g2 g3 |  .  .  .     one a complete unit; slot n // r is rewritten until its unit is complete
  ring   x8  . | .  . | x4 x5 | x6 x7   raw i in slot i mod W: the k units before the current one, and that one

Nothing else is kept: every r tokens cost one gist, and raws that leave the window are overwritten in place. G and W are
rounded up (pages.py, and `padded_slots`), so that kernels read them without a copy and few programs are compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels import GistKV
from pallas_kernels.decode_attention import padded_slots
from unigist_jax.inference.gists import Gists, QuantizedGists, check_gist_dtype, empty_gists, num_slots, with_slots
from unigist_jax.layout import GistLayout, sink_positions
from unigist_jax.model import Llama, LlamaConfig
from unigist_jax.model.attention import sink_attention
from unigist_jax.model.layers import rotary
from unigist_jax.model.llama import taken_layer
from unigist_jax.pages import PAGE, gist_slots, token_slots
from unigist_jax.rows import select_rows
from unigist_jax.sharding import constrain


class SinkKV(NamedTuple):
    """One layer's sinks."""

    k: Float[Array, "s Hkv D"]
    v: Float[Array, "s Hkv D"]


class LayerKV(NamedTuple):
    """One layer's gists and raw ring, keys already rotated, in the model's compute dtype unless quantised."""

    gist_k: Gists
    gist_v: Gists
    raw_k: Float[Array, "B W Hkv D"]
    raw_v: Float[Array, "B W Hkv D"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GistCache:
    """The KV cache of gist attention (UniGist, section on inference). Make one with `GistCache.create`.

    Attributes:
      sinks: keys and values of the sinks, one `SinkKV` a layer.
      layers: one `LayerKV` a layer; separate arrays, so that a step updates each in place.
      length: raws seen so far by each sequence.
      layout: static.
    """

    sinks: tuple[SinkKV, ...]
    layers: tuple[LayerKV, ...]
    length: Int32[Array, " B"]
    layout: GistLayout = dataclasses.field(metadata={"static": True})

    @classmethod
    def create(
        cls,
        model: Llama,
        batch: int,
        capacity: int,
        layout: GistLayout | None = None,
        gist_dtype: str | None = None,
    ) -> GistCache:
        """An empty cache for `batch` sequences of at least `capacity` raws: whole pages of gists (pages.py).

        Args:
          gist_dtype: "int8" or "float8_e4m3fn" stores gists rounded (gists.py); None in the model's compute dtype.
        """
        layout = model.checked_layout(layout)
        check_gist_dtype(gist_dtype)
        if batch < 1 or capacity < 1:
            raise ValueError(f"a cache for batch={batch}, capacity={capacity}: both must be at least 1")
        slots = gist_slots(layout, capacity), ring_slots(layout)
        empty = partial(_empty_layer, model.config, batch, *slots, gist_dtype)
        layers = tuple(empty() for _ in range(model.config.num_layers))
        return cls(_sink_kv(model), layers, jnp.zeros((batch,), jnp.int32), layout)

    @property
    def capacity(self) -> int:
        """Raws that each sequence can hold."""
        return num_slots(self.layers[0].gist_k) * self.layout.ratio

    @property
    def gist_dtype(self) -> str | None:
        """What gists are rounded to; None: they are in the compute dtype."""
        gists = self.layers[0].gist_k
        return str(gists.values.dtype) if isinstance(gists, QuantizedGists) else None

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, as allocated."""
        return sum(x.nbytes for x in jax.tree.leaves((self.sinks, self.layers)))

    def select(self, rows: Sequence[int]) -> GistCache:
        """A copy that holds these sequences, in this order; repeats are allowed: many questions on one context."""
        layers, length = select_rows((self.layers, self.length), rows)
        return GistCache(jax.tree.map(jnp.copy, self.sinks), layers, length, self.layout)  # either may be donated

    def grow(self, capacity: int) -> GistCache:
        """The same sequences with room for at least `capacity` raws each.

        Consumes this cache: each layer is freed as soon as it is copied, so that no two caches are held at once.
        """
        slots = gist_slots(self.layout, capacity)
        if slots * self.layout.ratio <= self.capacity:
            return self
        layers = []
        for old in self.layers:
            grown = _with_slots((old.gist_k, old.gist_v), slots)
            layers.append(LayerKV(*grown, old.raw_k, old.raw_v))
            for before, after in zip(*map(jax.tree.leaves, (old[:2], grown)), strict=True):
                if before.shape != after.shape:
                    before.delete()
        return dataclasses.replace(self, layers=tuple(layers))

    def layer_kv(self, index: int, gist_k: Array, gist_v: Array, raw_k: Array, raw_v: Array) -> GistKV:
        """What layer `index` attends to: its sinks beside these gists and raws."""
        return GistKV(*self.sinks[index], gist_k, gist_v, raw_k, raw_v)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _empty_layer(config: LlamaConfig, batch: int, gist_slots: int, ring_slots: int, gist_dtype: str | None) -> LayerKV:
    heads = config.num_kv_heads, config.head_dim

    def gists():
        return empty_gists(batch, gist_slots, *heads, config.dtype, gist_dtype)

    def ring():
        return constrain(jnp.zeros((batch, ring_slots, *heads), config.dtype), "batch", None, "heads", None)

    return LayerKV(gists(), gists(), ring(), ring())


def _sink_kv(model: Llama) -> tuple[SinkKV, ...]:
    """Keys and values of the sinks in every layer: the same for every sequence."""
    sinks, kv = model.embed_sinks(), []
    for index in range(model.config.num_layers):
        sinks, layer_kv = _sink_layer(*model.layer_arguments(index), sinks, model.config, model.layout)
        kv.append(layer_kv)
    return tuple(kv)


@partial(jax.jit, static_argnames=("config", "layout"))
def _sink_layer(layers, index, sinks: Float[Array, "1 s E"], config: LlamaConfig, layout: GistLayout):
    angles = rotary(config, sink_positions(layout))
    return taken_layer(layers, index)(sinks, angles, lambda q, k, v: (sink_attention(q, k, v), SinkKV(k[0], v[0])))


@partial(jax.jit, static_argnames=("slots",))
def _with_slots(gists: tuple[Gists, Gists], slots: int) -> tuple[Gists, Gists]:
    return tuple(with_slots(x, slots) for x in gists)


def ring_slots(layout: GistLayout) -> int:
    """Raw slots of a sequence: the `k` units of the window and the unit in progress, rounded up for the kernels."""
    return padded_slots(layout.window + layout.ratio)


def gist_cache_bytes(
    config: LlamaConfig, layout: GistLayout, num_raws: int, batch: int = 1, gist_dtype: str | None = None
) -> int:
    """Bytes of keys and values that gist attention allocates for `num_raws` raws a sequence.

    In the compute dtype `2 L Hkv D itemsize (s + B (G + W))` with G gist slots, whole pages of them, and W ring slots:
    it grows by one gist every r raws and never by a raw.
    """
    gists, per_head = gist_slots(layout, num_raws), 2 * config.num_layers * config.num_kv_heads
    plain = layout.num_sinks + batch * ring_slots(layout)
    if gist_dtype is None:
        return (plain + batch * gists) * _bytes_per_token(config)
    rounded = gists * config.head_dim * jnp.dtype(gist_dtype).itemsize + gists // PAGE * 4
    return (plain + batch * PAGE) * _bytes_per_token(config) + batch * per_head * rounded


def full_cache_bytes(config: LlamaConfig, num_raws: int, batch: int = 1) -> int:
    """Bytes of keys and values that full attention allocates for `num_raws` raws a sequence: `2 L Hkv D bytes B n`."""
    return batch * token_slots(num_raws) * _bytes_per_token(config)


def _bytes_per_token(config: LlamaConfig) -> int:
    itemsize = np.dtype(jnp.dtype(config.dtype)).itemsize
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
