"""The Hopper backend of gist attention: its limits, the padding, and the pairing of forward and backward kernels.

Axis legend
  B   batch                 Hq  query heads, Hkv  KV heads, D  head dim
  U   units of the segment, P = (r + 1) * U positions [ raws | gists ]; each part is padded inside to a multiple of 128
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.backends import refusal_of
from pallas_kernels.hopper.backward import gist_attention_backward, tables_of
from pallas_kernels.hopper.blocks import BackwardBlocks, ForwardBlocks, backward_blocks, forward_blocks
from pallas_kernels.hopper.forward import forward_tables, gist_attention_forward
from pallas_kernels.hopper.plan import log_sum_exp_of_rows, row_intervals, segment_of
from pallas_kernels.pairing import paired
from unigist_jax.layout import GistLayout, UnitStarts

DTYPES = (jnp.bfloat16, jnp.float16)
HEAD_DIMS = (64, 128)
RATIOS = (2, 4, 8, 16, 32)


def refusal(q, kv, layout: GistLayout) -> str | None:
    """Why the Hopper kernels do not take these arguments; None if they do."""
    return refusal_of(q, kv, layout, DTYPES, HEAD_DIMS, RATIOS)


def attend(
    q: Float[Array, "B P Hq D"],
    kv,
    layout: GistLayout,
    first_unit: int | jax.Array,
    first_raw_unit: int | jax.Array,
    starts: UnitStarts,
    deterministic: bool = True,
    blocks: tuple[ForwardBlocks, BackwardBlocks] | None = None,
) -> Float[Array, "B P Hq D"]:
    """Hopper form of `pallas_kernels.gist_attention.gist_attention`; same arguments, `starts` per unit of the segment.

    Differentiable in reverse mode with respect to q and kv.

    Args:
      deterministic: False lets the backward add to q's gradient in any order; runs may differ in their last bits.
      blocks: block sizes in place of those of the table in blocks.py.
    """
    if q.shape[1] == 0:
        return q
    segment = segment_of(layout, q.shape[1])
    regular = starts.gist_start.ndim == 1
    if blocks is None:
        key = q.shape[-1], layout.ratio, kv.gist_k.shape[1] * layout.ratio
        blocks = forward_blocks(*key), backward_blocks(*key, documents=not regular)
    blocks = blocks[0], blocks[1]._replace(deterministic=deterministic)
    kv = type(kv)(*(pad_keys(x) for x in kv))
    positions = first_unit, first_raw_unit, starts
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(positions)):
        positions = jax.tree.map(np.asarray, positions)  # the tables are computed now, and are constants of the program
    intervals, q = row_intervals(layout, segment, *positions), segment.pad(q)
    forward = intervals, forward_tables(q, kv, layout, segment, intervals, blocks[0], regular)
    backward = tables_of(q, kv, layout, segment, intervals, blocks[1])
    return segment.unpad(_attend((layout, blocks, segment), q, kv, forward, backward))


def pad_keys(x: Float[Array, "*B N Hkv D"]) -> Array:
    """Keys or values with N a multiple of 8, as the copy engine's tiles want it; no row sees the padding."""
    widths = [(0, 0)] * x.ndim
    widths[-3] = (0, -x.shape[-3] % 8)
    return jnp.pad(x, widths) if widths[-3][1] else x


def _forward(layout, blocks, segment, q, kv, tables, _):
    return gist_attention_forward(q, kv, layout, *tables, blocks[0])


def _backward(layout, blocks, segment, q, kv, _, tables, out, lse, d_out):
    return gist_attention_backward(q, kv, out, log_sum_exp_of_rows(segment, lse), d_out, tables, blocks[1])


_attend = paired(_forward, _backward)
