"""Chunked prefill: reads a prompt chunk by chunk and keeps gists and a window of raws.

Axis legend
  B  batch      C  raws of a chunk, a multiple of r      U  units of the chunk      G  gist slots      W  ring slots
  V  vocabulary E  hidden size

One chunk is one gist-shifted segment at unit `first_unit` (a traced scalar: one compilation a chunk size). Its gists go
into the cache, its queries see the cache's gists, and the raws of the k units before it come out of the ring:

  gist keys   [ cache: g0 … | the chunk's | not yet written ]      raw keys   [ ring: last k units | the chunk's ]

A batch may hold prompts of different lengths. All run through the same chunks; a sequence that has ended keeps its ring
as it was, and the gists that its padding writes are never seen: decoding rewrites slot n // r before it is visible.

A filled cache reads on in chunks too (`extend`), from the middle of a unit: the first chunk begins with that unit, and
the keys and values of those of its raws that were read before come out of the ring.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels import GistKV
from pallas_kernels.decode_attention import ring_raw_index
from unigist_jax.inference.cache import GistCache, LayerKV, SinkKV
from unigist_jax.inference.gists import write_chunk
from unigist_jax.layout import GistLayout, segment_positions
from unigist_jax.model import Llama
from unigist_jax.model.attention import segment_attention
from unigist_jax.model.layers import rotary
from unigist_jax.model.llama import taken_layer
from unigist_jax.prompts import check_prompts, pad_prompts

# raws of all sequences in one chunk, by platform; a GPU's by the sweep in docs/benchmarks.md
CHUNK_RAWS = {"cpu": 2048, "gpu": 8192, "tpu": 4096}


def default_chunk_size(layout: GistLayout, batch: int = 1) -> int:
    """Raws a chunk: this platform's share of `CHUNK_RAWS` for each sequence, in whole units, at least one."""
    return max(1, CHUNK_RAWS.get(jax.default_backend(), 4096) // batch // layout.ratio) * layout.ratio


def prefill(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    capacity: int | None = None,
    chunk_size: int | None = None,
    layout: GistLayout | None = None,
    gist_dtype: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Float[Array, "B V"], GistCache]:
    """Reads prompts into a new cache.

    Args:
      model: the model.
      prompts: B token lists of any lengths, each at least 1.
      capacity: raws that each sequence may reach, generated ones included; None: the longest prompt.
      chunk_size: raws a chunk, a multiple of the ratio; None: `default_chunk_size`. It changes speed and memory only.
      layout: another ratio or window than the model's.
      gist_dtype: as for `GistCache.create`.
      progress: called after each chunk with the raws read so far.

    Returns:
      float32 logits after each prompt's last token, and the cache.

    Raises:
      ValueError: for no prompts, an empty prompt, a token outside the vocabulary, a prompt longer than the capacity, or
        a chunk size that is not a positive multiple of the ratio.
    """
    layout = model.checked_layout(layout)
    chunk_size = default_chunk_size(layout, max(1, len(prompts))) if chunk_size is None else chunk_size
    check_chunk_size(chunk_size, layout)
    lengths = check_prompts(prompts, model.config.vocab_size, capacity)
    cache = GistCache.create(model, len(prompts), capacity or int(lengths.max()), layout, gist_dtype)
    return _read(model, cache, prompts, 0, chunk_size, progress)


def extend(
    model: Llama, cache: GistCache, token_lists: Sequence[Sequence[int]]
) -> tuple[Float[Array, "B V"], GistCache]:
    """Reads further tokens, each list behind its sequence, in chunks.

    Args:
      model: the model that filled the cache.
      cache: holds B sequences that are all in the same unit, with room for the tokens; donated, layer by layer.
      token_lists: at least one token for each.

    Returns:
      float32 logits after each list's last token, and the cache.
    """
    held, layout = np.asarray(cache.length), cache.layout
    first_unit = int(held[0]) // layout.ratio
    begun = held - first_unit * layout.ratio  # raws of that unit: any ids do, the ring has their keys and values
    texts = [[0] * count + list(tokens) for count, tokens in zip(begun, token_lists, strict=True)]
    return _read(model, cache, texts, first_unit, default_chunk_size(layout, len(texts)))


def _read(model, cache, texts, first_unit: int, chunk_size: int, progress=None):
    """Texts that begin at unit `first_unit`, chunk by chunk: logits behind each, and the cache."""
    layout = cache.layout
    first, counts = first_unit * layout.ratio, np.array([len(text) for text in texts], np.int32)
    longest, lengths = int(counts.max()), jnp.asarray(first + counts)
    ends = jnp.zeros((len(texts), model.config.hidden_size), model.config.dtype)
    chunks = chunk_lengths(longest, chunk_size, cache.capacity - first, layout)
    tokens = pad_prompts(texts, sum(chunks))
    for start, size in zip(itertools.accumulate(chunks, initial=0), chunks, strict=False):
        chunk = jnp.asarray(tokens[:, start : start + size])
        hidden, cache = prefill_chunk(model, cache, chunk, jnp.int32(first_unit + start // layout.ratio), lengths)
        ends = _take_ends(ends, hidden, lengths - 1 - first - start)
        if progress is not None:
            progress(min(start + size, longest))
    return _logits(model, ends), cache


def prefill_chunk(
    model: Llama,
    cache: GistCache,
    tokens: Int32[Array, "B C"],
    first_unit: Int32[Array, ""],
    lengths: Int32[Array, " B"],
) -> tuple[Float[Array, "B C E"], GistCache]:
    """Reads one chunk of whole units that begins at unit `first_unit`, the one in progress of every sequence.

    One layer is compiled and called for each: that takes L times less to compile than the whole model, and no call is
    so short that launching it would show.

    Args:
      cache: holds everything before the chunk; donated, layer by layer.
      tokens: the chunk's raws; those at or after a sequence's length are padding, those that it holds already ignored.
      lengths: raws of each whole prompt.

    Returns:
      Final hidden states of the chunk's raws, before the last norm, and the cache.
    """
    x, angles, length = _enter(model, tokens, first_unit, lengths, cache.layout)
    at = _Chunk(first_unit, cache.length, length)
    layers = []
    for index, held in enumerate(zip(cache.sinks, cache.layers, strict=True)):
        layer = model.layer_arguments(index)
        x, kept = _layer(*layer, x, angles, *held, at, cache.layout, model.config.attention_backend)
        layers.append(kept)
    return _raws(x, tokens.shape[1]), GistCache(cache.sinks, tuple(layers), length, cache.layout)


class _Chunk(NamedTuple):
    """Where a chunk begins, and the raws that each sequence holds before and after it."""

    first_unit: Int32[Array, ""]
    before: Int32[Array, " B"]
    after: Int32[Array, " B"]


@partial(jax.jit, static_argnames=("layout",))
def _enter(model, tokens, first_unit, lengths, layout):
    """The embedded segment [B, P, E], its rotary angles, and each sequence's length after it."""
    num_raws = tokens.shape[1]
    angles = rotary(model.config, segment_positions(layout, layout.num_units(num_raws), first_unit))
    return model.embed_segment(tokens, layout), angles, jnp.minimum(first_unit * layout.ratio + num_raws, lengths)


@partial(jax.jit, static_argnames=("layout", "backend"), donate_argnames=("x", "held"))
def _layer(layers, index, x, angles, sinks: SinkKV, held: LayerKV, at: _Chunk, layout: GistLayout, backend: str | None):
    """The segment through one layer, and the layer's cache."""
    num_raws = layout.segment_units(x.shape[1]) * layout.ratio
    first_raw, ring = at.first_unit * layout.ratio, held.raw_k.shape[1]
    units = at.before // layout.ratio, at.after // layout.ratio
    window = (first_raw - layout.window + jnp.arange(layout.window)) % ring

    def attend(q, k, v):
        gist_k, all_gist_k = write_chunk(held.gist_k, k[:, num_raws:], at.first_unit, *units)
        gist_v, all_gist_v = write_chunk(held.gist_v, v[:, num_raws:], at.first_unit, *units)
        raw_k, raw_v = (
            _with_held(new[:, :num_raws], old, first_raw, at.before, layout.ratio)
            for new, old in ((k, held.raw_k), (v, held.raw_v))
        )
        window_k, window_v = (
            jnp.concatenate([old[:, window], new], axis=1) for old, new in ((held.raw_k, raw_k), (held.raw_v, raw_v))
        )
        kv = GistKV(*sinks, all_gist_k, all_gist_v, window_k, window_v)
        out = segment_attention(q, kv, layout, at.first_unit, at.first_unit - layout.window_units, backend=backend)
        rings = (
            _into_ring(old, new, first_raw, at.after - 1) for old, new in ((held.raw_k, raw_k), (held.raw_v, raw_v))
        )
        return out, LayerKV(gist_k, gist_v, *rings)

    return taken_layer(layers, index)(x, angles, attend)


_raws = jax.jit(lambda x, num_raws: x[:, :num_raws], static_argnums=1)


@jax.jit
def _take_ends(ends, hidden, index):
    """`ends` [B, E] with the hidden states [B, C, E] at `index` [B] filled in, where that lies in the chunk."""
    inside = (index >= 0) & (index < hidden.shape[1])
    taken = hidden[jnp.arange(hidden.shape[0]), jnp.clip(index, 0, hidden.shape[1] - 1)]
    return jnp.where(inside[:, None], taken, ends)


def _with_held(raws, ring, first_raw, before, ratio: int):
    """A chunk's raws [B, C, Hkv, D], those of its first unit that come before `before` [B] out of the ring."""
    index = first_raw + jnp.arange(ratio)
    held = index < before[:, None]
    return raws.at[:, :ratio].set(jnp.where(held[..., None, None], ring[:, index % ring.shape[1]], raws[:, :ratio]))


def _into_ring(ring, raws, first_raw, newest):
    """The ring [B, W, Hkv, D] after a chunk's raws [B, C, Hkv, D] up to index `newest` [B] of each sequence."""
    held = ring_raw_index(newest, ring.shape[1])
    source = held - first_raw
    taken = jnp.take_along_axis(raws, jnp.clip(source, 0, raws.shape[1] - 1)[:, :, None, None], axis=1)
    return jnp.where((source >= 0)[:, :, None, None], taken, ring)


@jax.jit
def _logits(model, hidden):
    return model.logits(hidden[:, None])[:, 0]


def chunk_lengths(length: int, chunk_size: int, capacity: int, layout: GistLayout) -> list[int]:
    """Raws of each chunk of a prompt: whole chunks, then the rest in whole units.

    Each size is compiled once, so the rest is rounded up to a power of two units where the cache has room for them.
    """
    whole, rest = divmod(length, chunk_size)
    chunks = [chunk_size] * whole
    if rest:
        units = -(-rest // layout.ratio)
        rounded = min(1 << (units - 1).bit_length(), chunk_size // layout.ratio)
        if whole * chunk_size + rounded * layout.ratio <= capacity:
            units = rounded
        chunks.append(units * layout.ratio)
    return chunks


def check_chunk_size(chunk_size: int, layout: GistLayout) -> None:
    """Raises ValueError unless `chunk_size` is a positive multiple of the ratio, naming the nearest legal ones."""
    if chunk_size < 1 or chunk_size % layout.ratio:
        below = max(1, chunk_size // layout.ratio) * layout.ratio
        raise ValueError(
            f"chunk size {chunk_size} is not a positive multiple of ratio={layout.ratio}; "
            f"use {below} or {below + layout.ratio}"
        )
