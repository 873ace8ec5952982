"""Backward pass of gist attention on Hopper: one fused Mosaic GPU kernel, one launch for all keys.

Axis legend
  B   batch                 Hq  query heads, Hkv  KV heads, A = Hq / Hkv, D  head dim
  P   padded query rows [ raws | gists ] (plan.py), cut into M tiles of `tile_rows`
  N   key tiles of 128 keys: those of the sinks, then of the gists, then of the raws

A block owns one key tile and walks over the query tiles that see it (█ unmasked, ▒ masked), last tile first:

  query tiles             raws                                 gists
  sink tile 0             █ █ █ █ █ █ █ █ █ █ █ █ █ █ █ █      █ █ █ █            every query
  gist tile 2                             ▒ █ █ █ █ █ █ █          ▒ █            every later query of the document
  raw tile 5                        ▒ ▒ ▒ ▒                      ▒ ▒              its own window only

  per step, S = K Q',  dP = V dO',  P = exp2(S - lse),  dS = P (dP - delta), all [keys, queries]:
      dV += P dO      dK += dS Q      dQ[tile] += dS' K

  warpgroups 0, 1    64 keys each; dK and dV stay in registers; dS crosses shared memory, and each warpgroup computes
                     half of a tile's dQ over all 128 keys
  warpgroup 2        warp 0 streams query tiles (q, dO, lse, delta, ranges) through a ring of `stages` buffers;
                     warps 1 and 2 take turns at adding a tile's dQ to a float32 array in global memory

A step's dQ is computed one step late, so that neither warpgroup waits for the other's dS, and the products of a step
overlap the next step's (dK, dV and dQ in flight while the exponentials are computed):

  warpgroup 0     S, dP (i)   exp    dS (i)   dV (i), dQ (i - 1), dK (i)   store dQ (i - 1)   S, dP (i + 1)  …
  warpgroup 1             S, dP (i)   exp    dS (i)   dV (i), dQ (i - 1), dK (i)   store dQ (i - 1)  …

Determinism: the additions to one query tile happen in the order of the key tiles; the first one stores. An addition
waits on the tile's counter until its predecessors have landed, and raises it when it has landed itself. Blocks start in
that order and every block walks its queries in the same direction, so they queue up staggered by one step and hardly
wait. For sinks and gists each query head has its own block (partial dK and dV in float32, summed afterwards); raw key
tiles, which few queries see, take a whole group of query heads, and come last to fill the gaps.

A walk over a long row can be cut into pieces with a block each. The blocks then go piece by piece over the row, so that
its query tiles stay in L2 while the blocks of all key tiles come by:

                                        raws                              gists
  block 0, 1, 2   sink tile 0, gist tile 0, 1                  ██████                     ███    the last piece
  block 3, 4, 5   the same                          ██████                         ███           …

The blocks of a key tile add their dK and dV in the order of the pieces, by a counter as well. Packed documents cut the
walks of the sinks alone: their own walks are short, and all wait for that of the sinks.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int32

from pallas_kernels.hopper.blocks import BackwardBlocks
from pallas_kernels.hopper.plan import RowIntervals, Segment, backward_tables
from pallas_kernels.ranges import RowRanges
from unigist_jax.layout import Array, GistLayout, namespace

KEYS = 128  # keys of a block, 64 a warpgroup
MASKED = -1e9
SINKS, GISTS, RAWS = 0, 1, 2
WGMMA = plgpu.Layout.WGMMA
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)


class Walk(NamedTuple):
    """The query tiles of one block, as scalars; gists' rows come first, each part last tile first."""

    raw_first: jax.Array
    raw_last: jax.Array
    gist_first: jax.Array
    gist_last: jax.Array

    @property
    def per_head(self):
        return (self.raw_last - self.raw_first) + (self.gist_last - self.gist_first)

    def tile(self, index):
        """The query tile at a place of the walk over one head."""
        gists = self.gist_last - self.gist_first
        return jnp.where(index < gists, self.gist_last - 1 - index, self.raw_last - 1 - (index - gists))

    def locate(self, step):
        """Head (of the block's) and query tile of a step."""
        per_head = jnp.maximum(self.per_head, 1)
        return lax.div(step, per_head), self.tile(lax.rem(step, per_head))


class Grid(NamedTuple):
    """Blocks: first one for each query head and each key tile of sinks and gists, then one for a group and raw tile."""

    batch: int
    heads: int
    kv_heads: int
    tiles: tuple[int, int, int]  # key tiles of sinks, gists and raws
    shared_walks: int  # walks over a head, or pieces of them, of the key tiles of sinks and gists
    interleaved: int  # query heads whose blocks alternate

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def shared_tiles(self) -> int:
        """Key tiles of sinks and gists."""
        return self.tiles[SINKS] + self.tiles[GISTS]

    @property
    def shared_blocks(self) -> int:
        return self.batch * self.heads * self.shared_walks

    @property
    def blocks(self) -> int:
        return self.shared_blocks + self.batch * self.kv_heads * self.tiles[RAWS]

    def place(self, block):
        """Sequence, walk and first query head of a block; walks, which get lighter, are the slower index."""
        raws = block >= self.shared_blocks
        block = jnp.where(raws, block - self.shared_blocks, block)
        heads = jnp.where(raws, self.kv_heads, self.interleaved)
        walks = jnp.where(raws, self.tiles[RAWS], self.shared_walks)
        rounds = jnp.where(raws, 1, self.heads // self.interleaved)
        head, block = lax.rem(block, heads), lax.div(block, heads)
        walk, block = lax.rem(block, walks), lax.div(block, walks)
        turn, b = lax.rem(block, rounds), lax.div(block, rounds)
        first_head = jnp.where(raws, head * self.group, turn * self.interleaved + head)
        return b, jnp.where(raws, self.shared_walks + walk, walk), first_head

    def source(self, key_tile):
        """Source of a key tile, and its index there."""
        source = (key_tile >= self.tiles[SINKS]).astype(jnp.int32) + (key_tile >= self.shared_tiles).astype(jnp.int32)
        before = jnp.where(source == RAWS, self.shared_tiles, jnp.where(source == GISTS, self.tiles[SINKS], 0))
        return source, key_tile - before


class BackwardTables(NamedTuple):
    """What the kernel reads of positions: each row's range of keys in each source, and `backward_tables`."""

    ranges: Int32[Array, "S 3 2 P"]
    walks: Int32[Array, "S K 6"]
    tiles: Int32[Array, "S 3 M 4"]


def query_tile(dim: int) -> int:
    """Rows of a query tile for a head dim."""
    return 64 if dim == 128 else 128


def cut_of(kv, num_tiles: int, blocks: BackwardBlocks) -> tuple[tuple[int, int, int], int, int]:
    """Key tiles of each source, into how many pieces walks over `num_tiles` query tiles are cut, and of how many."""
    key_tiles = tuple(-(-x.shape[-3] // KEYS) for x in (kv.sink_k, kv.gist_k, kv.raw_k))
    pieces = -(-num_tiles // blocks.walk) if blocks.walk else 1
    return key_tiles, pieces, key_tiles[SINKS] + (0 if blocks.sinks_alone else key_tiles[GISTS])


def tables_of(
    q, kv, layout: GistLayout, segment: Segment, intervals: RowIntervals, blocks: BackwardBlocks
) -> BackwardTables:
    """The tables for padded queries q, a `GistKV` and what each row sees."""
    xp, tile_rows = namespace(*intervals), query_tile(q.shape[-1])
    key_tiles, pieces, num_cut = cut_of(kv, segment.rows // tile_rows, blocks)
    none = xp.zeros_like(intervals.gist_lo)
    ranges = [RowRanges(none, none + layout.num_sinks), RowRanges(*intervals[:2]), RowRanges(*intervals[2:])]
    walks, tiles = backward_tables(segment, ranges, key_tiles, tile_rows, KEYS, pieces, num_cut)
    return BackwardTables(xp.stack([xp.stack(x, axis=1) for x in ranges], axis=1), walks, tiles)


def gist_attention_backward(
    q: Float[Array, "B P Hq D"],
    kv,
    out: Float[Array, "B P Hq D"],
    lse: Float[Array, "B Hq P"],
    d_out: Float[Array, "B P Hq D"],
    tables: BackwardTables,
    blocks: BackwardBlocks,
):
    """Gradients of q and of every part of kv, in their dtypes.

    Args:
      q, out, lse, d_out: padded rows; `lse` (base 2) must be so high in rows of padding that their weights vanish.
      kv: a `GistKV`; the sinks' gradients sum over the batch.
      tables: `tables_of` the same arguments.
    """
    batch, num_rows, num_heads, dim = q.shape
    num_kv_heads = kv.gist_k.shape[2]
    tile_rows, ds_slots = query_tile(dim), 3 if dim == 128 else 2
    num_tiles, group = num_rows // tile_rows, num_heads // num_kv_heads
    stages, ordered = blocks.stages, blocks.deterministic
    dtype = q.dtype
    scale = dim**-0.5 * math.log2(math.e)
    per_batch = len(tables.ranges) > 1
    sinks = (kv.sink_k, kv.sink_v) if kv.sink_k.shape[0] else ()
    interleaved = max(n for n in range(1, blocks.heads + 1) if num_heads % n == 0)
    key_tiles, pieces, _ = cut_of(kv, num_tiles, blocks)
    shared_walks = tables.walks.shape[1] - key_tiles[RAWS]
    grid = Grid(batch, num_heads, num_kv_heads, key_tiles, shared_walks, interleaved)

    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1)
    # XLA would write the sums transposed, row by row, several times slower
    delta = lax.optimization_barrier(delta).swapaxes(1, 2)

    def kernel(q_ref, do_ref, lse_ref, delta_ref, gk_ref, gv_ref, rk_ref, rv_ref, *refs):
        sink_refs, refs = refs[: len(sinks)], refs[len(sinks) :]
        ranges_ref, tiles_ref, walks_ref, dq_ref, *refs = refs
        dk_shared_ref, dv_shared_ref, dk_raw_ref, dv_raw_ref, *refs = refs
        k_smem, v_smem, q_smem, do_smem, stats_smem, ranges_smem, ds_smem, dq_smem, *refs = refs
        kv_filled, q_filled, do_filled, freed, ds_ready, dq_ready, dq_freed = refs
        wg = lax.axis_index("wg")
        b, line, first_head = grid.place(lax.axis_index("block"))
        at_batch = b if per_batch else 0
        line += at_batch * (shared_walks + key_tiles[RAWS])
        key_tile, *bounds, turn = (walks_ref[line * 6 + i] for i in range(6))
        source, index_in_source = grid.source(key_tile)
        walk = Walk(*bounds)
        steps = walk.per_head * jnp.where(source == RAWS, group, 1)

        if ordered or pieces > 1:  # of the additions to each query tile, then of those to each key tile
            num_counters = (num_tiles * ordered + grid.shared_tiles * (pieces > 1)) * num_heads * batch
            counters = pl.get_global(plgpu.SemaphoreType.REGULAR((num_counters,)))

        def of_tile(tile, column):
            return tiles_ref[((at_batch * 3 + source) * num_tiles + tile) * 4 + column]

        @pl.when((wg < 2) & (turn >= 0))
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            shape = (64, 64)  # of the scores that a warpgroup has in registers
            parts = [pl.ds(i, 64) for i in range(0, tile_rows, 64)]

            def across(x):
                return lax.broadcast_in_dim(x, shape, [1])

            def ds_slot_of(step):
                return lax.rem(step + 1, jnp.int32(ds_slots))

            def publish(ds, step, wg):
                for rows, part in zip(parts, ds, strict=True):
                    ds_smem.at[ds_slot_of(step), pl.ds(wg * 64, 64), rows][...] = part
                plgpu.commit_smem()
                plgpu.barrier_arrive(ds_ready.at[ds_slot_of(step)])

            def multiply_dq(dq_acc, step, wg):
                slot, my_half = ds_slot_of(step), pl.ds(wg * 64, 64)
                plgpu.barrier_wait(ds_ready.at[slot])
                if dim == 128:
                    plgpu.wgmma(dq_acc, ds_smem.at[slot].T, k_smem.at[:, my_half])
                else:
                    plgpu.wgmma(dq_acc, ds_smem.at[slot, :, my_half].T, k_smem)

            # dQ is handed over once for every step, and once before them all, where it is zero
            def await_handover(number):
                @pl.when(number >= 0)
                def _():
                    plgpu.barrier_wait(dq_freed.at[lax.rem(number, jnp.int32(2))])

            def hand_over(dq, number, wg):
                my_half = pl.ds(wg * 64, 64)
                dq_smem.at[(slice(None), my_half) if dim == 128 else my_half][...] = dq
                plgpu.commit_smem()
                plgpu.barrier_arrive(dq_ready.at[lax.rem(number, jnp.int32(2))])

            publish([plgpu.layout_cast(jnp.zeros(shape, dtype), WGMMA)] * len(parts), jnp.int32(-1), wg)
            plgpu.barrier_wait(kv_filled)

            def run_steps(accumulators):
                dk_acc, dv_acc = accumulators

                def step_of(step, index):
                    # hidden from the compiler, which would keep a matrix descriptor of every product in registers
                    my_wg = lax.optimization_barrier(wg)
                    slot, before = (lax.rem(step + i, jnp.int32(stages)) for i in (0, stages - 1))
                    tile = walk.tile(index)
                    full = (index_in_source >= of_tile(tile, 1)) & (index_in_source < of_tile(tile, 2))

                    def mask(scores, rows):
                        key = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=WGMMA)
                        key += index_in_source * KEYS + wg * 64
                        lo = plgpu.load(ranges_smem.at[slot, 0, rows], layout=PER_COLUMN)
                        scores = jnp.where(key >= across(lo), scores, MASKED)
                        scores = lax.optimization_barrier(scores)
                        hi = plgpu.load(ranges_smem.at[slot, 1, rows], layout=PER_COLUMN)
                        return jnp.where(key < across(hi), scores, MASKED)

                    plgpu.barrier_wait(q_filled.at[slot])

                    def gradient_of_scores(rows, scores_acc, dp_acc):
                        my_keys = pl.ds(lax.optimization_barrier(wg) * 64, 64)
                        plgpu.wgmma(scores_acc, k_smem.at[my_keys], q_smem.at[slot, rows].T)
                        if rows is parts[0]:
                            plgpu.barrier_wait(do_filled.at[slot])
                        plgpu.wgmma(dp_acc, v_smem.at[my_keys], do_smem.at[slot, rows].T)
                        scores = plgpu.wgmma_accumulator_load(scores_acc, wait_n=1)
                        if rows is parts[0]:  # all that the step before has multiplied is done, too
                            plgpu.barrier_arrive(freed.at[before], predicate=step > 0)
                        scores = lax.cond(full, lambda s: s, lambda s: mask(s, rows), scores)
                        lse = plgpu.load(stats_smem.at[slot, 0, rows], layout=PER_COLUMN)
                        weights = jnp.exp2(scores * scale - across(lse))
                        narrow = weights.astype(dtype)
                        dp = dp_acc[...]
                        delta = plgpu.load(stats_smem.at[slot, 1, rows], layout=PER_COLUMN)
                        ds = (weights * (dp - across(delta))).astype(dtype)
                        ds, narrow = lax.optimization_barrier((ds, narrow))
                        plgpu.wgmma(dv_acc, narrow, do_smem.at[slot, rows])
                        return ds

                    acc = plgpu.ACC(shape, jnp.float32)
                    ds = [pl.run_scoped(partial(gradient_of_scores, rows), acc, acc) for rows in parts]
                    # a slot may be written again when both warpgroups have used it: three steps ago, that is sure
                    if ds_slots == 2:
                        await_handover(step - 1)
                    publish(ds, step, my_wg)

                    def multiply(dq_acc):
                        multiply_dq(dq_acc, step - 1, my_wg)
                        for rows, part in zip(parts, ds, strict=True):
                            plgpu.wgmma(dk_acc, part, q_smem.at[slot, rows])
                        return plgpu.wgmma_accumulator_load(dq_acc, wait_n=len(parts))

                    dq = pl.run_scoped(multiply, plgpu.ACC((64, 64), jnp.float32))
                    if ds_slots != 2:
                        await_handover(step - 1)
                    hand_over(dq, step, my_wg)
                    return jnp.where(index + 1 == walk.per_head, 0, index + 1)

                lax.fori_loop(0, steps, step_of, jnp.int32(0))

            zeros = plgpu.layout_cast(jnp.zeros((64, dim), jnp.float32), WGMMA)
            dk, dv = pl.run_state(run_steps)((plgpu.ACC.init(zeros), plgpu.ACC.init(zeros)))

            def multiply_last(dq_acc):
                multiply_dq(dq_acc, steps - 1, wg)
                return dq_acc[...]

            dq = pl.run_scoped(multiply_last, plgpu.ACC((64, 64), jnp.float32))
            await_handover(steps - 1)
            hand_over(dq, steps, wg)
            dk *= dim**-0.5
            rows = pl.ds(index_in_source * KEYS + wg * 64, 64)

            @pl.when(source == RAWS)
            def _():
                where = (b, rows, lax.div(first_head, group))
                dk_raw_ref.at[where][...] = dk.astype(dtype)
                dv_raw_ref.at[where][...] = dv.astype(dtype)

            @pl.when(source != RAWS)
            def _():
                where = (b, pl.ds(key_tile * KEYS + wg * 64, 64), first_head)
                if pieces == 1:
                    dk_shared_ref.at[where][...] = dk
                    dv_shared_ref.at[where][...] = dv
                    return
                first_counter = num_tiles * ordered * num_heads * batch
                counter = counters.at[first_counter + (b * num_heads + first_head) * grid.shared_tiles + key_tile]
                plgpu.semaphore_wait(counter, 2 * turn, decrement=False, memory_scope="gpu")  # both warpgroups' signals
                for ref, x in ((dk_shared_ref, dk), (dv_shared_ref, dv)):
                    target = ref.at[where]

                    def added(x, target=target):
                        return x + plgpu.load(target, layout=WGMMA, optimized=False)

                    target[...] = lax.cond(turn > 0, added, lambda x: x, x)
                plgpu.commit_smem()  # the warpgroup's threads have all stored
                plgpu.semaphore_signal(counter, memory_scope="gpu")

        @pl.when((wg == 2) & (turn >= 0))
        def _serve():
            plgpu.set_max_registers(24, action="decrease")

            def load_keys():
                keys, head = pl.ds(index_in_source * KEYS, KEYS), lax.div(first_head, group)
                for name, parts in ((SINKS, sink_refs), (GISTS, (gk_ref, gv_ref)), (RAWS, (rk_ref, rv_ref))):
                    where = (keys, head) if name == SINKS else (b, keys, head)
                    for ref, smem in zip(parts, (k_smem, v_smem), strict=False):  # there may be no sinks

                        @pl.when(source == name)
                        def _(ref=ref, where=where, smem=smem):
                            plgpu.copy_gmem_to_smem(ref.at[where], smem, kv_filled)

            def load(step):
                slot = lax.rem(step, jnp.int32(stages))
                head, tile = walk.locate(step)
                head, at = first_head + head, pl.ds(tile * tile_rows, tile_rows)

                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(freed.at[slot])

                plgpu.copy_gmem_to_smem(q_ref.at[b, at, head], q_smem.at[slot], q_filled.at[slot])
                plgpu.copy_gmem_to_smem(lse_ref.at[b, head, at], stats_smem.at[slot, 0], q_filled.at[slot])
                plgpu.copy_gmem_to_smem(ranges_ref.at[at_batch, source, :, at], ranges_smem.at[slot], q_filled.at[slot])
                plgpu.copy_gmem_to_smem(do_ref.at[b, at, head], do_smem.at[slot], do_filled.at[slot])
                plgpu.copy_gmem_to_smem(delta_ref.at[b, head, at], stats_smem.at[slot, 1], do_filled.at[slot])

            def add_dq(step):
                number = lax.rem(step + 1, jnp.int32(2))
                head, tile = walk.locate(step)
                head = first_head + head
                target = dq_ref.at[b, pl.ds(tile * tile_rows, tile_rows), head]

                def add():
                    plgpu.copy_smem_to_gmem(dq_smem, target, reduction_op="add")

                if ordered:
                    counter = counters.at[(b * num_heads + head) * num_tiles + tile]
                    earlier = index_in_source + of_tile(tile, 0)
                    plgpu.semaphore_wait(counter, earlier, decrement=False, memory_scope="gpu")
                plgpu.barrier_wait(dq_ready.at[number])
                if ordered:
                    pl.when(earlier > 0)(add)
                    pl.when(earlier == 0)(lambda: plgpu.copy_smem_to_gmem(dq_smem, target))
                else:
                    add()
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(dq_freed.at[number])
                if ordered:
                    plgpu.wait_smem_to_gmem(0)
                    plgpu.semaphore_signal(counter, memory_scope="gpu")

            @plgpu.warp_map
            def _(warp):
                @pl.when(warp == 0)
                def _():
                    load_keys()
                    pl.loop(0, steps)(load)

                @pl.when(warp == 1)
                def _():
                    pl.loop(0, lax.div(steps + 1, jnp.int32(2)))(lambda i: add_dq(2 * i))

                @pl.when(warp == 2)
                def _():
                    plgpu.barrier_wait(dq_ready.at[0])  # the zeros before the first step: nothing to add
                    plgpu.barrier_arrive(dq_freed.at[0])
                    pl.loop(0, lax.div(steps, jnp.int32(2)))(lambda i: add_dq(2 * i + 1))

    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    tiled32 = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
    d_q = jax.ShapeDtypeStruct(q.shape, jnp.float32)
    d_shared = jax.ShapeDtypeStruct((batch, grid.shared_tiles * KEYS, num_heads, dim), jnp.float32)
    d_raw = jax.ShapeDtypeStruct((batch, key_tiles[RAWS] * KEYS, num_kv_heads, dim), dtype)
    run = plgpu.kernel(
        kernel,
        out_type=(*([d_q] if ordered else []), d_shared, d_shared, d_raw, d_raw),
        scratch_types=[
            plgpu.SMEM((KEYS, dim), dtype, transforms=tiled),
            plgpu.SMEM((KEYS, dim), dtype, transforms=tiled),
            plgpu.SMEM((stages, tile_rows, dim), dtype, transforms=tiled),
            plgpu.SMEM((stages, tile_rows, dim), dtype, transforms=tiled),
            plgpu.SMEM((stages, 2, tile_rows), jnp.float32),
            plgpu.SMEM((stages, 2, tile_rows), jnp.int32),
            plgpu.SMEM((ds_slots, KEYS, tile_rows), dtype, transforms=tiled),
            plgpu.SMEM((tile_rows, dim), jnp.float32, transforms=tiled32),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_barriers=stages, num_arrivals=3),
            plgpu.Barrier(num_barriers=stages, num_arrivals=2),
            plgpu.Barrier(num_barriers=stages, num_arrivals=2),
            plgpu.Barrier(num_barriers=ds_slots, num_arrivals=2),
            plgpu.Barrier(num_barriers=2, num_arrivals=2),
            plgpu.Barrier(num_barriers=2),
        ],
        grid=(grid.blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="wg",
        # no thread reads shared memory that it writes: the barriers that Pallas adds around each access are not needed
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name="gist_attention_backward",
    )
    keys = kv.gist_k, kv.gist_v, kv.raw_k, kv.raw_v, *sinks
    inputs = q, d_out, lse, delta, *keys, tables.ranges, tables.tiles.reshape(-1), tables.walks.reshape(-1)
    if ordered:
        d_q, *d_shared, d_raw_k, d_raw_v = run(*inputs)
    else:
        sums = jax.new_ref(jnp.zeros(q.shape, jnp.float32))
        *d_shared, d_raw_k, d_raw_v = run(*inputs, sums)
        d_q = jax.freeze(sums)
    d_shared = [x.reshape(batch, -1, num_kv_heads, group, dim) for x in d_shared]
    num_sinks, num_gists, first_gist = kv.sink_k.shape[0], kv.gist_k.shape[1], key_tiles[SINKS] * KEYS
    d_sinks = [x[:, :num_sinks].sum((0, 3)) for x in d_shared]
    d_gists = [x[:, first_gist : first_gist + num_gists].sum(3) for x in d_shared]
    d_raws = [x[:, : kv.raw_k.shape[1]] for x in (d_raw_k, d_raw_v)]
    d_kv = [x.astype(like.dtype) for x, like in zip((*d_sinks, *d_gists, *d_raws), kv, strict=True)]
    return (d_q * dim**-0.5).astype(dtype), type(kv)(*d_kv)
