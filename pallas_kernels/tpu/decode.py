"""One decoding step of gist attention on TPU: the cache read once, in place, by one Mosaic kernel.

Axis legend
  B   batch                 Hq  query heads, Hkv  KV heads, A = Hq / Hkv, D  head dim
  G   gist slots, W  slots of the raw ring (see `pallas_kernels.decode_attention`), s  sinks
  Q   query rows of a sequence: the raw's Hq heads, then the gist's Hq heads, padded to a multiple of 16
  E   entries of a key tile: see below

Tiles that a sequence visits (▒ masked; blank: never read), one grid step each:

  source      raw ring     sinks     gists 0 … unit
  step        0   1        2         3   4   5   6   7   (8   9)
  sequence 0  ▒   ▒        ▒         ▒   ▒   ▒   ▒   ▒            the longest sequence sets the number of steps
  sequence 1  ▒   ▒        ▒         ▒   ▒                        its steps 5 to 7 move and compute nothing

All query heads meet all heads of a tile's keys, and what is not a row's own KV head is left out of its softmax. That is
Hkv times the products that are needed, on a matrix unit that would otherwise wait for the cache, and spares both a copy
of the cache by heads and a gather of each head's keys. A source [keys, Hkv, D] is read as the matrix that it is in
memory, which depends on the head dim, since 128 numbers fill a register's lanes:

  D = 128   [keys * Hkv, D], an entry for each key and head; a mask           entry      k0 h0  k0 h1  k1 h0  k1 h1
            keeps those of a row's own head                                   row of h0    ●      .      ●      .
                                                                              row of h1    .      ●      .      ●
  D = 64    [Hkv * D, keys], an entry for each key: XLA lays keys along       row of h0  [ q 0 ]   x   entries
            lanes; a query row holds zeros at the other heads                 row of h1  [ 0 q ]

The grid is (batch, step), and its second extent is computed from `raw_index` on the device; index maps of finished
sequences stay at their last tile, so nothing is copied.
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

from pallas_kernels.backends import refusal_of
from pallas_kernels.tpu.blocks import VMEM_LIMIT
from pallas_kernels.tpu.op import DTYPES, HEAD_DIMS, RATIOS
from pallas_kernels.tpu.tiles import MASKED, NN, NT, dot
from unigist_jax.layout import GistLayout

TILE_BYTES = 2**20  # of keys in a tile


def decode_refusal(q, kv, layout: GistLayout) -> str | None:
    """Why the decoding kernel does not take these arguments; None if it does."""
    return refusal_of(q, kv, layout, DTYPES, HEAD_DIMS, RATIOS)


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
    table = _row_table(num_heads, num_kv_heads)
    num_rows = len(table)
    rows = jnp.pad(q.reshape(batch, 2 * num_heads, dim), ((0, 0), (0, num_rows - 2 * num_heads), (0, 0)))
    scale = dim**-0.5 * math.log2(math.e)
    by_key = dim < 128
    if by_key:  # entries along the second axis of a tile, one a key
        own_head = (table[:, :1] == np.arange(num_kv_heads))[..., None]
        rows = jnp.where(own_head, rows[:, :, None], 0).reshape(batch, num_rows, num_kv_heads * dim)
        per_key, unit_of_size, width = 1, 128, num_kv_heads * dim
    else:
        per_key, unit_of_size, width = num_kv_heads, math.lcm(num_kv_heads, 16), dim
    entries = entries or TILE_BYTES // (width * q.dtype.itemsize)

    def flat(x):
        if by_key:
            return jnp.moveaxis(x, 1, 3).reshape(x.shape[0], width, x.shape[1])
        return x.reshape(x.shape[0], -1, dim)

    sources = [("ring", kv.raw_k, kv.raw_v), ("sinks", kv.sink_k[None], kv.sink_v[None]), ("gists", *kv[2:4])]
    sources = [(name, flat(k), flat(v)) for name, k, v in sources if k.size]
    lengths = [k.shape[2 if by_key else 1] for _, k, _ in sources]
    # whole keys and whole registers; a short source is one tile
    sizes = [min(length, max(entries // unit_of_size, 1) * unit_of_size) for length in lengths]
    counts = [-(-length // size) for length, size in zip(lengths, sizes, strict=True)]
    firsts = [sum(counts[:i]) for i in range(len(counts))]

    def last_gist_tile(newest):
        last = (lax.div(newest, jnp.int32(layout.ratio)) + 1) * per_key - 1
        return jnp.minimum(lax.div(last, jnp.int32(sizes[-1])), counts[-1] - 1)

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
                return entry < (unit + table_ref[:, 1:2]) * per_key
            if name == "sinks":
                return entry < kv.sink_k.shape[0] * per_key
            # the ring: slots from the oldest visible raw up to the newest, around its end
            newest_slot = lax.rem(newest, jnp.int32(slots))
            oldest = jnp.maximum(unit - layout.window_units, 0) * layout.ratio
            begin, end = (newest_slot - newest + oldest) * per_key, (newest_slot + 1) * per_key
            return ((entry >= begin) & (entry < end)) | (entry >= begin + slots * per_key) & (entry < slots * per_key)

        def attend(name, tile, k_ref, v_ref, length, tail):
            scores = dot(q_ref[...], k_ref[...], NN if by_key else NT) * scale
            place = lax.broadcasted_iota(jnp.int32, (1, scores.shape[1]), 1)
            mask = visible(name, place + tile * scores.shape[1])
            if not by_key:
                mask &= lax.rem(place, jnp.int32(num_kv_heads)) == table_ref[:, 0:1]
            scores = jnp.where(mask, scores, MASKED)
            new_top = jnp.maximum(top[...], scores.max(axis=1, keepdims=True))
            shrink = jnp.exp2(top[...] - new_top)
            weights = jnp.exp2(scores - new_top)
            v = v_ref[...]
            if tail:  # behind the end of the array a tile holds anything, also NaN
                axis = int(by_key)
                inside = lax.broadcasted_iota(jnp.int32, v.shape, axis) < length - tile * v.shape[axis]
                v = jnp.where(inside, v, jnp.zeros_like(v))
            total[...] = total[...] * shrink + weights.sum(axis=1, keepdims=True)
            acc[...] = acc[...] * shrink + dot(weights.astype(v.dtype), v, NT if by_key else NN)
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
            place = 0 if sources[i][0] == "sinks" else b, jnp.clip(step - firsts[i], 0, last), 0
            return (place[0], 0, place[1]) if by_key else place

        return pl.BlockSpec((None, width, sizes[i]) if by_key else (None, sizes[i], dim), index_map)

    raw_index = raw_index.astype(jnp.int32)
    rows_of_sequence = pl.BlockSpec((None, num_rows, width), lambda b, *_: (b, 0, 0))
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
                pltpu.VMEM((num_rows, width), jnp.float32),
                pltpu.VMEM((num_rows, 1), jnp.float32),
                pltpu.VMEM((num_rows, 1), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(rows.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(  # a full cache
            flops=4 * area * width, transcendentals=area, bytes_accessed=sum(x.nbytes for x in kv) + 2 * rows.nbytes
        ),
        name="gist_attention_decode",
    )(raw_index, rows, jnp.asarray(table), *(x for _, k, v in sources for x in (k, v)))
    if by_key:
        out = jnp.where(own_head, out.reshape(batch, num_rows, num_kv_heads, dim), 0).sum(axis=2)
    return out[:, : 2 * num_heads].reshape(q.shape)
