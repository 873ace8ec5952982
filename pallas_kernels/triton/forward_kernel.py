"""Forward pass of gist attention in Triton: one fused kernel over raw and gist rows.

Axis legend
  B   batch                 Hq  query heads, Hkv  KV heads, A = Hq / Hkv, D  head dim
  P   query positions [ raws | gists ], M = P * A folded rows (tiles.py), U units of the segment
  s   sinks, G  gist keys, R  raw keys

Key tiles that a query tile visits, for one document with r = 4, A = 4, s = 128, w = 128 and tiles of 128 rows:

                                    sinks    gists                            raws
  raws   tile 17 (32 positions)     █ █      █ █ █ █ ▒                        ▒ ▒ ▒         the window and itself
  gists  tile 4  (32 positions)     █ █      █ █ █ █ ▒ (the diagonal)         ▒ ▒ ▒ ▒       its units' and the window

Grid: (query tiles, Hkv, B), the query tiles from the heaviest to the lightest, one KV head after another, so that the
keys of a head stay in the L2 cache. Scores are kept in base 2; `lse` is the base-2 logarithm of the softmax's sum.
"""

import triton
import triton.language as tl

from pallas_kernels.triton.tiles import (
    MASKED,
    folded,
    gist_interval,
    key_offsets,
    query_tile,
    raw_interval,
    row_units,
    skip_full,
    visited,
)


@triton.jit
def attend_keys(
    state, q, k, v, stride, first, count, skip_first, skip_last, lo, hi, end,
    SCALE: tl.constexpr, KEYS: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Adds `count` key tiles to a softmax state (acc [I, D], total [I], maximum [I]).

    Args:
      k, v: pointers [J, D] to a tile that begins at key 0; `stride` from one key to the next.
      first: first key of tile 0.
      skip_first, skip_last: with MASK, tiles in this range are not visited.
      lo, hi: with MASK, what each row sees; no key from `end` on is read.
    """
    acc, total, maximum = state
    for t in range(count):
        begin = first + (skip_full(t, skip_first, skip_last) if MASK else t + skip_first) * KEYS
        at = begin.to(tl.int64) * stride
        key = begin + tl.arange(0, KEYS)
        keys = tl.load(k + at, mask=(key < end)[:, None], other=0.0) if MASK else tl.load(k + at)
        scores = tl.dot(q, tl.trans(keys))
        if MASK:
            visible = (key[None, :] >= lo[:, None]) & (key[None, :] < hi[:, None])
            scores = tl.where(visible, scores, MASKED)
        new_maximum = tl.maximum(maximum, tl.max(scores, 1) * SCALE)
        weights = tl.math.exp2(scores * SCALE - new_maximum[:, None])
        shrink = tl.math.exp2(maximum - new_maximum)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        values = tl.load(v + at, mask=(key < end)[:, None], other=0.0) if MASK else tl.load(v + at)
        acc = tl.dot(weights.to(values.dtype), values, acc)
        maximum = new_maximum
    return acc, total, maximum


@triton.jit
def forward_kernel(
    q, sink_k, sink_v, gist_k, gist_v, raw_k, raw_v, gist_start, raw_start, place,
    units, num_sinks, num_gists, num_raws, kv_heads, gist_start_stride, raw_start_stride,
    out, lse,
    RATIO: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, SCALE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Writes out [B, P, Hkv, A, D] and lse [B, Hkv, M].

    Args:
      q: [B, P, Hkv, A, D]. sink_k, sink_v: [s, Hkv, D]; gist_*: [B, G, Hkv, D]; raw_*: [B, R, Hkv, D].
      gist_start, raw_start: int32 [1 or B, U], `UnitStarts`; their strides are 0 or U.
      place: int32 [2], the segment's first unit and the first unit of the raw keys.
      SCALE: of scores in base 2.
    """
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first_unit, offset = tl.load(place), tl.load(place + 1) * RATIO
    m, is_gist, end = query_tile(tl.program_id(0), units, GROUP, RATIO, ROWS)
    valid = m < end
    position, unit = row_units(tl.minimum(m, end - 1), is_gist, units, GROUP, RATIO)
    gist_lo, gist_hi = gist_interval(unit, is_gist, first_unit, gist_start + batch * gist_start_stride)
    raw_lo, raw_hi = raw_interval(
        position, unit, is_gist, first_unit, offset, raw_start + batch * raw_start_stride, RATIO
    )
    gist_hi, raw_hi = tl.minimum(gist_hi, num_gists), tl.minimum(raw_hi, num_raws)

    positions = units * (RATIO + 1)
    dims = tl.arange(0, DIM)
    rows = (batch * positions * kv_heads + head) * (GROUP * DIM) + folded(m, GROUP, DIM, kv_heads)
    query = tl.load(q + rows[:, None] + dims[None, :], mask=valid[:, None], other=0.0)
    stride = kv_heads * DIM
    tile = key_offsets(kv_heads, KEYS, DIM) + head * DIM
    state = (
        tl.zeros([ROWS, DIM], tl.float32),
        tl.zeros([ROWS], tl.float32),
        tl.full([ROWS], float("-inf"), tl.float32),
    )

    k, v = gist_k + batch * num_gists * stride + tile, gist_v + batch * num_gists * stride + tile
    first, last, tiles, full_first, full_last = visited(gist_lo, gist_hi, KEYS)
    state = attend_keys(
        state, query, k, v, stride, first, full_last - full_first, full_first, full_last, gist_lo, gist_hi, last,
        SCALE, KEYS, False,
    )  # fmt: skip
    state = attend_keys(
        state, query, k, v, stride, first, tiles - (full_last - full_first), full_first, full_last, gist_lo, gist_hi,
        last, SCALE, KEYS, True,
    )  # fmt: skip

    k, v = raw_k + batch * num_raws * stride + tile, raw_v + batch * num_raws * stride + tile
    first, last, tiles, full_first, full_last = visited(raw_lo, raw_hi, KEYS)
    state = attend_keys(
        state, query, k, v, stride, first, full_last - full_first, full_first, full_last, raw_lo, raw_hi, last,
        SCALE, KEYS, False,
    )  # fmt: skip
    state = attend_keys(
        state, query, k, v, stride, first, tiles - (full_last - full_first), full_first, full_last, raw_lo, raw_hi,
        last, SCALE, KEYS, True,
    )  # fmt: skip

    sinks = gist_lo * 0
    state = attend_keys(
        state, query, sink_k + tile, sink_v + tile, stride, 0, tl.cdiv(num_sinks, KEYS), 0, 0, sinks,
        sinks + num_sinks, num_sinks, SCALE, KEYS, True,
    )  # fmt: skip

    acc, total, maximum = state
    acc = acc / total[:, None]
    tl.store(out + rows[:, None] + dims[None, :], acc.to(out.dtype.element_ty), mask=valid[:, None])
    tl.store(lse + (batch * kv_heads + head) * positions * GROUP + m, maximum + tl.log2(total), mask=valid)
