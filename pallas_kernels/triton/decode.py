"""The decoding step of the Triton backend: its limits and its launches.

Axis legend
  B   batch                 Hq  query heads, Hkv  KV heads, A = Hq / Hkv, D  head dim
  G   gist slots, W  slots of the raw ring (see `pallas_kernels.decode_attention`), s  sinks
  I   rows of a program, C  splits (decode_kernel.py)
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.triton.blocks import DECODE, DecodeBlocks
from pallas_kernels.triton.call import launch
from pallas_kernels.triton.decode_kernel import decode_kernel, merge_kernel
from pallas_kernels.triton.op import refusal
from unigist_jax.layout import GistLayout

MAX_GROUP = 64
PROGRAMS = 512  # that keep enough reads in flight: about four a multiprocessor
MAX_SPLITS = 64


def decode_refusal(q, kv, layout: GistLayout) -> str | None:
    """Why the decoding kernel does not take these arguments; None if it does."""
    group = q.shape[2] // kv.gist_k.shape[2]
    if group > MAX_GROUP:
        return f"decodes at most {MAX_GROUP} query heads per KV head, got {group}"
    return refusal(q, kv, layout)


def choose_splits(pairs: int, num_tiles: int) -> int:
    """Splits of the key tiles of each of `pairs` of sequence and KV head; at least 2 key tiles a split."""
    return max(1, min(-(-PROGRAMS // pairs), MAX_SPLITS, num_tiles // 2))


def decode(
    q: Float[Array, "B 2 Hq D"],
    kv,
    layout: GistLayout,
    raw_index: Int32[Array, " B"],
    blocks: DecodeBlocks = DECODE,
) -> Float[Array, "B 2 Hq D"]:
    """Triton form of `pallas_kernels.decode_attention.decode_attention`; same arguments."""
    batch, _, num_heads, dim = q.shape
    num_gists, kv_heads, slots = kv.gist_k.shape[1], kv.gist_k.shape[2], kv.raw_k.shape[1]
    group = num_heads // kv_heads
    rows = max(16, 1 << (2 * group - 1).bit_length())
    parts = choose_splits(batch * kv_heads, sum(-(-n // blocks.keys) for n in (layout.num_sinks, num_gists, slots)))
    keys = kv if layout.num_sinks else kv._replace(sink_k=kv.gist_k, sink_v=kv.gist_v)  # a pointer that none reads
    shape = parts, batch, kv_heads, rows
    partial = [jax.ShapeDtypeStruct(x, jnp.float32) for x in ((*shape, dim), shape)]
    sizes = layout.num_sinks, num_gists, slots, kv_heads, layout.window_units
    constants = {"GROUP": group, "DIM": dim, "ROWS": rows}
    out, lse = launch(
        decode_kernel,
        (kv_heads, parts, batch),
        (q, *keys, raw_index.astype(jnp.int32), *sizes),
        partial,
        warps=blocks.warps,
        stages=blocks.stages,
        RATIO=layout.ratio,
        SCALE=dim**-0.5 * math.log2(math.e),
        KEYS=blocks.keys,
        **constants,
    )
    (merged,) = launch(
        merge_kernel,
        (2 * group, kv_heads, batch),
        (out, lse, kv_heads, parts),
        (q,),
        warps=4,
        stages=1,
        PARTS=1 << (parts - 1).bit_length(),
        **constants,
    )
    return merged
