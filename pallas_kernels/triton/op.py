"""The Triton backend of gist attention: its limits, the launches, and the pairing of forward and backward.

Axis legend
  B   batch                 Hq  query heads, Hkv  KV heads, A = Hq / Hkv, D  head dim
  U   units of the segment, P = (r + 1) * U positions [ raws | gists ], M = P * A folded rows of a KV head
  s   sinks, G  gist keys, R  raw keys
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.backends import refusal_of
from pallas_kernels.pairing import paired
from pallas_kernels.triton import backward_kernel, forward_kernel
from pallas_kernels.triton.blocks import Blocks, KernelBlocks, kernel_blocks
from pallas_kernels.triton.call import capability, launch
from pallas_kernels.triton.plan import place_of, reach, splits
from unigist_jax.layout import GistLayout, UnitStarts

DTYPES = (jnp.bfloat16, jnp.float16)
HEAD_DIMS = (64, 128)
SINKS, GISTS, RAWS = 0, 1, 2


def refusal(q, kv, layout: GistLayout) -> str | None:
    """Why the Triton kernels do not take these arguments; None if they do."""
    return refusal_of(q, kv, layout, DTYPES, HEAD_DIMS)


def attend(
    q: Float[Array, "B P Hq D"],
    kv,
    layout: GistLayout,
    first_unit: int | jax.Array,
    first_raw_unit: int | jax.Array,
    starts: UnitStarts,
    blocks: KernelBlocks | None = None,
) -> Float[Array, "B P Hq D"]:
    """Triton form of `pallas_kernels.gist_attention.gist_attention`; same arguments, `starts` per unit of the segment.

    Differentiable in reverse mode with respect to q and kv; equal inputs give equal bits.

    Args:
      blocks: block sizes in place of those of the table in blocks.py.
    """
    if q.size == 0:
        return q
    blocks = blocks or kernel_blocks(capability(), q.shape[-1])
    starts = UnitStarts(*(jnp.atleast_2d(x).astype(jnp.int32) for x in starts))
    return _attend((layout, blocks), q, kv, starts, place_of(first_unit, first_raw_unit))


def _queries_side(layout, blocks: Blocks, q, kv, starts):
    """What the kernels that own a query tile have in common: grid, keys, ints and constants."""
    batch, positions, num_heads, dim = q.shape
    kv_heads = kv.gist_k.shape[2]
    group, units = num_heads // kv_heads, layout.segment_units(positions)
    tiles = sum(-(-rows * group // blocks.rows) for rows in (units * layout.ratio, units))
    keys = kv if layout.num_sinks else kv._replace(sink_k=kv.gist_k, sink_v=kv.gist_v)  # a pointer that none reads
    strides = (units if len(x) > 1 else 0 for x in starts)
    sizes = units, layout.num_sinks, kv.gist_k.shape[1], kv.raw_k.shape[1], kv_heads, *strides
    return (tiles, kv_heads, batch), keys, sizes, _constants(layout, blocks, group, dim)


def _constants(layout, blocks: Blocks, group: int, dim: int) -> dict:
    scale = dim**-0.5 * math.log2(math.e)
    sizes = {"ROWS": blocks.rows, "KEYS": blocks.keys}
    options = {"warps": blocks.warps, "stages": blocks.stages}
    return {"RATIO": layout.ratio, "GROUP": group, "DIM": dim, "SCALE": scale} | sizes | options


def forward(layout, blocks: Blocks, q, kv, starts, place):
    """The forward kernel: out [B, P, Hq, D], and its base-2 log-sum-exp, float32 [B, Hkv, M] as [B, Hq, P]."""
    grid, keys, sizes, constants = _queries_side(layout, blocks, q, kv, starts)
    lse = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
    return launch(forward_kernel.forward_kernel, grid, (q, *keys, *starts, place, *sizes), (q, lse), **constants)


def query_gradient(layout, blocks: Blocks, q, kv, starts, place, out, lse, d_out):
    """The kernel of dQ: dQ in q's shape and dtype, and rowsum(dO * out) in lse's."""
    grid, keys, sizes, constants = _queries_side(layout, blocks, q, kv, starts)
    kernel, root = backward_kernel.query_gradient_kernel, q.shape[-1] ** -0.5
    inputs = q, out, d_out, lse, *keys, *starts, place, *sizes
    return launch(kernel, grid, inputs, (q, lse), ROOT=root, **constants)


def key_gradients(layout, source: int, blocks: Blocks, queries, place, k, v, starts):
    """The kernel of dK and dV of one source, in its dtype and shape, for sinks summed over the batch.

    Args:
      source: SINKS, GISTS or RAWS.
      queries: q, dO, lse and delta.
      k, v: [B or 1, N, Hkv, D].
      starts: the source's part of `UnitStarts`, int32 [1 or B, U].
    """
    q, d_out, lse, delta = queries
    batch, positions, num_heads, dim = q.shape
    num_keys, kv_heads = k.shape[1:3]
    group, units = num_heads // kv_heads, layout.segment_units(positions)
    tiles = -(-num_keys // blocks.keys)
    # every later query sees a gist or a sink: there the key tiles differ in work, and may be few
    most = 1 if source == RAWS else positions * group // (8 * blocks.rows)
    parts = splits(tiles * kv_heads * batch, most if source == SINKS else min(most, 8))
    table = place  # not read for sinks
    if source != SINKS:
        lo = starts if source == GISTS else jnp.maximum((starts - place[1]) * layout.ratio, 0)
        table = reach(lo, num_keys, blocks.keys)
    differ = len(starts) > 1
    strides = num_keys if source != SINKS else 0, units if differ else 0, 2 * tiles if differ else 0
    whole = source != SINKS and parts == 1
    like = jax.ShapeDtypeStruct((parts, batch, *k.shape[1:]), k.dtype if whole else jnp.float32)
    inputs = q, d_out, lse, delta, k, v, starts, table, place, units, num_keys, kv_heads, *strides, parts
    grid = tiles, parts * kv_heads, batch
    constants = _constants(layout, blocks, group, dim)
    kernel = backward_kernel.key_gradient_kernel
    grads = launch(kernel, grid, inputs, (like, like), SOURCE=source, ROOT=dim**-0.5, **constants)
    if source == SINKS:
        return [x.sum((0, 1)).astype(k.dtype) for x in grads]
    return [x[0] if whole else x.sum(0).astype(k.dtype) for x in grads]


def _forward(layout, blocks, q, kv, starts, place):
    return forward(layout, blocks.forward, q, kv, starts, place)


def _backward(layout, blocks, q, kv, starts, place, out, lse, d_out):
    d_q, delta = query_gradient(layout, blocks.query_gradient, q, kv, starts, place, out, lse, d_out)
    rest = (q, d_out, lse, delta), place
    d_sinks = jnp.zeros_like(kv.sink_k), jnp.zeros_like(kv.sink_v)
    if layout.num_sinks:
        sinks = kv.sink_k[None], kv.sink_v[None]
        d_sinks = key_gradients(layout, SINKS, blocks.key_gradient, *rest, *sinks, starts.gist_start)
    d_gists = key_gradients(layout, GISTS, blocks.key_gradient, *rest, kv.gist_k, kv.gist_v, starts.gist_start)
    d_raws = key_gradients(layout, RAWS, blocks.raw_gradient, *rest, kv.raw_k, kv.raw_v, starts.raw_start)
    return d_q, type(kv)(*d_sinks, *d_gists, *d_raws)


_attend = paired(_forward, _backward)
