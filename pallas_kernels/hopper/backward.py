"""Backward pass of gist attention on Hopper: one fused Mosaic GPU kernel, run once for each key source.

Axis legend
  B   batch                 Hq  query heads, Hkv  KV heads, A = Hq / Hkv, D  head dim
  P   padded query rows [ raws | gists ] (plan.py), cut into M tiles of `rows`
  N   key tiles of 128 keys of one source: the sinks, then the gists, then the raws

A block owns one key tile and walks over the query tiles that see it (█ unmasked, ▒ masked), last tile first:

  query tiles             raws                                 gists
  sink tile 0             █ █ █ █ █ █ █ █ █ █ █ █ █ █ █ █      █ █ █ █            every query
  gist tile 2                             ▒ █ █ █ █ █ █ █          ▒ █            every later query of the document
  raw tile 5                        ▒ ▒ ▒ ▒                      ▒ ▒              its own window only

  per step, S = K Q',  dP = V dO',  P = exp2(S - lse),  dS = P (dP - delta), all [keys, queries]:
      dV += P dO      dK += dS Q      dQ[tile] += dS' K

  warpgroup 2      TMA: streams query tiles (q, dO, lse, delta) through a ring of `stages` buffers, and adds each tile's
                   dQ to a float32 array in global memory with a bulk reduction
  warpgroups 0, 1  64 keys each; dK and dV stay in registers; dS crosses shared memory, and each warpgroup computes half
                   of the tile's dQ over all 128 keys

So five matrix products a pair of tiles do all the work. Determinism: the additions to one query tile happen in the
order of the key tiles. A block waits on the tile's counter until its predecessors have added, and raises it when its
own addition has landed. Blocks start in that order and every block walks its queries in the same
direction, so they queue up staggered by one step and hardly wait. Each query head has its own block (partial dK and dV
in float32, summed afterwards), but raw key tiles, which few queries see, take a whole group of query heads.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.hopper.blocks import BackwardBlocks
from pallas_kernels.hopper.plan import RowIntervals, Segment, query_table, tile_bounds, visitors
from pallas_kernels.ranges import RowRanges
from unigist_jax.layout import GistLayout

KEYS = 128  # keys of a block, 64 a warpgroup
MASKED = -1e9
WGMMA = plgpu.Layout.WGMMA
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)


class Queries(NamedTuple):
    """What the query side of every launch reads. Rows of padding: zero q and dO, lse so high that weights vanish."""

    q: Float[Array, "B P Hq D"]
    d_out: Float[Array, "B P Hq D"]
    stats: Float[Array, "B Hq 2 P"]  # base-2 log-sum-exp; row sums of dO * out


class Work(NamedTuple):
    """The query tiles of one block, as scalars; gists' rows come first, each part last tile first."""

    raw_first: jax.Array
    raw_last: jax.Array
    gist_first: jax.Array
    gist_last: jax.Array

    @property
    def per_head(self):
        return (self.raw_last - self.raw_first) + (self.gist_last - self.gist_first)

    def locate(self, step, heads: int):
        """Head (of the block's) and query tile of a step."""
        if heads == 1:
            head, index = jnp.int32(0), step
        else:
            per_head = jnp.maximum(self.per_head, 1)
            head, index = lax.div(step, per_head), lax.rem(step, per_head)
        gists = self.gist_last - self.gist_first
        tile = jnp.where(index < gists, self.gist_last - 1 - index, self.raw_last - 1 - (index - gists))
        return head, tile


def _source_backward(
    queries: Queries,
    k: Float[Array, "Bk K Hkv D"],
    v: Float[Array, "Bk K Hkv D"],
    rows: RowRanges,
    segment: Segment,
    dq_ref,
    heads: int,
    splits: int,
    blocks: BackwardBlocks,
    name: str,
) -> tuple[Array, Array]:
    """Adds one source's part to `dq_ref` and returns its dK and dV, [splits, B, N * 128, Hq / heads, D].

    Args:
      k, v: the source's keys and values; Bk is B, or 1 for keys that all sequences share.
      rows: what each query row sees of them, int32 [S, P].
      dq_ref: a reference to float32 [B, P, Hq, D] that the kernel adds to; the scale is not applied.
      heads: query heads that one block takes: 1 (the result is float32) or the whole group (k's dtype).
      splits: parts into which the query tiles are cut among blocks.
    """
    batch, num_rows, num_heads, dim = queries.q.shape
    num_kv_heads = k.shape[2]
    group = num_heads // num_kv_heads
    tile_rows = 64 if dim == 128 else 128
    num_tiles, num_key_tiles = num_rows // tile_rows, -(-k.shape[1] // KEYS)
    stages, ordered = blocks.stages, blocks.deterministic
    dtype = queries.q.dtype
    scale = dim**-0.5 * math.log2(math.e)
    bounds = tile_bounds(segment, rows, tile_rows, KEYS)
    work_table = visitors(segment, bounds, num_key_tiles, tile_rows)
    tile_table = query_table(segment, bounds, tile_rows)
    job_heads = num_heads // heads
    per_batch = rows.lo.shape[0] > 1
    interleaved = blocks.heads if job_heads % blocks.heads == 0 else job_heads

    def place(block):
        """Split, batch, key tile and head of a block: heavy key tiles of `interleaved` heads first."""
        inner, block = lax.rem(block, interleaved), lax.div(block, interleaved)
        key_tile, block = lax.rem(block, num_key_tiles), lax.div(block, num_key_tiles)
        outer, block = lax.rem(block, job_heads // interleaved), lax.div(block, job_heads // interleaved)
        return lax.div(block, batch), lax.rem(block, batch), key_tile, outer * interleaved + inner

    def kernel(q_ref, do_ref, stats_ref, k_ref, v_ref, lo_ref, hi_ref, tiles_ref, work_ref, dq_ref, *refs):
        dk_ref, dv_ref, k_smem, v_smem, q_smem, do_smem, stats_smem, ds_smem, dq_smem = refs[:9]
        kv_filled, q_filled, do_filled, freed, ds_ready, dq_ready, dq_freed = refs[9:]
        wg = lax.axis_index("wg")
        split, b, key_tile, job_head = place(lax.axis_index("block"))
        first_head = job_head * heads

        at_batch = b if per_batch else 0

        def line(table, length, index, columns):
            return [table[(at_batch * length + index) * 4 + i] for i in range(columns)]

        work = Work(*line(work_ref, num_key_tiles, key_tile, 4))
        if splits > 1:
            begin, stop = (lax.div(num_tiles * (split + i), splits) for i in (0, 1))
            work = Work(*(jnp.clip(x, begin, stop) for x in work))
        steps = work.per_head * heads

        @pl.when(wg < 2)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            my_keys = pl.ds(wg * 64, 64)
            zeros = plgpu.layout_cast(jnp.zeros((64, dim), jnp.float32), WGMMA)
            plgpu.barrier_wait(kv_filled)

            def step_of(step, state):
                dk, dv = state
                slot, ds_slot = lax.rem(step, jnp.int32(stages)), lax.rem(step, jnp.int32(2))
                _, tile = work.locate(step, heads)
                _, full_first, full_last = line(tiles_ref, num_tiles, tile, 3)
                full = (key_tile >= full_first) & (key_tile < full_last)
                shape = (64, tile_rows)
                across = lambda x: lax.broadcast_in_dim(x, shape, [1])  # noqa: E731

                def mask(scores):
                    rows_at = pl.ds(at_batch * num_rows + tile * tile_rows, tile_rows)
                    key = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=WGMMA) + (key_tile * KEYS + wg * 64)
                    lo = plgpu.load(lo_ref.at[rows_at], layout=PER_COLUMN, optimized=False)
                    scores = jnp.where(key >= across(lo), scores, MASKED)
                    scores = lax.optimization_barrier(scores)
                    hi = plgpu.load(hi_ref.at[rows_at], layout=PER_COLUMN, optimized=False)
                    return jnp.where(key < across(hi), scores, MASKED)

                plgpu.barrier_wait(q_filled.at[slot])

                def weights_of(scores_ref, dp_ref):
                    plgpu.wgmma(scores_ref, k_smem.at[my_keys], q_smem.at[slot].T)
                    plgpu.barrier_wait(do_filled.at[slot])
                    plgpu.wgmma(dp_ref, v_smem.at[my_keys], do_smem.at[slot].T)
                    scores = plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)
                    scores = lax.cond(full, lambda s: s, mask, scores)
                    lse = plgpu.load(stats_smem.at[slot, 0], layout=PER_COLUMN)
                    return jnp.exp2(scores * scale - across(lse)), dp_ref[...]

                acc = plgpu.ACC(shape, jnp.float32)
                weights, dp = pl.run_scoped(weights_of, acc, acc)
                delta = plgpu.load(stats_smem.at[slot, 1], layout=PER_COLUMN)
                ds = (weights * (dp - across(delta))).astype(dtype)
                weights = weights.astype(dtype)
                ds, weights = lax.optimization_barrier((ds, weights))
                ds_smem.at[ds_slot, my_keys][...] = ds
                plgpu.commit_smem()
                plgpu.barrier_arrive(ds_ready)

                def accumulate(refs):
                    dk_ref, dv_ref, dq_ref = refs
                    plgpu.wgmma(dv_ref, weights, do_smem.at[slot])
                    plgpu.wgmma(dk_ref, ds, q_smem.at[slot])
                    plgpu.barrier_wait(ds_ready)
                    if dim == 128:
                        plgpu.wgmma(dq_ref, ds_smem.at[ds_slot].T, k_smem.at[:, my_half])
                    else:
                        plgpu.wgmma(dq_ref, ds_smem.at[ds_slot, :, my_half].T, k_smem)

                my_half = pl.ds(wg * 64, 64)
                no_dq = plgpu.layout_cast(jnp.zeros((64, 64), jnp.float32), WGMMA)
                dk, dv, dq = pl.run_state(accumulate)(tuple(plgpu.ACC.init(x) for x in (dk, dv, no_dq)))
                plgpu.barrier_arrive(freed.at[slot])

                @pl.when(step > 0)
                def _():
                    plgpu.barrier_wait(dq_freed)

                dq_smem.at[(slice(None), my_half) if dim == 128 else my_half][...] = dq
                plgpu.commit_smem()
                plgpu.barrier_arrive(dq_ready)
                return dk, dv

            dk, dv = lax.fori_loop(0, steps, step_of, (zeros, zeros))
            where = (split, b, pl.ds(key_tile * KEYS + wg * 64, 64), job_head)
            dk_ref.at[where][...] = (dk * dim**-0.5).astype(dk_ref.dtype)
            dv_ref.at[where][...] = dv.astype(dv_ref.dtype)

        @pl.when(wg == 2)
        def _stream():
            plgpu.set_max_registers(24, action="decrease")
            where = (0 if k_ref.shape[0] == 1 else b, pl.ds(key_tile * KEYS, KEYS), lax.div(first_head, group))
            plgpu.copy_gmem_to_smem(k_ref.at[where], k_smem, kv_filled)
            plgpu.copy_gmem_to_smem(v_ref.at[where], v_smem, kv_filled)
            if ordered:
                counters = pl.get_global(plgpu.SemaphoreType.REGULAR((batch * num_heads * num_tiles,)))

            def load(step):
                slot = lax.rem(step, jnp.int32(stages))
                head, tile = work.locate(step, heads)
                head, at = first_head + head, pl.ds(tile * tile_rows, tile_rows)

                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(freed.at[slot])

                plgpu.copy_gmem_to_smem(q_ref.at[b, at, head], q_smem.at[slot], q_filled.at[slot])
                plgpu.copy_gmem_to_smem(stats_ref.at[b, head, :, at], stats_smem.at[slot], q_filled.at[slot])
                plgpu.copy_gmem_to_smem(do_ref.at[b, at, head], do_smem.at[slot], do_filled.at[slot])

            def add_to_dq(step):
                head, tile = work.locate(step, heads)
                head = first_head + head
                if ordered:
                    counter = counters.at[(b * num_heads + head) * num_tiles + tile]
                    pl.semaphore_wait(counter, key_tile - line(tiles_ref, num_tiles, tile, 1)[0], decrement=False)
                plgpu.barrier_wait(dq_ready)
                where = (b, pl.ds(tile * tile_rows, tile_rows), head)
                plgpu.copy_smem_to_gmem(dq_smem, dq_ref.at[where], reduction_op="add")
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(dq_freed)
                if ordered:
                    plgpu.wait_smem_to_gmem(0)
                    pl.semaphore_signal(counter)

            pl.when(steps > 0)(lambda: load(0))

            @pl.loop(0, steps)
            def _(step):
                pl.when(step + 1 < steps)(lambda: load(step + 1))
                add_to_dq(step)

    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    tiled32 = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
    d_key = jax.ShapeDtypeStruct(
        (splits, batch, num_key_tiles * KEYS, job_heads, dim), jnp.float32 if heads < group or splits > 1 else dtype
    )
    run = plgpu.kernel(
        kernel,
        out_type=(d_key, d_key),
        scratch_types=[
            plgpu.SMEM((KEYS, dim), dtype, transforms=tiled),
            plgpu.SMEM((KEYS, dim), dtype, transforms=tiled),
            plgpu.SMEM((stages, tile_rows, dim), dtype, transforms=tiled),
            plgpu.SMEM((stages, tile_rows, dim), dtype, transforms=tiled),
            plgpu.SMEM((stages, 2, tile_rows), jnp.float32),
            plgpu.SMEM((2, KEYS, tile_rows), dtype, transforms=tiled),
            plgpu.SMEM((tile_rows, dim), jnp.float32, transforms=tiled32),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_barriers=stages, num_arrivals=2),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages, num_arrivals=2),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=1),
        ],
        grid=(splits * batch * job_heads * num_key_tiles,),
        grid_names=("block",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=f"gist_attention_backward_{name}",
    )
    return run(*queries, k, v, *(x.reshape(-1) for x in (*rows, tile_table, work_table)), dq_ref)


def gist_attention_backward(
    q: Float[Array, "B P Hq D"],
    kv,
    out: Float[Array, "B P Hq D"],
    lse: Float[Array, "B Hq P"],
    d_out: Float[Array, "B P Hq D"],
    layout: GistLayout,
    segment: Segment,
    intervals: RowIntervals,
    blocks: BackwardBlocks,
):
    """Gradients of q and of every part of kv, in their dtypes.

    Args:
      q, out, lse, d_out: padded rows; `lse` (base 2) must be so high in rows of padding that their weights vanish.
      kv: a `GistKV`; the sinks' gradients sum over the batch.
      intervals: what each row sees.
    """
    _, num_rows, num_heads, dim = q.shape
    num_kv_heads = kv.gist_k.shape[2]
    group = num_heads // num_kv_heads
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    queries = Queries(q, d_out, jnp.stack([lse, delta], axis=2))
    dq_ref = jax.new_ref(jnp.zeros(q.shape, jnp.float32))

    def source(name, k, v, lo, hi, heads, splits):
        grads = _source_backward(queries, k, v, RowRanges(lo, hi), segment, dq_ref, heads, splits, blocks, name)
        grads = [x[..., : k.shape[1], :, :] for x in grads]
        if heads < group:
            grads = [x.reshape(*x.shape[:3], num_kv_heads, -1, dim).sum(4) for x in grads]
        return [x.sum(0) if splits > 1 else x[0] for x in grads]

    d_sinks = (jnp.zeros_like(kv.sink_k), jnp.zeros_like(kv.sink_v))
    if layout.num_sinks:
        none = jnp.zeros_like(intervals.gist_lo[:1])
        sink_k, sink_v = kv.sink_k[None], kv.sink_v[None]
        grads = source("sinks", sink_k, sink_v, none, none + layout.num_sinks, 1, min(8, num_rows // 128))
        d_sinks = [x.astype(jnp.float32).sum(0) for x in grads]
    d_gists = source("gists", kv.gist_k, kv.gist_v, intervals.gist_lo, intervals.gist_hi, 1, 1)
    d_raws = source("raws", kv.raw_k, kv.raw_v, intervals.raw_lo, intervals.raw_hi, group, 1)
    d_q = (jax.freeze(dq_ref) * dim**-0.5).astype(q.dtype)
    d_kv = [x.astype(like.dtype) for x, like in zip((*d_sinks, *d_gists, *d_raws), kv, strict=True)]
    return d_q, type(kv)(*d_kv)
