"""The Triton backend of gist attention: its limits, the launches, and the pairing of forward and backward.

Axis legend
  B   batch                 Hq  query heads, Hkv  KV heads, A = Hq / Hkv, D  head dim
  U   units of the segment, P = (r + 1) * U positions [ raws | gists ], M = P * A folded rows of a KV head
  s   sinks, G  gist keys, R  raw keys
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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
    dtypes = {jnp.dtype(x.dtype) for x in (q, *kv)}
    if len(dtypes) > 1 or not dtypes <= {jnp.dtype(x) for x in DTYPES}:
        names = ", ".join(sorted(x.name for x in dtypes))
        return f"takes q and kv all in bfloat16 or all in float16, got {names}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"takes head dims {HEAD_DIMS}, got {q.shape[-1]}"
    return None


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
    return _attend(layout, blocks, q, kv, starts, place_of(first_unit, first_raw_unit))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(layout, blocks, q, kv, starts, place):
    return _forward(layout, blocks, q, kv, starts, place)[0]


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


def _forward(layout, blocks, q, kv, starts, place):
    grid, keys, sizes, constants = _queries_side(layout, blocks.forward, q, kv, starts)
    lse = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
    inputs = q, *keys, *starts, place, *sizes
    return launch(forward_kernel.forward_kernel, grid, inputs, (q, lse), **constants)


def _attend_forward(layout, blocks, q, kv, starts, place):
    out, lse = _forward(layout, blocks, q, kv, starts, place)
    return out, (q, kv, starts, place, out, lse)


def _attend_backward(layout, blocks, residuals, d_out):
    q, kv, starts, place, out, lse = residuals
    grid, keys, sizes, constants = _queries_side(layout, blocks.query_gradient, q, kv, starts)
    inputs = q, out, d_out, lse, *keys, *starts, place, *sizes
    root = q.shape[-1] ** -0.5
    kernel = backward_kernel.query_gradient_kernel
    d_q, delta = launch(kernel, grid, inputs, (q, lse), ROOT=root, **constants)
    source = partial(_key_gradients, layout, (q, d_out, lse, delta), place)
    d_sinks = jnp.zeros_like(kv.sink_k), jnp.zeros_like(kv.sink_v)
    if layout.num_sinks:
        d_sinks = source(SINKS, blocks.key_gradient, kv.sink_k[None], kv.sink_v[None], starts.gist_start)
    d_gists = source(GISTS, blocks.key_gradient, kv.gist_k, kv.gist_v, starts.gist_start)
    d_raws = source(RAWS, blocks.raw_gradient, kv.raw_k, kv.raw_v, starts.raw_start)
    d_kv = [x.reshape(like.shape) for x, like in zip((*d_sinks, *d_gists, *d_raws), kv, strict=True)]
    return d_q, type(kv)(*d_kv), *jax.tree.map(lambda _: None, (starts, place))


def _key_gradients(layout, queries, place, source, blocks: Blocks, k, v, starts):
    """dK and dV of one source, in its dtype; k and v [B or 1, N, Hkv, D], `starts` its part of `UnitStarts`."""
    q, d_out, lse, delta = queries
    batch, positions, num_heads, dim = q.shape
    num_keys, kv_heads = k.shape[1:3]
    group, units = num_heads // kv_heads, layout.segment_units(positions)
    tiles = -(-num_keys // blocks.keys)
    # every later query sees a gist or a sink: there the key tiles differ in work, and may be few
    most = 1 if source == RAWS else positions * group // (8 * blocks.rows)
    parts = splits(tiles * kv_heads * batch, most if source == SINKS else min(most, 8))
    lo = starts if source == GISTS else jnp.maximum((starts - place[1]) * layout.ratio, 0)
    table = reach(lo, num_keys, blocks.keys) if source != SINKS else place
    strides = num_keys if source != SINKS else 0, units if len(starts) > 1 else 0, 2 * tiles if len(starts) > 1 else 0
    one = source != SINKS and parts == 1
    like = jax.ShapeDtypeStruct((parts, batch, *k.shape[1:]), k.dtype if one else jnp.float32)
    inputs = q, d_out, lse, delta, k, v, starts, table, place, units, num_keys, kv_heads, *strides, parts
    grads = launch(
        backward_kernel.key_gradient_kernel,
        (tiles, parts * kv_heads, batch),
        inputs,
        (like, like),
        SOURCE=source,
        ROOT=dim**-0.5,
        **_constants(layout, blocks, group, dim),
    )
    if source == SINKS:
        return [x.sum((0, 1)).astype(k.dtype) for x in grads]
    return [x[0] if one else x.sum(0).astype(k.dtype) for x in grads]


_attend.defvjp(_attend_forward, _attend_backward)
