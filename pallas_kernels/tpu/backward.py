"""Backward pass of gist attention on TPU: two Mosaic kernels, one for q's gradient, one for those of keys and values.

Axis legend
  B  batch               J  jobs: groups of query heads that share a KV head          D  head dim
  M  query tiles of C columns (positions times heads), N  key tiles of K keys (plan.py)

The first kernel walks as the forward pass does: a query tile over its key tiles. In the second a key tile walks over
the query tiles that see it (█ unmasked, ▒ masked), for every job of its KV head:

  query tiles                  raws                                 gists
  tile 0 (sinks and gists)     ▒ ▒ █ █ █ █ █ █ █ █ █ █ █ █ █ █      ▒ █ █ █       all, as it holds the sinks
  tile 2 (gists)                               ▒ █ █ █ █ █ █          ▒ █         every later query of the document
  tile 9 (raws)                            ▒ ▒ ▒                      ▒ ▒         its own window only

  S = K Q',  P = exp2(S - lse),  dP = V dO',  dS = P (dP - delta), all [K, C]:
      first kernel      dQ' += K' dS
      second kernel     dV  += P dO       dK += dS Q

Seven matrix products a pair where one fused kernel would need five. But each sum stays in one place while its kernel
walks, in an order that the tables fix, so the gradients are the same to the last bit in every run, and no array is
larger than the inputs. Both kernels stream their tiles as stream.py draws it.
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
from pallas_kernels.tpu.cost import key_cost, query_cost
from pallas_kernels.tpu.plan import KeyAxis, Segment, is_full
from pallas_kernels.tpu.query_tiles import over_query_tiles
from pallas_kernels.tpu.stream import BUFFERS, run_stream
from pallas_kernels.tpu.tiles import NN, NT, TN, dot, mask_scores, scores_of


def _weights_and_slopes(k, v, q_ref, do_ref, stats_ref, rows_ref, mask, parts):
    """For each part of the columns of a pair of tiles: the part, P and dS in float32 [K, part].

    `stats_ref` [2, C]: log-sum-exp and row sums of dO * out.
    """
    products = [(mask(scores_of(k, q_ref[part]), rows_ref.at[:, part]), dot(v, do_ref[part], NT)) for part in parts]
    for part, (scores, d_weights) in zip(parts, products, strict=True):
        weights = jnp.exp2(scores - stats_ref[0:1, part])
        yield part, weights, weights * (d_weights - stats_ref[1:2, part])


def query_gradient(
    q: Float[Array, "B J M C D"],
    d_out: Float[Array, "B J M C D"],
    stats: Float[Array, "B J M 2 C"],
    k: Float[Array, "B Hkv N K D"],
    v: Float[Array, "B Hkv N K D"],
    intervals: Int32[Array, "S M 4 C"],
    table: Int32[Array, "S M L"],
    segment: Segment,
    axis: KeyAxis,
    layout,
) -> Float[Array, "B J M C D"]:
    """Gradient of q, in its dtype and tiles."""
    columns, dim = q.shape[3:]

    def tile_kernel(walk, q_ref, do_ref, stats_ref, rows_ref, dq_ref, k_buf, v_buf, acc):
        acc[...] = jnp.zeros_like(acc)

        def step(buffer, mask):
            k_tile = k_buf[buffer]
            refs = q_ref, do_ref, stats_ref, rows_ref
            for part, _, slopes in _weights_and_slopes(k_tile, v_buf[buffer], *refs, mask, segment.parts):
                acc[:, part] += dot(k_tile, slopes.astype(k_tile.dtype), TN)

        walk(step)
        dq_ref[...] = (acc[...] * dim**-0.5).T.astype(dq_ref.dtype)

    [d_q] = over_query_tiles(
        tile_kernel,
        (q, d_out, stats),
        k,
        v,
        intervals,
        table,
        outputs=[jax.ShapeDtypeStruct(q.shape, q.dtype)],
        scratch=[pltpu.VMEM((dim, columns), jnp.float32)],
        axis=axis,
        cost=query_cost(layout, segment, axis, q, k),
        name="gist_attention_backward_q",
    )
    return d_q


def key_gradients(
    q: Float[Array, "B J M C D"],
    d_out: Float[Array, "B J M C D"],
    stats: Float[Array, "B J M 2 C"],
    k: Float[Array, "B Hkv N K D"],
    v: Float[Array, "B Hkv N K D"],
    intervals: Int32[Array, "S M 4 C"],
    table: Int32[Array, "S M L"],
    visitors: Int32[Array, "S N 4"],
    segment: Segment,
    axis: KeyAxis,
    layout,
) -> tuple[Float[Array, "B Hkv N K D"], Float[Array, "B Hkv N K D"]]:
    """Gradients of k and v in float32."""
    batch, jobs, num_tiles, columns, dim = q.shape
    num_kv_heads, num_key_tiles = k.shape[1:3]
    per_kv_head, per_batch = jobs // num_kv_heads, int(table.shape[0] > 1)

    def kernel(table_ref, visitors_ref, k_ref, v_ref, q_hbm, do_hbm, stats_hbm, rows_hbm, *refs):
        dk_ref, dv_ref, q_buf, do_buf, stats_buf, rows_buf, serial, sems = refs
        b, kv_head, key_tile = (pl.program_id(i) for i in range(3))
        at_batch = b * per_batch
        dk_ref[...] = jnp.zeros_like(dk_ref)
        dv_ref[...] = jnp.zeros_like(dv_ref)

        def work(step):
            line = (at_batch * num_key_tiles + step) * 4
            raw_first, raw_last, gist_first, gist_last = (visitors_ref[line + i] for i in range(4))
            return raw_first, raw_last - raw_first, gist_first, gist_last - gist_first

        def locate(step, index):
            """Job of the KV head's, and query tile, of a step's tile `index`."""
            raw_first, raws, gist_first, gists = work(step)
            job = lax.div(index, raws + gists)
            index -= job * (raws + gists)
            return job, jnp.where(index < raws, raw_first + index, gist_first + index - raws)

        def count_of(step):
            _, raws, _, gists = work(step)
            return per_kv_head * (raws + gists)

        def copies(step, index, buffer):
            job, tile = locate(step, index)
            job += kv_head * per_kv_head
            pairs = (
                (q_hbm.at[b, job, tile], q_buf),
                (do_hbm.at[b, job, tile], do_buf),
                (stats_hbm.at[b, job, tile], stats_buf),
                (rows_hbm.at[at_batch, tile], rows_buf),
            )
            return [
                pltpu.make_async_copy(source, ring.at[buffer], sems.at[i, buffer])
                for i, (source, ring) in enumerate(pairs)
            ]

        def body(index, buffer):
            refs = [ring.at[buffer] for ring in (q_buf, do_buf, stats_buf, rows_buf)]

            def step(mask):
                for part, weights, slopes in _weights_and_slopes(k_ref[...], v_ref[...], *refs, mask, segment.parts):
                    q_part, do_part = refs[0][part], refs[1][part]
                    dv_ref[...] += dot(weights.astype(do_part.dtype), do_part, NN)
                    dk_ref[...] += dot(slopes.astype(q_part.dtype), q_part, NN) * dim**-0.5

            _, tile = locate(key_tile, index)
            full = is_full(table_ref, at_batch * num_tiles + tile, key_tile)
            raws = key_tile >= axis.raw_tile
            pl.when(full)(lambda: step(lambda scores, _: scores))
            for kind in (False, True):
                mask = functools.partial(mask_scores, key_tile=key_tile, axis=axis, raws=kind)
                pl.when(~full & (raws == kind))(functools.partial(step, mask))

        run_stream(key_tile, num_key_tiles, count_of, copies, serial, body)

    keys_of_tile = pl.BlockSpec((None, None, None, axis.keys, dim), lambda b, h, n, *_: (b, h, n, 0, 0))
    gradient = jax.ShapeDtypeStruct(k.shape, jnp.float32)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(batch, num_kv_heads, num_key_tiles),
        in_specs=[keys_of_tile, keys_of_tile, *[pl.BlockSpec(memory_space=pltpu.HBM)] * 4],
        out_specs=[keys_of_tile, keys_of_tile],
        scratch_shapes=[
            pltpu.VMEM((BUFFERS, columns, dim), q.dtype),
            pltpu.VMEM((BUFFERS, columns, dim), d_out.dtype),
            pltpu.VMEM((BUFFERS, 2, columns), jnp.float32),
            pltpu.VMEM((BUFFERS, 4, columns), jnp.int32),
            pltpu.SMEM((1,), jnp.int32),
            pltpu.SemaphoreType.DMA((4, BUFFERS)),
        ],
    )
    return pl.pallas_call(
        kernel,
        grid_spec=grid_spec,
        out_shape=[gradient, gradient],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=key_cost(layout, segment, axis, q, k),
        name="gist_attention_backward_kv",
    )(table.reshape(-1), visitors.reshape(-1), k, v, q, d_out, stats, intervals)
