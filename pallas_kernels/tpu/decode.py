"""One decoding step of gist attention on TPU: the cache read once, in place, by one Mosaic kernel.

Axis legend
  B   batch                 Hq  query heads, Hkv  KV heads, A = Hq / Hkv, D  head dim
  G   gist slots, W  slots of the raw ring (see `pallas_kernels.decode_attention`), s  sinks
  Q   query rows of a sequence: the raw's Hq heads, then the gist's Hq heads, padded to a multiple of 16
  E   entries: a source [keys, Hkv, D] read as the matrix [keys * Hkv, D] that it is in memory, in tiles of `entries`

Tiles that a sequence visits (▒ masked; blank: never read), one grid step each:

  source      raw ring     sinks     gists 0 … unit
  step        0   1        2         3   4   5   6   7   (8   9)
  sequence 0  ▒   ▒        ▒         ▒   ▒   ▒   ▒   ▒            the longest sequence sets the number of steps
  sequence 1  ▒   ▒        ▒         ▒   ▒                        its steps 5 to 7 move and compute nothing

All query heads meet all entries of a tile, and a mask keeps those of a row's own KV head:

  entry        key 0: h0 h1   key 1: h0 h1   key 2: h0 h1
  rows of h0          ●  .           ●  .           ●  .
  rows of h1          .  ●           .  ●           .  ●

That is Hkv times the products that are needed, on a matrix unit that would otherwise wait for the cache, and spares
both a copy of the cache by heads and a gather of each head's keys. The grid is (batch, step), and its second extent is
computed from `raw_index` on the device; index maps of finished sequences stay at their last tile, so nothing is copied.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.tpu.op import refusal as decode_refusal
from pallas_kernels.tpu.tiles import MASKED, NN, NT, dot
from unigist_jax.layout import GistLayout

__all__ = ["decode", "decode_refusal"]

TILE_BYTES = 2**20  # of keys in a tile, as vector memory holds them: at least 128 numbers an entry


def _row_table(num_heads: int, num_kv_heads: int) -> np.ndarray:
    """For each query row its KV head, and 1 if it is the gist's: int32 [Q, 2]. Padding has no head."""
    head = np.arange(num_heads) // (num_heads // num_kv_heads)
    table = np.stack([np.tile(head, 2), np.repeat([0, 1], num_heads)], axis=1)
    return np.pad(table, ((0, -len(table) % 16), (0, 0)), constant_values=-1).astype(np.int32)


def decode(
    q: Float[Array, "B 2 Hq D"],
    kv,
    layout: GistLayout,
    raw_index: Int32[Array, " B"],
    entries: int | None = None,
) -> Float[Array, "B 2 Hq D"]:
    """TPU form of `pallas_kernels.decode_attention.decode_attention`; same arguments.

    Args:
      entries: most entries of a tile, in place of as many as fit `TILE_BYTES`.
    """
    batch, _, num_heads, dim = q.shape
    num_kv_heads, slots = kv.gist_k.shape[2], kv.raw_k.shape[1]
    entries = entries or TILE_BYTES // (128 * q.dtype.itemsize)
    table = _row_table(num_heads, num_kv_heads)
    num_rows = len(table)
    rows = jnp.pad(q.reshape(batch, 2 * num_heads, dim), ((0, 0), (0, num_rows - 2 * num_heads), (0, 0)))
    scale = dim**-0.5 * math.log2(math.e)

    def flat(x):
        return x.reshape(*x.shape[:-3], -1, dim)

    sources = [("ring", kv.raw_k, kv.raw_v), ("sinks", kv.sink_k[None], kv.sink_v[None]), ("gists", *kv[2:4])]
    sources = [(name, flat(k), flat(v)) for name, k, v in sources if k.size]
    lengths = [k.shape[1] for _, k, _ in sources]
    # whole keys only, so that every tile has the same pattern of heads; a short source is one tile
    whole = math.lcm(num_kv_heads, 16)
    sizes = [min(length, max(entries // whole, 1) * whole) for length in lengths]
    counts = [-(-length // size) for length, size in zip(lengths, sizes, strict=True)]
    firsts = [sum(counts[:i]) for i in range(len(counts))]

    def last_gist_tile(newest):
        return lax.div((lax.div(newest, jnp.int32(layout.ratio)) + 1) * num_kv_heads - 1, jnp.int32(sizes[-1]))

    def kernel(index_ref, q_ref, table_ref, *refs):
        key_refs, (out_ref, acc, top, total) = refs[:-4], refs[-4:]
        b, step = pl.program_id(0), pl.program_id(1)
        newest = index_ref[b]
        unit = lax.div(newest, jnp.int32(layout.ratio))

        @pl.when(step == 0)
        def _():
            acc[...] = jnp.zeros_like(acc)
            top[...] = jnp.full_like(top, -jnp.inf)
            total[...] = jnp.zeros_like(total)

        def visible(name, entry):
            """Which entries of a source the rows may see, whatever their head."""
            if name == "gists":
                return entry < (unit + table_ref[:, 1:2]) * num_kv_heads
            if name == "sinks":
                return entry < lengths[[source[0] for source in sources].index("sinks")]
            # the ring: slots from the oldest visible raw up to the newest, around its end
            newest_slot = lax.rem(newest, jnp.int32(slots))
            oldest = jnp.maximum(unit - layout.window_units, 0) * layout.ratio
            begin, end = (newest_slot - newest + oldest) * num_kv_heads, (newest_slot + 1) * num_kv_heads
            return ((entry >= begin) & (entry < end)) | (entry >= begin + slots * num_kv_heads) & (
                entry < slots * num_kv_heads
            )

        def attend(name, tile, k_ref, v_ref, length, tail):
            scores = dot(q_ref[...], k_ref[...], NT) * scale
            place = lax.broadcasted_iota(jnp.int32, (1, scores.shape[1]), 1)
            mask = lax.rem(place, jnp.int32(num_kv_heads)) == table_ref[:, 0:1]
            mask &= visible(name, place + tile * scores.shape[1])
            scores = jnp.where(mask, scores, MASKED)
            new_top = jnp.maximum(top[...], scores.max(axis=1, keepdims=True))
            shrink = jnp.exp2(top[...] - new_top)
            weights = jnp.exp2(scores - new_top)
            v = v_ref[...]
            if tail:  # behind the end of the array a tile holds anything, also NaN
                inside = lax.broadcasted_iota(jnp.int32, v.shape, 0) < length - tile * v.shape[0]
                v = jnp.where(inside, v, jnp.zeros_like(v))
            total[...] = total[...] * shrink + weights.sum(axis=1, keepdims=True)
            acc[...] = acc[...] * shrink + dot(weights.astype(v.dtype), v, NN)
            top[...] = new_top

        for i, (name, _, _) in enumerate(sources):
            tile, ragged = step - firsts[i], lengths[i] % sizes[i] > 0
            end = last_gist_tile(newest) + 1 if name == "gists" else counts[i]
            here = (tile >= 0) & (tile < end)
            run = functools.partial(attend, name, tile, key_refs[2 * i], key_refs[2 * i + 1], lengths[i])
            pl.when(here & (tile < counts[i] - int(ragged)))(functools.partial(run, tail=False))
            if ragged:
                pl.when(here & (tile == counts[i] - 1))(functools.partial(run, tail=True))

        @pl.when(step == pl.num_programs(1) - 1)
        def _():
            out_ref[...] = (acc[...] / total[...]).astype(out_ref.dtype)

    def tile_spec(i):
        def index_map(b, step, index_ref):
            last = last_gist_tile(index_ref[b]) if sources[i][0] == "gists" else counts[i] - 1
            return 0 if sources[i][0] == "sinks" else b, jnp.clip(step - firsts[i], 0, last), 0

        return pl.BlockSpec((None, sizes[i], dim), index_map)

    raw_index = raw_index.astype(jnp.int32)
    rows_of_sequence = pl.BlockSpec((None, num_rows, dim), lambda b, *_: (b, 0, 0))
    area = batch * num_rows * sum(lengths)
    out = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, firsts[-1] + last_gist_tile(raw_index.max()) + 1),
            in_specs=[
                rows_of_sequence,
                pl.BlockSpec((num_rows, 2), lambda *_: (0, 0)),
                *(tile_spec(i) for i in range(len(sources)) for _ in (0, 1)),
            ],
            out_specs=rows_of_sequence,
            scratch_shapes=[
                pltpu.VMEM((num_rows, dim), jnp.float32),
                pltpu.VMEM((num_rows, 1), jnp.float32),
                pltpu.VMEM((num_rows, 1), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(rows.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(  # a full cache
            flops=4 * area * dim, transcendentals=area, bytes_accessed=sum(x.nbytes for x in kv) + 2 * rows.nbytes
        ),
        name="gist_attention_decode",
    )(raw_index, rows, jnp.asarray(table), *(x for _, k, v in sources for x in (k, v)))
    return out[:, : 2 * num_heads].reshape(q.shape)
