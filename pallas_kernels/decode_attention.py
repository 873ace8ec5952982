"""The public op of decoding: one raw and the gist it may complete, against the compressed cache, read in place.

Axis legend
  B   batch                      Hq  query heads, Hkv  KV heads, D  head dim
  Q   2 queries a sequence: the new raw, and the gist of its unit
  s   sinks, G  gist slots of the cache, W  slots of the raw ring, W >= (k + 1) * r

The raw ring: raw i lives in slot i mod W. While unit u is in progress, the ring holds it and the k units before
it; the other slots hold raws that left the window, and are masked.

  slots (r = 2, k = 2, W = 6), newest raw i = 8 in unit 4:   [ x6 x7 | x8 x3 | x4 x5 ]     x3 is masked
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.backends import choose
from pallas_kernels.gist_attention import GistKV, check_kv
from unigist_jax.layout import GistLayout

SLOT_MULTIPLE = 8  # keys that Hopper's copy engine moves together


def padded_slots(count: int) -> int:
    """Slots to allocate for `count` gists or raws, so that no backend has to copy the cache (`decode_attention`)."""
    return -(-count // SLOT_MULTIPLE) * SLOT_MULTIPLE


def ring_raw_index(newest: Int32[Array, " B"], slots: int) -> Int32[Array, "B W"]:
    """Index of the raw that each ring slot holds when `newest` is the newest raw; negative: never written."""
    slot = jnp.arange(slots, dtype=jnp.int32)
    return newest[:, None] - (newest[:, None] - slot) % slots


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
        `raw_index // r`, and the raw ring [B, W, Hkv, D] with the new raw at `raw_index % W`, W >= (k + 1) * r. Where
        G and W are multiples of `SLOT_MULTIPLE`, every backend reads the cache in place; the Hopper kernel would copy
        others to a padded array at every step.
      layout: ratio, sinks and window.
      raw_index: int32 [B], index of the new raw in its sequence.
      backend: a name in `pallas_kernels.backends.BACKENDS`, or None for the first that can.

    Returns:
      [B, 2, Hq, D] in q's dtype.

    Raises:
      ValueError: for shapes that do not fit each other or the layout, a ring that cannot hold the layout's window, an
        unknown backend, or one that cannot run here.
    """
    check_kv(q, kv, layout)
    if q.shape[1] != 2 or raw_index.shape != q.shape[:1] or not jnp.issubdtype(raw_index.dtype, jnp.integer):
        raise ValueError(
            f"q has shape {q.shape} and raw_index shape {raw_index.shape} and dtype {raw_index.dtype}, expected two "
            "queries, the raw's and its gist's, and one integer a sequence"
        )
    slots = layout.window + layout.ratio
    if kv.raw_k.shape[1] < slots:
        raise ValueError(f"the raw ring has {kv.raw_k.shape[1]} slots; {layout} needs window + ratio = {slots}")
    name, module = choose(backend, q, kv, layout, decode=True)
    with jax.named_scope(f"decode_attention_{name}"):
        return _shared(module.decode, layout, q, kv, raw_index)


@partial(jax.jit, static_argnums=(0, 1))
def _shared(decode: Callable, layout: GistLayout, q, kv: GistKV, raw_index):
    """`decode`, traced and lowered once for all layers of a step, whose arguments are all of the same shapes."""
    return decode(q, kv, layout, raw_index)
