"""Chunked prefill: reads a prompt chunk by chunk and keeps gists and a window of raws.

Axis legend
  B  batch      C  raws of a chunk, a multiple of r      U  units of the chunk      G  gist slots      W  ring slots
  V  vocabulary E  hidden size

One chunk is one gist-shifted segment at unit `first_unit` (a traced scalar: one compilation a chunk size). Its gists go
into the cache, its queries see the cache's gists, and the raws of the k units before it come out of the ring:

  gist keys   [ cache: g0 … | the chunk's | not yet written ]      raw keys   [ ring: last k units | the chunk's ]

A batch may hold prompts of different lengths. All run through the same chunks; a sequence that has ended keeps its ring
as it was, and the gists that its padding writes are never seen: decoding rewrites slot n // r before it is visible.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import GistKV
from pallas_kernels.decode_attention import ring_raw_index
from unigist_jax.inference.cache import GistCache, LayerKV, ring_slots
from unigist_jax.layout import GistLayout, segment_positions
from unigist_jax.model import Llama
from unigist_jax.model.attention import segment_attention
from unigist_jax.model.layers import rotary
from unigist_jax.prompts import check_prompts, pad_prompts

DEFAULT_CHUNK = 2048


def default_chunk_size(layout: GistLayout) -> int:
    """The multiple of the ratio nearest below `DEFAULT_CHUNK`, at least one unit."""
    return max(1, DEFAULT_CHUNK // layout.ratio) * layout.ratio


def prefill(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    capacity: int | None = None,
    chunk_size: int | None = None,
    layout: GistLayout | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Float[Array, "B V"], GistCache]:
    """Reads prompts into a new cache.

    Args:
      model: the model.
      prompts: B token lists of any lengths, each at least 1.
      capacity: raws that each sequence may reach, generated ones included; None: the longest prompt.
      chunk_size: raws a chunk, a multiple of the ratio; None: `default_chunk_size`. It changes speed and memory only.
      layout: another ratio or window than the model's.
      progress: called after each chunk with the raws read so far.

    Returns:
      float32 logits after each prompt's last token, and the cache.

    Raises:
      ValueError: for no prompts, an empty prompt, a token outside the vocabulary, a prompt longer than the capacity, or
        a chunk size that is not a positive multiple of the ratio.
    """
    layout = model.checked_layout(layout)
    chunk_size = default_chunk_size(layout) if chunk_size is None else chunk_size
    check_chunk_size(chunk_size, layout)
    lengths = check_prompts(prompts, model.config.vocab_size, capacity)
    longest = int(lengths.max())
    cache = GistCache.create(model, len(prompts), capacity or longest, layout)
    lengths = jnp.asarray(lengths)
    ends = jnp.zeros((len(prompts), model.config.hidden_size), model.config.dtype)
    chunks = chunk_lengths(longest, chunk_size, cache.capacity, layout)
    tokens = pad_prompts(prompts, sum(chunks))
    for start, size in zip(itertools.accumulate(chunks, initial=0), chunks, strict=False):
        chunk = jnp.asarray(tokens[:, start : start + size])
        hidden, cache = prefill_chunk(model, cache, chunk, jnp.int32(start // layout.ratio), lengths)
        ends = _take_ends(ends, hidden, lengths - 1 - start)
        if progress is not None:
            progress(min(start + size, longest))
    return _logits(model, ends), cache


@partial(jax.jit, donate_argnames=("cache",))
def prefill_chunk(
    model: Llama,
    cache: GistCache,
    tokens: Int32[Array, "B C"],
    first_unit: Int32[Array, ""],
    lengths: Int32[Array, " B"],
) -> tuple[Float[Array, "B C E"], GistCache]:
    """Reads one chunk of whole units that begins at unit `first_unit`.

    Args:
      cache: holds everything before the chunk; donated.
      tokens: the chunk's raws; those at or after a sequence's length are padding.
      lengths: raws of each whole prompt.

    Returns:
      Final hidden states of the chunk's raws, before the last norm, and the cache.
    """
    layout = cache.layout
    num_raws = tokens.shape[1]
    first_raw = first_unit * layout.ratio
    angles = rotary(model.config, segment_positions(layout, layout.num_units(num_raws), first_unit))
    newest = jnp.minimum(first_raw + num_raws, lengths) - 1  # newest real raw of each sequence after this chunk
    before = (first_raw - layout.window + jnp.arange(layout.window)) % ring_slots(layout)
    x = model.embed_segment(tokens, layout)
    layers = []
    for index in range(model.config.num_layers):

        def attend(q, k, v, index=index):
            old = cache.layers[index]
            gist_k, gist_v = (
                jax.lax.dynamic_update_slice_in_dim(held, new[:, num_raws:], first_unit, axis=1)
                for held, new in ((old.gist_k, k), (old.gist_v, v))
            )
            raw_k, raw_v = k[:, :num_raws], v[:, :num_raws]
            window_k, window_v = (
                jnp.concatenate([held[:, before], new], axis=1)
                for held, new in ((old.raw_k, raw_k), (old.raw_v, raw_v))
            )
            kv = GistKV(cache.sink_k[index], cache.sink_v[index], gist_k, gist_v, window_k, window_v)
            first_raw_unit = first_unit - layout.window_units
            out = segment_attention(q, kv, layout, first_unit, first_raw_unit, backend=model.config.attention_backend)
            rings = (_into_ring(held, new, first_raw, newest) for held, new in ((old.raw_k, raw_k), (old.raw_v, raw_v)))
            return out, LayerKV(gist_k, gist_v, *rings)

        x, layer_kv = model.layer(index)(x, angles, attend)
        layers.append(layer_kv)
    return x[:, :num_raws], GistCache(cache.sink_k, cache.sink_v, tuple(layers), newest + 1, layout)


@jax.jit
def _take_ends(ends, hidden, index):
    """`ends` [B, E] with the hidden states [B, C, E] at `index` [B] filled in, where that lies in the chunk."""
    inside = (index >= 0) & (index < hidden.shape[1])
    taken = hidden[jnp.arange(hidden.shape[0]), jnp.clip(index, 0, hidden.shape[1] - 1)]
    return jnp.where(inside[:, None], taken, ends)


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
