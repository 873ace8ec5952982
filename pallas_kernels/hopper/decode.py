"""One decoding step of gist attention on Hopper: the cache read once, in place, by one Mosaic GPU kernel.

Axis legend
  B   batch                 Hq  query heads, Hkv  KV heads, A = Hq / Hkv, D  head dim
  G   gist slots, W  slots of the raw ring (see `pallas_kernels.decode_attention`), s  sinks
  M   rows of a KV head: the raw's A queries, then the gist's A queries; the matrix unit takes 64, the rest is garbage
  C   runs into which the key tiles of all sequences are cut; R  rows of a partial result, 2 A rounded up to 8

Key tiles of 64 keys (█ unmasked, ▒ masked) of all sequences lie end to end, without the gist slots after `unit`, and
are cut into C runs of equal length. A block takes one run of one KV head, so that all blocks run at once and end
together, however the lengths differ:

    sequence 0                                          sequence 1
    sinks    gists 0 … unit            raw ring         sinks    gists 0 … unit          raw ring
  [ █ █ |  █ █ █ █ █ █ █ █ █ █ █ ▒  |  ▒ ▒ ▒ ]        [ █ █ |  █ █ █ █ █ █ █ ▒  |  ▒ ▒ ▒ ]
  └─ run 0 ────────┴─ run 1 ─────────────┴─ run 2 ────────────────┴─ run 3 ─────────────┘

  warpgroup 2      TMA: streams key and value tiles through a ring of `stages` buffers (most of shared memory)
  warpgroups 0, 1  the even and the odd tiles of the run, each with a softmax of its own; then 0 merges the two

Each run leaves a normalised partial result and its base-2 log-sum-exp in global memory and raises a counter of the
sequence. The block with the last run of a sequence waits for the others and merges their results in order, so that
equal inputs give equal bits. It waits only on blocks before it, after its own work: none of them waits to be started.
"""

from __future__ import annotations

import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.backends import refusal_of
from pallas_kernels.hopper.op import DTYPES, HEAD_DIMS, pad_keys
from unigist_jax.layout import GistLayout

KEYS = 64
ROWS = 64
BLOCKS = 132  # multiprocessors of an H100 or H200
SHARED_BYTES = 226 * 1024  # of a block; 1 KiB less than there are, for barriers and alignment
MERGED_ROWS = 128  # of partial results, read at once by a merge: it waits for memory, not for arithmetic
MASKED = -1e9
WGMMA = plgpu.Layout.WGMMA
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
SINKS, GISTS, RAWS = 0, 1, 2


def decode_refusal(q, kv, layout: GistLayout) -> str | None:
    """Why the decoding kernel does not take these arguments; None if it does."""
    group = q.shape[2] // kv.gist_k.shape[2]
    if 2 * group > ROWS:
        return f"decodes at most {ROWS // 2} query heads per KV head, got {group}"
    return refusal_of(q, kv, layout, DTYPES, HEAD_DIMS)


def rows_layout(dim: int):
    """A layout of [R, D], R a multiple of 4: every warp holds whole rows, a lane D / 32 of their columns."""
    tiling = plgpu.Tiling(((4, dim), (dim // 32,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def run_begin(run, runs, total):
    """First of `total` key tiles that a run takes; it ends where the next one begins."""
    return lax.div(total * run, runs)


def run_of(tile, runs, total):
    """The run that takes a key tile: the last that begins at it or before."""
    return lax.div((tile + 1) * runs - 1, total)


def decode(
    q: Float[Array, "B 2 Hq D"],
    kv,
    layout: GistLayout,
    raw_index: Int32[Array, " B"],
    stages: int | None = None,
) -> Float[Array, "B 2 Hq D"]:
    """Hopper form of `pallas_kernels.decode_attention.decode_attention`; same arguments.

    Args:
      stages: key tiles in flight in a block, an even number: a warpgroup counts the uses of its own buffers. None: as
        many as fit shared memory.
    """
    batch, _, num_heads, dim = q.shape
    num_sinks, slots, num_kv_heads = kv.sink_k.shape[0], kv.raw_k.shape[1], kv.gist_k.shape[2]
    group = num_heads // num_kv_heads
    kv = type(kv)(*(pad_keys(x) for x in kv))
    sinks = (kv.sink_k, kv.sink_v) if num_sinks else ()
    sink_tiles, ring_tiles = -(-num_sinks // KEYS), -(-slots // KEYS)
    runs = max(1, min(BLOCKS // num_kv_heads, batch * (sink_tiles + ring_tiles + -(-kv.gist_k.shape[1] // KEYS))))
    part_rows = -(-2 * group // 8) * 8
    scale = dim**-0.5 * math.log2(math.e)
    across_rows = rows_layout(dim)
    together = MERGED_ROWS // part_rows
    if stages is None:
        fixed = ROWS * dim * (4 + q.dtype.itemsize) + part_rows * dim * q.dtype.itemsize + 4 * 1024
        stages = min(10, (SHARED_BYTES - fixed) // (4 * KEYS * dim * q.dtype.itemsize) * 2)
    if stages % 2:
        raise ValueError(f"stages={stages}: each warpgroup takes every second buffer, so there must be an even number")

    def kernel(q_ref, gk_ref, gv_ref, rk_ref, rv_ref, *refs):
        sink_refs, refs = refs[: len(sinks)], refs[len(sinks) :]
        index_ref, out_ref, part_ref, lse_ref, q_smem, k_smem, v_smem = refs[:7]
        acc_smem, top_smem, sum_smem, out_smem = refs[7:11]
        q_filled, q_freed, filled, freed, handed, taken = refs[11:]
        wg, block = lax.axis_index("wg"), lax.axis_index("block")
        kv_head, run = lax.rem(block, num_kv_heads), lax.div(block, num_kv_heads)
        heads = pl.ds(kv_head * group, group)

        def tiles_of(b):
            return sink_tiles + ring_tiles + 1 + lax.div(lax.div(index_ref[b], layout.ratio), KEYS)

        total = sum(tiles_of(b) for b in range(batch))
        used = jnp.minimum(total, runs)
        begin, stop = (run_begin(run + i, used, total) for i in (0, 1))

        def each_sequence(body):
            """Calls `body(b, start, end)` with each sequence and its range of key tiles."""

            def step(b, start):
                end = start + tiles_of(b)
                body(b, start, end)
                return end

            lax.fori_loop(0, batch, step, jnp.int32(0))

        def each_segment(body):
            """Calls `body(b, start, first, last)` with each sequence of the run and its tiles in the run."""

            def clipped(b, start, end):
                first, last = jnp.maximum(start, begin), jnp.minimum(end, stop)
                pl.when(first < last)(lambda: body(b, start, first, last))

            each_sequence(clipped)

        def locate(b, index):
            """Source of a sequence's tile, and the tile in it."""
            gist_end = tiles_of(b) - ring_tiles
            is_sink, is_gist = index < sink_tiles, index < gist_end
            source = jnp.where(is_sink, SINKS, jnp.where(is_gist, GISTS, RAWS))
            return source, index - jnp.where(is_sink, 0, jnp.where(is_gist, sink_tiles, gist_end))

        def attend(b, start, first, last):
            """This warpgroup's softmax state over its half of the tiles."""
            newest = index_ref[b]
            unit = lax.div(newest, layout.ratio)
            mine = first + lax.rem(first - begin + wg, jnp.int32(2))  # the run's even or odd tiles, across segments
            plgpu.barrier_wait(q_filled)

            def mask(scores, source, tile):
                row, key = (plgpu.broadcasted_iota(jnp.int32, scores.shape, i, layout=WGMMA) for i in (0, 1))
                key += tile * KEYS
                oldest = jnp.maximum(unit - layout.window_units, 0) * layout.ratio
                age = lax.rem(newest, slots) - key
                age = jnp.where(age < 0, age + slots, age)
                # each source masks its own columns: the gist's rows see one gist more, the ring goes by age
                is_gist, is_ring = (source == GISTS).astype(jnp.int32), (source == RAWS).astype(jnp.int32)
                end = (unit - num_sinks) * is_gist + (slots - num_sinks) * is_ring + num_sinks
                limit = end + jnp.where(row >= group, is_gist, 0)
                return jnp.where((key < limit) & (age * is_ring <= newest - oldest), scores, MASKED)

            def step(serial, state):
                acc, top, total = state
                index = mine + 2 * serial
                slot = lax.rem(index - begin, jnp.int32(stages))
                source, tile = locate(b, index - start)
                # anew in each step: kept in registers across steps, ptxas of CUDA 13.0 lets others overwrite them
                queries = plgpu.load(q_smem, layout=WGMMA, optimized=False)
                plgpu.barrier_wait(filled.at[slot])

                def scores_of(scores_ref):
                    plgpu.wgmma(scores_ref, queries, k_smem.at[slot].T)
                    return scores_ref[...]

                scores = pl.run_scoped(scores_of, plgpu.ACC((ROWS, KEYS), jnp.float32))
                full = ((source == GISTS) & ((tile + 1) * KEYS <= unit)) | (
                    (source == SINKS) & ((tile + 1) * KEYS <= num_sinks)
                )
                scores = lax.cond(full, lambda s: s, lambda s: mask(s, source, tile), scores)
                new_top = jnp.maximum(top, scores.max(axis=1) * scale)
                shrink = jnp.exp2(top - new_top)
                weights = jnp.exp2(scores * scale - lax.broadcast_in_dim(new_top, scores.shape, [0]))
                acc *= lax.broadcast_in_dim(shrink, acc.shape, [0])
                total = total * shrink + weights.sum(axis=1)
                narrow = weights.astype(q.dtype)
                acc = pl.run_state(lambda ref: plgpu.wgmma(ref, narrow, v_smem.at[slot]))(plgpu.ACC.init(acc))
                plgpu.barrier_arrive(freed.at[slot])
                return acc, new_top, total

            state = (
                plgpu.layout_cast(jnp.zeros((ROWS, dim), jnp.float32), WGMMA),
                plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), PER_ROW),
                plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), PER_ROW),
            )
            state = lax.fori_loop(0, lax.div(last - mine + 1, 2), step, state)
            plgpu.barrier_arrive(q_freed)
            return state

        @pl.when(wg == 1)
        def _hand_over():
            def segment(b, start, first, last):
                acc, top, total = attend(b, start, first, last)
                pl.when(first > begin)(lambda: plgpu.barrier_wait(taken))
                acc_smem[...], top_smem[...], sum_smem[...] = acc, top, total
                plgpu.commit_smem()
                plgpu.barrier_arrive(handed)

            each_segment(segment)

        @pl.when(wg == 0)
        def _merge():
            counters = pl.get_global(plgpu.SemaphoreType.REGULAR((batch * num_kv_heads,)))

            def segment(b, start, first, last):
                acc, top, total = attend(b, start, first, last)
                plgpu.barrier_wait(handed)
                acc_1 = plgpu.load(acc_smem, layout=WGMMA, optimized=False)
                top_1, total_1 = (plgpu.load(x, layout=PER_ROW, optimized=False) for x in (top_smem, sum_smem))
                new_top = jnp.maximum(top, top_1)
                shrink, shrink_1 = jnp.exp2(top - new_top), jnp.exp2(top_1 - new_top)
                total = total * shrink + total_1 * shrink_1
                acc *= lax.broadcast_in_dim(shrink / total, acc.shape, [0])
                acc_smem[...] = acc + acc_1 * lax.broadcast_in_dim(shrink_1 / total, acc.shape, [0])
                lse_ref.at[run + b, kv_head][...] = new_top + jnp.log2(total)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(acc_smem.at[pl.ds(0, part_rows)], part_ref.at[run + b, kv_head])
                plgpu.wait_smem_to_gmem(0)
                plgpu.barrier_arrive(taken)
                plgpu.semaphore_signal(counters.at[b * num_kv_heads + kv_head], memory_scope="gpu")

            each_segment(segment)

            def finish(b, start, end):
                """Merges a sequence's partial results, where its last tile was this block's."""
                first_run, last_run = (run_of(tile, used, total) for tile in (start, end - 1))

                @pl.when(last_run == run)
                def _():
                    parts = run - first_run + 1
                    counter = counters.at[b * num_kv_heads + kv_head]
                    plgpu.semaphore_wait(counter, parts, decrement=False, memory_scope="gpu")

                    def load(part):
                        at = first_run + jnp.minimum(part, parts - 1) + b
                        values = plgpu.load(part_ref.at[at, kv_head], layout=across_rows, optimized=False)
                        lse = plgpu.load(
                            lse_ref.at[at, kv_head, pl.ds(0, part_rows)], layout=across_rows.reduce(1), optimized=False
                        )
                        return values, lse + jnp.where(part < parts, 0.0, -jnp.inf)

                    def add(chunk, state):
                        acc, top, total = state
                        for values, lse in [load(chunk * together + i) for i in range(together)]:
                            new_top = jnp.maximum(top, lse)
                            shrink, weight = jnp.exp2(top - new_top), jnp.exp2(lse - new_top)
                            acc *= lax.broadcast_in_dim(shrink, acc.shape, [0])
                            acc += values * lax.broadcast_in_dim(weight, acc.shape, [0])
                            top, total = new_top, total * shrink + weight
                        return acc, top, total

                    state = (
                        plgpu.layout_cast(jnp.zeros((part_rows, dim), jnp.float32), across_rows),
                        plgpu.layout_cast(jnp.full((part_rows,), -jnp.inf, jnp.float32), across_rows.reduce(1)),
                        plgpu.layout_cast(jnp.zeros((part_rows,), jnp.float32), across_rows.reduce(1)),
                    )
                    acc, _, total_weight = lax.fori_loop(0, pl.cdiv(parts, together), add, state)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    out_smem[...] = (acc / lax.broadcast_in_dim(total_weight, acc.shape, [0])).astype(q.dtype)
                    plgpu.commit_smem()
                    for kind in (0, 1):
                        rows = pl.ds(kind * group, group)
                        plgpu.copy_smem_to_gmem(out_smem.at[rows], out_ref.at[b, kind, heads])

            each_sequence(finish)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(wg == 2)
        def _stream():
            sources = {GISTS: (gk_ref, gv_ref), RAWS: (rk_ref, rv_ref)}
            if sinks:
                sources[SINKS] = tuple(sink_refs)

            def segment(b, start, first, last):
                pl.when(first > begin)(lambda: plgpu.barrier_wait(q_freed))
                for kind in (0, 1):
                    rows = pl.ds(kind * group, group)
                    plgpu.copy_gmem_to_smem(q_ref.at[b, kind, heads], q_smem.at[rows], q_filled)

                @pl.loop(first, last)
                def _(index):
                    slot = lax.rem(index - begin, jnp.int32(stages))
                    source, tile = locate(b, index - start)
                    at = pl.ds(tile * KEYS, KEYS)

                    @pl.when(index - begin >= stages)
                    def _():
                        plgpu.barrier_wait(freed.at[slot])

                    for name, refs in sources.items():
                        where = (at, kv_head) if name == SINKS else (b, at, kv_head)

                        @pl.when(source == name)
                        def _(refs=refs, where=where):
                            plgpu.copy_gmem_to_smem(refs[0].at[where], k_smem.at[slot], filled.at[slot])
                            plgpu.copy_gmem_to_smem(refs[1].at[where], v_smem.at[slot], filled.at[slot])

            each_segment(segment)

    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    tiled32 = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
    out, _, _ = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((runs + batch - 1, num_kv_heads, part_rows, dim), jnp.float32),
            jax.ShapeDtypeStruct((runs + batch - 1, num_kv_heads, ROWS), jnp.float32),
        ),
        scratch_types=[
            plgpu.SMEM((ROWS, dim), q.dtype),
            plgpu.SMEM((stages, KEYS, dim), q.dtype, transforms=tiled),
            plgpu.SMEM((stages, KEYS, dim), q.dtype, transforms=tiled),
            plgpu.SMEM((ROWS, dim), jnp.float32, transforms=tiled32),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.SMEM((part_rows, dim), q.dtype),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_barriers=stages, num_arrivals=2),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(),
            plgpu.Barrier(),
        ],
        grid=(runs * num_kv_heads,),
        grid_names=("block",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="gist_attention_decode",
    )(q, kv.gist_k, kv.gist_v, kv.raw_k, kv.raw_v, *sinks, raw_index.astype(jnp.int32))
    return out
