"""The TPU backend of gist attention: its limits, the tiles, and the pairing of forward and backward kernels.

Axis legend
  B  batch                 Hq  query heads, Hkv  KV heads, D  head dim
  U  units of the segment, p = (r + 1) * U its positions [ raws | gists ]
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.backends import refusal_of
from pallas_kernels.pairing import paired
from pallas_kernels.tpu.backward import key_gradients, query_gradient
from pallas_kernels.tpu.blocks import Blocks, blocks_for
from pallas_kernels.tpu.forward import gist_attention_forward
from pallas_kernels.tpu.plan import LINE, column_intervals, cut, key_table, query_table, row_intervals
from unigist_jax.layout import GistLayout, UnitStarts

DTYPES = (jnp.bfloat16, jnp.float32)
HEAD_DIMS = (64, 128)
RATIOS = (2, 4, 8, 16, 32)
TABLE_BYTES = 2**20 - 2**14  # of scalar memory, which holds the table of key tiles while a kernel runs


def refusal(q, kv, layout: GistLayout) -> str | None:
    """Why the TPU kernels do not take these arguments; None if they do."""
    reason = refusal_of(q, kv, layout, DTYPES, HEAD_DIMS, RATIOS)
    if reason or 0 in q.shape:
        return reason
    segment, _ = cut(q.shape, kv, layout, blocks_for(q.shape[-1], layout.ratio, kv.gist_k.shape[1] * layout.ratio))
    lines, most = q.shape[0] * segment.tiles, TABLE_BYTES // (4 * LINE)  # as many as documents in each sequence need
    if lines > most:
        return f"takes up to {most} query tiles (batch times tiles of a sequence), got {q.shape[0]} x {segment.tiles}"
    return None


def attend(
    q: Float[Array, "B p Hq D"],
    kv,
    layout: GistLayout,
    first_unit: int | jax.Array,
    first_raw_unit: int | jax.Array,
    starts: UnitStarts,
    blocks: Blocks | None = None,
) -> Float[Array, "B p Hq D"]:
    """TPU form of `pallas_kernels.gist_attention.gist_attention`; same arguments, `starts` per unit of the segment.

    Differentiable in reverse mode with respect to q and kv; gradients are the same to the last bit in every run.

    Args:
      blocks: block sizes in place of those of the table in blocks.py.
    """
    if 0 in q.shape:
        return q
    blocks = blocks or blocks_for(q.shape[-1], layout.ratio, kv.gist_k.shape[1] * layout.ratio)
    segment, axis = cut(q.shape, kv, layout, blocks)
    intervals = row_intervals(layout, segment, axis, first_unit, first_raw_unit, starts)
    return _attend((layout, segment, axis), q, kv, intervals)


def _tiled(segment, axis, q, kv, intervals):
    """What both directions read: tiles of q, k and v, the columns' intervals and the table of key tiles."""
    k, v = axis.tile(kv.sink_k, kv.gist_k, kv.raw_k), axis.tile(kv.sink_v, kv.gist_v, kv.raw_v)
    return segment.tile(q), k, v, column_intervals(segment, intervals), key_table(segment, axis, intervals)


def _forward(layout, segment, axis, q, kv, intervals):
    out, lse = gist_attention_forward(*_tiled(segment, axis, q, kv, intervals), segment, axis, layout)
    return segment.untile(out), lse


def _backward(layout, segment, axis, q, kv, intervals, out, lse, d_out):
    q, k, v, columns, table = _tiled(segment, axis, q, kv, intervals)
    delta = segment.tile((d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1))[..., None, :]
    # in rows of padding a log-sum-exp so high that their weights vanish
    valid = jnp.tile(segment.valid_rows().reshape(segment.tiles, 1, segment.rows), (1, 1, segment.heads))
    stats = jnp.concatenate([jnp.where(valid, lse, np.float32(2**30)), delta], axis=-2)
    shared = q, segment.tile(d_out), stats, k, v, columns, table
    d_q = query_gradient(*shared, segment, axis, layout)
    d_k, d_v = key_gradients(*shared, query_table(segment, axis, table), segment, axis, layout)
    d_k, d_v = (
        [d.astype(x.dtype) for d, x in zip(axis.untile(d_tiles), kv[::2], strict=True)] for d_tiles in (d_k, d_v)
    )
    d_kv = type(kv)(*(d for pair in zip(d_k, d_v, strict=True) for d in pair))
    return segment.untile(d_q), d_kv


_attend = paired(_forward, _backward)
