"""What the TPU kernels that own a query tile have in common: the walk over its key tiles, and the call.

Axis legend
  B  batch               J  jobs: groups of query heads that share a KV head          D  head dim
  M  query tiles of C columns (positions times heads), N  key tiles of K keys (plan.py)
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.tpu.blocks import VMEM_LIMIT
from pallas_kernels.tpu.plan import KeyAxis, KeyStream
from pallas_kernels.tpu.stream import BUFFERS, run_stream
from pallas_kernels.tpu.tiles import mask_scores


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


def over_query_tiles(
    tile_kernel: Callable,
    queries: tuple[Array, ...],
    k: Float[Array, "B Hkv N K D"],
    v: Float[Array, "B Hkv N K D"],
    intervals: Int32[Array, "S M 4 C"],
    table: Int32[Array, "S M L"],
    outputs: list[jax.ShapeDtypeStruct],
    scratch: list,
    axis: KeyAxis,
    cost: pl.CostEstimate,
    name: str,
) -> tuple[Array, ...]:
    """Runs a kernel on every query tile, each job of each sequence.

    Args:
      tile_kernel: gets `walk`, then refs of the tile's part of the queries and intervals, of the outputs, the buffers
        of k and v [2, K, D], and the scratch. `walk(step)` calls `step(buffer, mask)` for every key tile that the query
        tile visits, once it has come into that buffer.
      queries: what is read of a tile of queries, each [B, J, M, …]; `outputs` what is written, likewise.
    """
    batch, jobs, num_tiles = queries[0].shape[:3]
    per_kv_head, per_batch = jobs // k.shape[1], int(table.shape[0] > 1)

    def kernel(table_ref, *refs):
        *refs, serial, sems = refs
        num_read = len(queries) + 1
        of_tile, hbm, rest = refs[:num_read], refs[num_read : num_read + 2], refs[num_read + 2 :]
        buffers = rest[len(outputs) : len(outputs) + 2]
        b, job, tile = (pl.program_id(i) for i in range(3))
        base = b * per_batch * num_tiles

        def walk(step):
            def body(index, buffer):
                visit_keys(table_ref, base + tile, axis, index, functools.partial(step, buffer))

            def count_of(step):
                return KeyStream(table_ref, base + step, axis).count

            where = (b, lax.div(job, jnp.int32(per_kv_head)))
            copies = key_copies(table_ref, base, axis, hbm, buffers, sems, where)
            run_stream(tile, num_tiles, count_of, copies, serial, body)

        tile_kernel(walk, *of_tile, *rest)

    def of_tile(array):
        return pl.BlockSpec((None, None, None, *array.shape[3:]), lambda b, j, m, _: (b, j, m, 0, 0))

    dim = k.shape[-1]
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(batch, jobs, num_tiles),
        in_specs=[
            *map(of_tile, queries),
            pl.BlockSpec((None, None, *intervals.shape[2:]), lambda b, j, m, _: (b * per_batch, m, 0, 0)),
            *[pl.BlockSpec(memory_space=pltpu.HBM)] * 2,
        ],
        out_specs=[of_tile(x) for x in outputs],
        scratch_shapes=[
            *(pltpu.VMEM((BUFFERS, axis.keys, dim), x.dtype) for x in (k, v)),
            *scratch,
            pltpu.SMEM((1,), jnp.int32),
            pltpu.SemaphoreType.DMA((2, BUFFERS)),
        ],
    )
    return pl.pallas_call(
        kernel,
        grid_spec=grid_spec,
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=cost,
        name=name,
    )(table.reshape(-1), *queries, intervals, k, v)
