"""Forward pass of gist attention on TPU: one fused Mosaic kernel.

Axis legend
  B  batch               J  jobs: groups of query heads that share a KV head          D  head dim
  M  query tiles of C columns (positions times heads), N  key tiles of K keys (plan.py)

Key tiles that a query tile visits (█ unmasked, ▒ masked), for one document with r = 4, s = 128 and w = 128:

                    sinks and gists            raws
  raws   tile 17    █ █ █ █ █ ▒                ▒ ▒          the window and itself
  gists  tile 4     █ █ █ █ █ ▒                ▒ ▒ ▒        its own units' raws and the window

Packed documents move the left border of the gists: after the tile of the sinks, tiles before the document are not read.

The grid is (batch, job, query tile). How many key tiles a query tile visits is a number in `key_table`, prefetched into
scalar memory; a loop inside the grid step walks over exactly those, unmasked ones first, with its own double buffering
(stream.py). A grid axis over key tiles would need a static bound, and nearly half of its steps would be empty: in
causal order the average query tile visits half as many tiles as the last one.

A masked score is a large negative number, not -inf: a column that has seen no key yet sums nonsense that its first key
wipes out, and no guard is needed. `lse` is the base-2 logarithm of the softmax's sum.
"""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.tpu.blocks import VMEM_LIMIT
from pallas_kernels.tpu.cost import forward_cost
from pallas_kernels.tpu.plan import KeyAxis, KeyStream, Segment
from pallas_kernels.tpu.stream import BUFFERS, run_stream
from pallas_kernels.tpu.tiles import TN, dot, mask_scores, scores_of


def key_copies(table_ref, base, axis: KeyAxis, sources, buffers, arrived, where):
    """For `run_stream`: copies of the key tiles that query tile `step` visits.

    Args:
      base: line of the first query tile in the table.
      sources: arrays [B, Hkv, N, K, D] in HBM, `where` the pair (batch, KV head) to read.
      buffers: for each source its buffers [2, K, D]; `arrived` semaphores [sources, 2].
    """

    def copies(step, index, buffer):
        tile = KeyStream(table_ref, base + step, axis).locate(index)
        return [
            pltpu.make_async_copy(source.at[*where, tile], ring.at[buffer], arrived.at[i, buffer])
            for i, (source, ring) in enumerate(zip(sources, buffers, strict=True))
        ]

    return copies


def visit_keys(table_ref, line, axis: KeyAxis, index, step) -> None:
    """Calls `step(key_tile, mask)` with the mask that place `index` of a query tile's stream needs."""
    stream = KeyStream(table_ref, line, axis)
    tile = stream.locate(index)
    masked, raws = index >= stream.num_full, tile >= axis.raw_tile

    pl.when(~masked)(lambda: step(lambda scores, _: scores))
    for kind in (False, True):
        mask = functools.partial(mask_scores, key_tile=tile, axis=axis, raws=kind)
        pl.when(masked & (raws == kind))(functools.partial(step, mask))


def gist_attention_forward(
    q: Float[Array, "B J M C D"],
    k: Float[Array, "B Hkv N K D"],
    v: Float[Array, "B Hkv N K D"],
    intervals: Int32[Array, "S M 4 C"],
    table: Int32[Array, "S M L"],
    segment: Segment,
    axis: KeyAxis,
    layout,
) -> tuple[Float[Array, "B J M C D"], Float[Array, "B J M 1 C"]]:
    """Output in q's dtype and base-2 log-sum-exp in float32, tiled as q is."""
    batch, jobs, num_tiles, columns, dim = q.shape
    per_kv_head, per_batch = jobs // k.shape[1], int(table.shape[0] > 1)

    def kernel(table_ref, q_ref, rows_ref, k_hbm, v_hbm, out_ref, lse_ref, k_buf, v_buf, acc, top, total, serial, sems):
        b, job, tile = (pl.program_id(i) for i in range(3))
        base = b * per_batch * num_tiles
        acc[...] = jnp.zeros_like(acc)
        top[...] = jnp.full_like(top, -jnp.inf)
        total[...] = jnp.zeros_like(total)

        def body(index, buffer):
            def step(mask):
                of_parts = [mask(scores_of(k_buf[buffer], q_ref[x]), rows_ref.at[:, x]) for x in segment.parts]
                for part, scores in zip(segment.parts, of_parts, strict=True):
                    new_top = jnp.maximum(top[:, part], scores.max(axis=0, keepdims=True))
                    shrink = jnp.exp2(top[:, part] - new_top)
                    weights = jnp.exp2(scores - new_top)
                    total[:, part] = total[:, part] * shrink + weights.sum(axis=0, keepdims=True)
                    acc[:, part] = acc[:, part] * shrink + dot(v_buf[buffer], weights.astype(v_buf.dtype), TN)
                    top[:, part] = new_top

            visit_keys(table_ref, base + tile, axis, index, step)

        def count_of(step):
            return KeyStream(table_ref, base + step, axis).count

        where = (b, lax.div(job, jnp.int32(per_kv_head)))
        copies = key_copies(table_ref, base, axis, (k_hbm, v_hbm), (k_buf, v_buf), sems, where)
        run_stream(tile, num_tiles, count_of, copies, serial, body)
        out_ref[...] = (acc[...] / total[...]).T.astype(out_ref.dtype)
        lse_ref[...] = top[...] + jnp.log2(total[...])

    def of_tile(b, j, m, _):
        return b, j, m, 0, 0

    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(batch, jobs, num_tiles),
        in_specs=[
            pl.BlockSpec((None, None, None, columns, dim), of_tile),
            pl.BlockSpec((None, None, 4, columns), lambda b, j, m, _: (b * per_batch, m, 0, 0)),
            pl.BlockSpec(memory_space=pltpu.HBM),
            pl.BlockSpec(memory_space=pltpu.HBM),
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, columns, dim), of_tile),
            pl.BlockSpec((None, None, None, 1, columns), of_tile),
        ],
        scratch_shapes=[
            pltpu.VMEM((BUFFERS, axis.keys, dim), k.dtype),
            pltpu.VMEM((BUFFERS, axis.keys, dim), v.dtype),
            pltpu.VMEM((dim, columns), jnp.float32),
            pltpu.VMEM((1, columns), jnp.float32),
            pltpu.VMEM((1, columns), jnp.float32),
            pltpu.SMEM((1,), jnp.int32),
            pltpu.SemaphoreType.DMA((2, BUFFERS)),
        ],
    )
    return pl.pallas_call(
        kernel,
        grid_spec=grid_spec,
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, jobs, num_tiles, 1, columns), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=forward_cost(layout, segment, axis, q, k),
        name="gist_attention_forward",
    )(table.reshape(-1), q, intervals, k, v)
