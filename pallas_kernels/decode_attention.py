"""The public op of decoding: one raw and the gist it may complete, against the compressed cache, read in place.

Axis legend
  B   batch                      Hq  query heads, Hkv  KV heads, D  head dim
  Q   2 queries a sequence: the new raw, and the gist of its unit
  s   sinks, G  gist slots of the cache, W  slots of the raw ring, W = (k + 1) * r

The raw ring: raw i lives in slot i mod W. While unit u is in progress, it and the k units before it fill the ring; the
slots after the newest raw still hold raws of unit u - k - 1, which left the window, and are masked.

  slots (r = 2, k = 2, W = 6), newest raw i = 8 in unit 4:   [ x6 x7 | x8 x3 | x4 x5 ]     x3 is masked
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.gist_attention import GistKV, require_hopper
from pallas_kernels.reference import masked_attention
from unigist_jax.layout import GistLayout

BACKENDS = ("hopper", "reference")


def ring_raw_index(newest: Int32[Array, " B"], slots: int) -> Int32[Array, "B W"]:
    """Index of the raw that each ring slot holds when `newest` is the newest raw; negative: never written."""
    slot = jnp.arange(slots, dtype=jnp.int32)
    return newest[:, None] - (newest[:, None] - slot) % slots


def decode_mask(
    layout: GistLayout, num_sinks: int, num_gists: int, slots: int, raw_index: Int32[Array, " B"]
) -> Bool[Array, "B 2 K"]:
    """What the new raw (row 0) and its unit's gist (row 1) see; keys in the order sinks, gists, ring slots."""
    unit = (raw_index // layout.ratio)[:, None]
    gist = jnp.arange(num_gists)
    held = ring_raw_index(raw_index, slots)
    raws = held >= jnp.maximum(0, unit - layout.window_units) * layout.ratio
    sinks = jnp.ones((raw_index.shape[0], num_sinks), bool)
    rows = [jnp.concatenate([sinks, gists, raws], axis=-1) for gists in (gist < unit, gist <= unit)]
    return jnp.stack(rows, axis=1)


def decode_attention(
    q: Float[Array, "B 2 Hq D"],
    kv: GistKV,
    layout: GistLayout,
    raw_index: Int32[Array, " B"],
    backend: str | None = None,
) -> Float[Array, "B 2 Hq D"]:
    """One decoding step of gist attention for sequences of different lengths.

    Args:
      q: the new raw's query and the query of its unit's gist, already rotated. The gist's row means something only
        where the raw completes its unit.
      kv: the cache with the step's own keys and values already written: gists [B, G, Hkv, D] with the step's gist at
        `raw_index // r`, and the raw ring [B, W, Hkv, D] with the new raw at `raw_index % W`, W = (k + 1) * r.
      layout: ratio, sinks and window.
      raw_index: int32 [B], index of the new raw in its sequence.
      backend: "reference" (XLA, float32, any device), "hopper" (compute capability 9.x), or None for "reference".

    Returns:
      [B, 2, Hq, D] in q's dtype.

    Raises:
      ValueError: for an unknown backend, one that cannot run here, or a ring of another size than the layout's.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"unknown decode backend {backend!r}; choose one of {sorted(BACKENDS)} or None")
    slots = (layout.window_units + 1) * layout.ratio
    if kv.raw_k.shape[1] != slots:
        raise ValueError(f"the raw ring has {kv.raw_k.shape[1]} slots; {layout} needs window + ratio = {slots}")
    if backend == "hopper":
        require_hopper()
        from pallas_kernels.hopper.decode import decode_attention_hopper

        with jax.named_scope("decode_attention_hopper"):
            return decode_attention_hopper(q, kv, layout, raw_index)
    mask = decode_mask(layout, kv.sink_k.shape[0], kv.gist_k.shape[1], slots, raw_index)

    def keys(sinks, gists, raws):
        return jnp.concatenate([jnp.broadcast_to(sinks, (q.shape[0], *sinks.shape)), gists, raws], axis=1)

    with jax.named_scope("decode_attention_reference"):
        return masked_attention(q, keys(kv.sink_k, kv.gist_k, kv.raw_k), keys(kv.sink_v, kv.gist_v, kv.raw_v), mask)
