"""Forward pass of gist attention on Hopper: one fused Mosaic GPU kernel.

Axis legend
  B   batch                 Hq  query heads, Hkv  KV heads, A = Hq / Hkv, D  head dim
  P   padded query rows [ raws | gists ] (plan.py)
  s   sinks, G  gist keys, R  raw keys, each cut into key tiles of `keys`

Key tiles that a query tile visits (█ unmasked, ▒ masked), for one document with r = 4, s = 128 and w = 128:

                    sinks    gists                             raws
  raws   tile 17    █        █ █ █ █ ▒                         ▒ ▒          the window and itself
  gists  tile 4     █        █ █ █ █ ▒ (the diagonal)          ▒ ▒ ▒        its own units' raws and the window

Packed documents move the left border: tiles before the document are not read, the one at its border is masked.

One block computes 128 query rows with three warpgroups:

  warpgroup 2      TMA: streams key and value tiles through a ring of `stages` buffers, unmasked tiles first
  warpgroups 0, 1  64 rows each against every key tile of the stream. A warpgroup issues the scores of a tile together
                   with the output of the tile before, and computes the tile's softmax while the latter is computed.
                   The two take turns at issuing, so that one is in its products while the other is in its softmax:

                   warpgroup 0     scores 2, output 1   softmax 2    scores 3, output 2   softmax 3   …
                   warpgroup 1          softmax 1     scores 2, output 1   softmax 2    scores 3, output 2   …

With an even number of query heads per KV head the two warpgroups hold the same 64 rows of two heads, else 128 rows of
one: the former visits fewer key tiles. Blocks run from the heaviest query tile to the lightest, one KV head after
another, so that the keys of a head stay in the L2 cache.

Scores are kept in base 2. A masked score is a large negative number, not -inf: a row that has seen no key yet sums
nonsense that its first key wipes out, and no guard is needed. `lse` is the base-2 logarithm of the softmax's sum.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int32

from pallas_kernels.hopper.blocks import ForwardBlocks
from pallas_kernels.hopper.plan import RowIntervals, Segment, forward_table
from unigist_jax.layout import Array, GistLayout

ROWS = 64  # query rows of a warpgroup
MASKED = -1e9
WGMMA = plgpu.Layout.WGMMA
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
SINKS, GISTS, RAWS = 0, 1, 2


class KeyStream(NamedTuple):
    """The key tiles of one query tile, in the order of the stream: scalars of its line in `forward_table`."""

    gists: tuple  # first, full_first, full_last, last
    raws: tuple
    full_sinks: int
    part_sinks: int

    @property
    def num_full(self):
        return self.full_sinks + (self.gists[2] - self.gists[1]) + (self.raws[2] - self.raws[1])

    @property
    def num_tiles(self):
        return self.full_sinks + self.part_sinks + (self.gists[3] - self.gists[0]) + (self.raws[3] - self.raws[0])

    def locate(self, index):
        """Source and key tile of the stream's tile `index`."""
        runs = [
            (SINKS, 0, self.full_sinks),
            (GISTS, self.gists[1], self.gists[2] - self.gists[1]),
            (RAWS, self.raws[1], self.raws[2] - self.raws[1]),
            (SINKS, self.full_sinks, self.part_sinks),
            (GISTS, self.gists[0], self.gists[1] - self.gists[0]),
            (GISTS, self.gists[2], self.gists[3] - self.gists[2]),
            (RAWS, self.raws[0], self.raws[1] - self.raws[0]),
            (RAWS, self.raws[2], self.raws[3] - self.raws[2]),
        ]
        source, tile = jnp.int32(RAWS), jnp.int32(0)
        begin = jnp.int32(0)
        for run_source, first, count in runs:
            inside = (index >= begin) & (index < begin + count)
            source = jnp.where(inside, run_source, source)
            tile = jnp.where(inside, first + index - begin, tile)
            begin = begin + count
        return source, tile


def read_stream(table, line, num_sinks: int, keys: int) -> tuple[jax.Array, KeyStream]:
    """The query tile of a line of the flat `forward_table` and the key tiles that it visits."""
    values = [table[line * 16 + i] for i in range(9)]
    full, rest = divmod(num_sinks, keys)
    return values[0], KeyStream(tuple(values[1:5]), tuple(values[5:9]), full, int(rest > 0))


def load_keys(stream: KeyStream, index, serial, sources, rings, batch, head, stages: int, keys: int):
    """Copies one key tile of a stream into every ring (by the TMA warpgroup).

    Args:
      index: the tile's place in the stream; `serial` its place among all tiles that the block loads.
      sources: per source its references in global memory, one for each ring.
      rings: per ring its shared buffers, the barriers that fill them and the barriers that free them.
    """
    slot = lax.rem(serial, jnp.int32(stages))
    source, tile = stream.locate(index)
    rows = pl.ds(tile * keys, keys)
    for ring, (buffers, filled, freed) in enumerate(rings):

        @pl.when(serial >= stages)
        def _(freed=freed):
            plgpu.barrier_wait(freed.at[slot])

        for name, refs in sources.items():
            where = (rows, head) if name == SINKS else (batch, rows, head)

            @pl.when(source == name)
            def _(ref=refs[ring], where=where, buffers=buffers, filled=filled):
                plgpu.copy_gmem_to_smem(ref.at[where], buffers.at[slot], filled.at[slot])


class RowMask(NamedTuple):
    """Per-row intervals of a warpgroup's rows, int32 vectors in the row layout."""

    gist_lo: jax.Array
    gist_hi: jax.Array
    raw_lo: jax.Array
    raw_hi: jax.Array
    num_sinks: int

    @staticmethod
    def read(refs, row, num_sinks: int) -> RowMask:
        """Loads the intervals of 64 rows from `row` on, from flat arrays."""
        vectors = [plgpu.load(ref.at[pl.ds(row, ROWS)], layout=PER_ROW, optimized=False) for ref in refs]
        return RowMask(*vectors, num_sinks)

    def apply(self, scores, source, tile, keys: int):
        """The scores with those of unseen keys masked."""
        is_raw = (source == RAWS).astype(jnp.int32)
        lo = self.gist_lo + (self.raw_lo - self.gist_lo) * is_raw
        hi = self.gist_hi + (self.raw_hi - self.gist_hi) * is_raw
        if self.num_sinks % keys:
            is_sink = (source == SINKS).astype(jnp.int32)
            lo = lo * (1 - is_sink)
            hi = hi + (self.num_sinks - hi) * is_sink
        column = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=WGMMA) + tile * keys
        visible = (column >= lax.broadcast_in_dim(lo, scores.shape, [0])) & (
            column < lax.broadcast_in_dim(hi, scores.shape, [0])
        )
        return jnp.where(visible, scores, MASKED)


def heads_per_block(num_heads: int, num_kv_heads: int) -> int:
    """Query heads that a block's two warpgroups hold: 2 where the KV head is shared by an even number, else 1."""
    return 2 if (num_heads // num_kv_heads) % 2 == 0 else 1


def forward_tables(
    q, kv, layout: GistLayout, segment: Segment, intervals: RowIntervals, blocks: ForwardBlocks, regular: bool
) -> Int32[Array, "S M 16"]:
    """The `forward_table` of the kernel's tiles; regular: no packed documents."""
    pair = heads_per_block(q.shape[2], kv.gist_k.shape[2])
    return forward_table(layout, segment, intervals, ROWS * 2 // pair, blocks.keys, regular)


def gist_attention_forward(
    q: Float[Array, "B P Hq D"],
    kv,
    layout: GistLayout,
    intervals: RowIntervals,
    table: Int32[Array, "S M 16"],
    blocks: ForwardBlocks,
) -> tuple[Float[Array, "B P Hq D"], Float[Array, "B Hq P"]]:
    """Output and base-2 log-sum-exp of every padded row (rows of padding hold finite nonsense).

    Args:
      q: queries, padded as `segment.pad` pads them, bf16 or fp16; D is 64 or 128.
      kv: a `GistKV` of the same dtype.
      intervals: what each row sees.
      table: `forward_tables` of the same arguments.
    """
    batch, num_rows, num_heads, dim = q.shape
    num_kv_heads = kv.gist_k.shape[2]
    pair = heads_per_block(num_heads, num_kv_heads)
    tile_rows = ROWS * 2 // pair
    keys, stages = blocks.keys, blocks.stages
    num_sinks = layout.num_sinks
    num_tiles, per_kv = num_rows // tile_rows, num_heads // num_kv_heads // pair
    scale = dim**-0.5 * math.log2(math.e)
    sinks = (kv.sink_k, kv.sink_v) if num_sinks else ()

    num_items = batch * num_kv_heads * num_tiles * per_kv
    per_batch = table.shape[0] > 1
    intervals = [x.reshape(-1) for x in intervals]

    def kernel(q_ref, gk_ref, gv_ref, rk_ref, rv_ref, *refs):
        sink_refs, refs = refs[: len(sinks)], refs[len(sinks) :]
        table_ref, *row_refs, out_ref, lse_ref, q_smem2, out_smem2, k_smem, v_smem, lse_smem2 = refs[:12]
        q_filled, q_freed, k_filled, v_filled, k_freed, v_freed, turn = refs[12:]
        wg, block = lax.axis_index("wg"), lax.axis_index("block")

        def item_of(number):
            """Batch, KV head, first query head, first row and keys of the block's tile `number`."""
            item = jnp.minimum(block * blocks.items + number, num_items - 1)
            head_in_group, rest = lax.rem(item, per_kv), lax.div(item, per_kv)
            line, rest = lax.rem(rest, num_tiles), lax.div(rest, num_tiles)
            kv_head, b = lax.rem(rest, num_kv_heads), lax.div(rest, num_kv_heads)
            tile, stream = read_stream(table_ref, table_of(b) * num_tiles + line, num_sinks, keys)
            return b, kv_head, (kv_head * per_kv + head_in_group) * pair, tile * tile_rows, stream

        def table_of(b):
            return b if per_batch else 0

        my_items = jnp.minimum(blocks.items, num_items - block * blocks.items)

        @pl.when(wg < 2)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            q_smem, out_smem, lse_smem = q_smem2.at[wg], out_smem2.at[wg], lse_smem2.at[wg]

            def await_turn():
                plgpu.barrier_wait(turn.at[wg])

            def pass_turn():
                plgpu.barrier_arrive(turn.at[1 - wg])

            def softmax_of(acc_ref, q_smem, mask, stream, served):
                """Unnormalised output, maximum and sum of the weights of 64 rows over the tiles of a stream."""
                scores_acc = plgpu.ACC((ROWS, keys), jnp.float32)

                def slot_of(index):
                    return lax.rem(served + index, jnp.int32(stages))

                def weigh(index, scores, maximum, total, masked):
                    """Frees the keys. Weights, new maximum and total, and the factor that shrinks the output so far."""
                    plgpu.barrier_arrive(k_freed.at[slot_of(index)])
                    plgpu.barrier_arrive(q_freed, predicate=index + 1 == stream.num_tiles)

                    def apply(scores):
                        source, key_tile = stream.locate(index)
                        return mask.apply(scores, source, key_tile, keys)

                    if masked is None:
                        scores = lax.cond(stream.num_full > 0, lambda s: s, apply, scores)
                    elif masked:
                        scores = apply(scores)
                    new_maximum = jnp.maximum(maximum, scores.max(axis=1) * scale)
                    shrink = jnp.exp2(maximum - new_maximum)
                    weights = jnp.exp2(scores * scale - lax.broadcast_in_dim(new_maximum, scores.shape, [0]))
                    total = total * shrink + weights.sum(axis=1)
                    return weights, new_maximum, total, shrink

                def first_scores(scores_ref):
                    plgpu.barrier_wait(k_filled.at[slot_of(0)])
                    await_turn()
                    plgpu.wgmma(scores_ref, q_smem, k_smem.at[slot_of(0)].T)
                    pass_turn()
                    return scores_ref[...]

                maximum = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), PER_ROW)
                total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), PER_ROW)
                plgpu.barrier_wait(q_filled)
                weights, maximum, total, _ = weigh(0, pl.run_scoped(first_scores, scores_acc), maximum, total, None)

                def step(index, state, masked):
                    weights, maximum, total = state
                    slot, before = slot_of(index), slot_of(index - 1)
                    plgpu.barrier_wait(k_filled.at[slot])
                    plgpu.barrier_wait(v_filled.at[before])
                    await_turn()

                    def multiply(scores_ref):
                        plgpu.wgmma(scores_ref, q_smem, k_smem.at[slot].T)
                        plgpu.wgmma(acc_ref, weights, v_smem.at[before])
                        pass_turn()
                        return plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)

                    scores = pl.run_scoped(multiply, scores_acc)
                    weights, maximum, total, shrink = weigh(index, scores, maximum, total, masked)
                    weights, maximum, total, shrink = lax.optimization_barrier((weights, maximum, total, shrink))
                    acc = acc_ref[...]
                    # rounded only now: the product that has just ended may have been reading the registers
                    weights = lax.optimization_barrier(weights).astype(q.dtype)
                    plgpu.barrier_arrive(v_freed.at[before])
                    acc_ref[...] = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
                    return weights, maximum, total

                state = (weights.astype(q.dtype), maximum, total)
                masked_from = jnp.maximum(stream.num_full, 1)
                state = lax.fori_loop(1, masked_from, lambda i, s: step(i, s, masked=False), state)
                state = lax.fori_loop(masked_from, stream.num_tiles, lambda i, s: step(i, s, masked=True), state)
                weights, maximum, total = state
                last = slot_of(stream.num_tiles - 1)
                plgpu.barrier_wait(v_filled.at[last])
                await_turn()
                plgpu.wgmma(acc_ref, weights, v_smem.at[last])
                pass_turn()
                acc = acc_ref[...]
                plgpu.barrier_arrive(v_freed.at[last])
                return acc, maximum, total

            def attend(b, first_head, first_row, stream, served):
                head = first_head + (wg if pair == 2 else 0)
                row = first_row + (0 if pair == 2 else wg * ROWS)
                mask = RowMask.read(row_refs, table_of(b) * num_rows + row, num_sinks)
                acc, maximum, total = pl.run_scoped(
                    lambda acc_ref: softmax_of(acc_ref, q_smem, mask, stream, served),
                    plgpu.ACC((ROWS, dim), jnp.float32),
                )
                total = jnp.maximum(total, 1e-30)
                acc *= lax.broadcast_in_dim(1.0 / total, acc.shape, [0])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_smem[...] = acc.astype(q.dtype)
                lse_smem[...] = maximum + jnp.log(total) * math.log2(math.e)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_smem, out_ref.at[b, pl.ds(row, ROWS), head])
                plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[b, head, pl.ds(row, ROWS)])

            def item(number, served):
                b, _, first_head, first_row, stream = item_of(number)
                attend(b, first_head, first_row, stream, served)
                return served + stream.num_tiles

            pl.when(wg == 1)(pass_turn)  # warpgroup 0 begins
            lax.fori_loop(0, my_items, item, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(wg == 2)
        def _stream():
            plgpu.set_max_registers(24, action="decrease")
            sources = {GISTS: (gk_ref, gv_ref), RAWS: (rk_ref, rv_ref)}
            if sinks:
                sources[SINKS] = tuple(sink_refs)
            rings = (k_smem, k_filled, k_freed), (v_smem, v_filled, v_freed)

            def serve(number, b, kv_head, first_head, first_row, stream, served):
                def load(index):
                    load_keys(stream, index, served + index, sources, rings, b, kv_head, stages, keys)

                load(0)

                @pl.when(number > 0)
                def _():
                    plgpu.barrier_wait(q_freed)

                for i in range(2):
                    head, row = (first_head + i, first_row) if pair == 2 else (first_head, first_row + i * ROWS)
                    plgpu.copy_gmem_to_smem(q_ref.at[b, pl.ds(row, ROWS), head], q_smem2.at[i], q_filled)
                pl.loop(1, stream.num_tiles)(load)

            def item(number, served):
                b, kv_head, first_head, first_row, stream = item_of(number)
                serve(number, b, kv_head, first_head, first_row, stream, served)
                return served + stream.num_tiles

            lax.fori_loop(0, my_items, item, jnp.int32(0))

    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    run = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, num_heads, num_rows), jnp.float32),
        ),
        scratch_types=[
            plgpu.SMEM((2, ROWS, dim), q.dtype, transforms=tiled),
            plgpu.SMEM((2, ROWS, dim), q.dtype, transforms=tiled),
            plgpu.SMEM((stages, keys, dim), q.dtype, transforms=tiled),
            plgpu.SMEM((stages, keys, dim), q.dtype, transforms=tiled),
            plgpu.SMEM((2, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages, num_arrivals=2),
            plgpu.Barrier(num_barriers=stages, num_arrivals=2),
            plgpu.Barrier(num_barriers=2),
        ],
        grid=(pl.cdiv(num_items, blocks.items),),
        grid_names=("block",),
        num_threads=3,
        thread_name="wg",
        # no thread reads shared memory that it writes: the barriers that Pallas adds around each access are not needed
        compiler_params=plgpu.CompilerParams(
            approx_math=True, reduction_scratch_bytes=512, unsafe_no_auto_barriers=True
        ),
        kernel_name="gist_attention_forward",
    )
    return run(q, kv.gist_k, kv.gist_v, kv.raw_k, kv.raw_v, *sinks, table.reshape(-1), *intervals)
