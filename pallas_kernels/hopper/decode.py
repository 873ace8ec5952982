"""One decoding step of gist attention on Hopper: the cache read once, in place, by one Mosaic GPU kernel.

Axis legend
  B   batch                 Hq  query heads, Hkv  KV heads, A = Hq / Hkv, D  head dim
  G   gist slots, W  slots of the raw ring (see `pallas_kernels.decode_attention`), s  sinks
  N   rows of a KV head: the raw's A queries, then the gist's A queries, padded to 64 for the matrix unit
  C   splits of a sequence's key tiles among blocks

Key tiles of 64 keys of one sequence and one KV head (█ unmasked, ▒ masked), cut into C runs of equal length:

    sinks    gists 0 … unit                                    raw ring
  [ █ █ |    █ █ █ █ █ █ █ █ █ █ █ █ █ █ █ █ █ █ █ █ █ ▒   |   ▒ ▒ ▒ ]      slots after `unit` are never read
  └─ split 0 ──────┴─ split 1 ──────┴─ split 2 ──────┴─ split 3 ─────┘

  warpgroup 2      TMA: streams key and value tiles through a ring of `stages` buffers (most of shared memory)
  warpgroups 0, 1  the even and the odd tiles of the run, each with a softmax of its own

The 2 C partial outputs of a row are merged afterwards by their log-sum-exp. Sequences of different lengths take runs of
different lengths, read from `raw_index` on the device.
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
MASKED = -1e9
WGMMA = plgpu.Layout.WGMMA
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
SINKS, GISTS, RAWS = 0, 1, 2


def choose_splits(pairs: int, num_tiles: int) -> int:
    """Splits that fill the multiprocessors best for `pairs` of sequence and KV head; at least 4 key tiles a split."""
    most = max(1, min(64, num_tiles // 4))
    used = {c: pairs * c / (-(-pairs * c // BLOCKS) * BLOCKS) for c in range(1, most + 1)}
    return max(used, key=lambda c: (round(used[c], 2), -c))


def decode_refusal(q, kv, layout: GistLayout) -> str | None:
    """Why the decoding kernel does not take these arguments; None if it does."""
    group = q.shape[2] // kv.gist_k.shape[2]
    if 2 * group > ROWS:
        return f"decodes at most {ROWS // 2} query heads per KV head, got {group}"
    return refusal_of(q, kv, layout, DTYPES, HEAD_DIMS)


def decode(
    q: Float[Array, "B 2 Hq D"],
    kv,
    layout: GistLayout,
    raw_index: Int32[Array, " B"],
    stages: int = 6,
) -> Float[Array, "B 2 Hq D"]:
    """Hopper form of `pallas_kernels.decode_attention.decode_attention`; same arguments."""
    batch, _, num_heads, dim = q.shape
    num_sinks, slots, num_kv_heads = kv.sink_k.shape[0], kv.raw_k.shape[1], kv.gist_k.shape[2]
    group = num_heads // num_kv_heads
    kv = type(kv)(*(pad_keys(x) for x in kv))
    sinks = (kv.sink_k, kv.sink_v) if num_sinks else ()
    sink_tiles, ring_tiles = -(-num_sinks // KEYS), -(-slots // KEYS)
    splits = choose_splits(batch * num_kv_heads, sink_tiles + ring_tiles + -(-kv.gist_k.shape[1] // KEYS))
    scale = dim**-0.5 * math.log2(math.e)
    rows = q.reshape(batch, 2, num_kv_heads, group, dim).swapaxes(1, 2).reshape(batch, num_kv_heads, 2 * group, dim)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, ROWS - 2 * group), (0, 0)))
    extra = jnp.asarray(jnp.arange(ROWS) >= group, jnp.int32)  # the gist's rows see one gist more

    def kernel(q_ref, gk_ref, gv_ref, rk_ref, rv_ref, *refs):
        sink_refs, refs = refs[: len(sinks)], refs[len(sinks) :]
        index_ref, extra_ref, out_ref, lse_ref, q_smem, k_smem, v_smem = refs[:7]
        q_filled, filled, freed = refs[7:]
        wg, block = lax.axis_index("wg"), lax.axis_index("block")
        kv_head, rest = lax.rem(block, num_kv_heads), lax.div(block, num_kv_heads)
        split, b = lax.rem(rest, splits), lax.div(rest, splits)
        newest = index_ref[b]
        unit = lax.div(newest, layout.ratio)
        gist_tiles = lax.div(unit, KEYS) + 1
        num_tiles = sink_tiles + ring_tiles + gist_tiles
        begin, stop = (lax.div(num_tiles * (split + i), splits) for i in (0, 1))

        def locate(index):
            is_sink, is_gist = index < sink_tiles, index < sink_tiles + gist_tiles
            source = jnp.where(is_sink, SINKS, jnp.where(is_gist, GISTS, RAWS))
            return source, index - jnp.where(is_sink, 0, jnp.where(is_gist, sink_tiles, sink_tiles + gist_tiles))

        @pl.when(wg < 2)
        def _compute():
            zeros = plgpu.layout_cast(jnp.zeros((ROWS, dim), jnp.float32), WGMMA)
            maximum = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), PER_ROW)
            total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), PER_ROW)
            gist_hi = plgpu.load(extra_ref, layout=PER_ROW, optimized=False) + unit
            plgpu.barrier_wait(q_filled)

            def mask(scores, source, tile):
                key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=WGMMA) + tile * KEYS
                oldest = jnp.maximum(unit - layout.window_units, 0) * layout.ratio
                age = lax.rem(newest, slots) - key
                age = jnp.where(age < 0, age + slots, age)
                # each source masks its own columns: `limit` of the gists' rows, age of the ring's slots
                is_gist = (source == GISTS).astype(jnp.int32)
                is_ring = (source == RAWS).astype(jnp.int32)
                end = num_sinks * (1 - is_gist - is_ring) + slots * is_ring
                visible = key < lax.broadcast_in_dim(gist_hi * is_gist + end, scores.shape, [0])
                return jnp.where(visible & (age * is_ring <= newest - oldest), scores, MASKED)

            def step(serial, state):
                acc, maximum, total = state
                index = 2 * serial + wg
                slot = lax.rem(index, jnp.int32(stages))
                source, tile = locate(begin + index)
                plgpu.barrier_wait(filled.at[slot])

                def scores_of(scores_ref):
                    plgpu.wgmma(scores_ref, q_smem, k_smem.at[slot].T)
                    return scores_ref[...]

                scores = pl.run_scoped(scores_of, plgpu.ACC((ROWS, KEYS), jnp.float32))
                full = ((source == GISTS) & ((tile + 1) * KEYS <= unit)) | (
                    (source == SINKS) & ((tile + 1) * KEYS <= num_sinks)
                )
                scores = lax.cond(full, lambda s: s, lambda s: mask(s, source, tile), scores)
                new_maximum = jnp.maximum(maximum, scores.max(axis=1) * scale)
                shrink = jnp.exp2(maximum - new_maximum)
                weights = jnp.exp2(scores * scale - lax.broadcast_in_dim(new_maximum, scores.shape, [0]))
                acc *= lax.broadcast_in_dim(shrink, acc.shape, [0])
                total = total * shrink + weights.sum(axis=1)
                narrow = weights.astype(q.dtype)
                acc = pl.run_state(lambda ref: plgpu.wgmma(ref, narrow, v_smem.at[slot]))(plgpu.ACC.init(acc))
                plgpu.barrier_arrive(freed.at[slot])
                return acc, new_maximum, total

            mine = lax.div(stop - begin - wg + 1, 2)
            acc, maximum, total = lax.fori_loop(0, mine, step, (zeros, maximum, total))
            total = jnp.maximum(total, 1e-30)
            part = 2 * split + wg
            out_ref.at[part, b, kv_head][...] = acc * lax.broadcast_in_dim(1.0 / total, acc.shape, [0])
            lse_ref.at[part, b, kv_head][...] = jnp.maximum(maximum, MASKED) + jnp.log(total) * math.log2(math.e)

        @pl.when(wg == 2)
        def _stream():
            sources = {GISTS: (gk_ref, gv_ref), RAWS: (rk_ref, rv_ref)}
            if sinks:
                sources[SINKS] = tuple(sink_refs)
            plgpu.copy_gmem_to_smem(q_ref.at[b, kv_head], q_smem, q_filled)

            @pl.loop(0, stop - begin)
            def _(index):
                slot = lax.rem(index, jnp.int32(stages))
                source, tile = locate(begin + index)
                at = pl.ds(tile * KEYS, KEYS)

                @pl.when(index >= stages)
                def _():
                    plgpu.barrier_wait(freed.at[slot])

                for name, refs in sources.items():
                    where = (at, kv_head) if name == SINKS else (b, at, kv_head)

                    @pl.when(source == name)
                    def _(refs=refs, where=where):
                        plgpu.copy_gmem_to_smem(refs[0].at[where], k_smem.at[slot], filled.at[slot])
                        plgpu.copy_gmem_to_smem(refs[1].at[where], v_smem.at[slot], filled.at[slot])

    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    out, lse = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((2 * splits, batch, num_kv_heads, ROWS, dim), jnp.float32),
            jax.ShapeDtypeStruct((2 * splits, batch, num_kv_heads, ROWS), jnp.float32),
        ),
        scratch_types=[
            plgpu.SMEM((ROWS, dim), q.dtype, transforms=tiled),
            plgpu.SMEM((stages, KEYS, dim), q.dtype, transforms=tiled),
            plgpu.SMEM((stages, KEYS, dim), q.dtype, transforms=tiled),
            plgpu.Barrier(),
            plgpu.Barrier(num_barriers=stages, num_arrivals=2),
            plgpu.Barrier(num_barriers=stages),
        ],
        grid=(batch * splits * num_kv_heads,),
        grid_names=("block",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="gist_attention_decode",
    )(rows, kv.gist_k, kv.gist_v, kv.raw_k, kv.raw_v, *sinks, raw_index.astype(jnp.int32), extra)
    out, lse = out[..., : 2 * group, :], lse[..., : 2 * group, None]
    weights = jnp.exp2(lse - lse.max(axis=0))
    merged = (weights * out).sum(axis=0) / weights.sum(axis=0)
    merged = merged.reshape(batch, num_kv_heads, 2, group, dim).swapaxes(1, 2)
    return merged.reshape(q.shape).astype(q.dtype)
