"""Backward pass of gist attention in Triton: one kernel for dQ, and one for the dK and dV of a key source.

Axis legend
  B   batch                 Hq  query heads, Hkv  KV heads, A = Hq / Hkv, D  head dim
  P   query positions [ raws | gists ], M = P * A folded rows (tiles.py), U units of the segment
  N   keys of one source (sinks, gists or raws), C  splits of the query rows among programs

  weights = exp2(scores - lse)       d_scores = weights * (dO V' - delta)       delta = rowsum(dO * out)

`query_gradient_kernel` walks the key tiles of a query tile as the forward pass does: dQ = d_scores K. It also writes
delta, which the other kernel reads.

`key_gradient_kernel` owns a key tile and walks the query tiles that see it (█ unmasked, ▒ masked), the last first, so
that programs that run at the same time read the same queries:

  query tiles             raws                                 gists
  sink tile 0             ▒ ▒ ▒ ▒ ▒ ▒ ▒ ▒ ▒ ▒ ▒ ▒ ▒ ▒ ▒ ▒      ▒ ▒ ▒ ▒            every query
  gist tile 2                             ▒ █ █ █ █ █ █ █          ▒ █            every later query of the document
  raw tile 5                        ▒ ▒ ▒ ▒                      ▒ ▒              its own window only

Its rows hold all query heads of the KV head, so their sum needs no partial results. Where key tiles are too few to
fill the GPU, C programs share the query tiles of each, and their float32 partial sums are added afterwards. Nothing is
added atomically: equal inputs give equal bits.
"""

import triton
import triton.language as tl

from pallas_kernels.triton.tiles import (
    folded,
    gist_interval,
    key_offsets,
    query_tile,
    raw_interval,
    row_units,
    skip_full,
    visited,
)

SINKS = tl.constexpr(0)
GISTS = tl.constexpr(1)


@triton.jit
def add_query_gradient(
    d_query, query, d_out, lse, delta, k, v, stride, first, count, skip_first, skip_last, lo, hi, end,
    SCALE: tl.constexpr, KEYS: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Adds to dQ [I, D] what `count` key tiles give; the arguments are those of `attend_keys`."""
    for t in range(count):
        begin = first + (skip_full(t, skip_first, skip_last) if MASK else t + skip_first) * KEYS
        at = begin.to(tl.int64) * stride
        key = begin + tl.arange(0, KEYS)
        keys = tl.load(k + at, mask=(key < end)[:, None], other=0.0) if MASK else tl.load(k + at)
        weights = tl.math.exp2(tl.dot(query, tl.trans(keys)) * SCALE - lse[:, None])
        if MASK:
            visible = (key[None, :] >= lo[:, None]) & (key[None, :] < hi[:, None])
            weights = tl.where(visible, weights, 0.0)
        values = tl.load(v + at, mask=(key < end)[:, None], other=0.0) if MASK else tl.load(v + at)
        d_scores = weights * (tl.dot(d_out, tl.trans(values)) - delta[:, None])
        d_query = tl.dot(d_scores.to(keys.dtype), keys, d_query)
    return d_query


@triton.jit
def query_gradient_kernel(
    q, out, d_out, lse, sink_k, sink_v, gist_k, gist_v, raw_k, raw_v, gist_start, raw_start, place,
    units, num_sinks, num_gists, num_raws, kv_heads, gist_start_stride, raw_start_stride,
    d_q, delta,
    RATIO: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, SCALE: tl.constexpr, ROOT: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Writes dQ [B, P, Hkv, A, D] and delta [B, Hkv, M]; the arguments are those of `forward_kernel`.

    Args:
      out, d_out: [B, P, Hkv, A, D]. lse: [B, Hkv, M].
      ROOT: the scale of the scores in base e, D ** -0.5.
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
    entries = rows[:, None] + dims[None, :]
    stats = (batch * kv_heads + head) * positions * GROUP + m
    d_output = tl.load(d_out + entries, mask=valid[:, None], other=0.0)
    output = tl.load(out + entries, mask=valid[:, None], other=0.0)
    row_delta = tl.sum(output.to(tl.float32) * d_output.to(tl.float32), 1)
    tl.store(delta + stats, row_delta, mask=valid)
    query = tl.load(q + entries, mask=valid[:, None], other=0.0)
    row_lse = tl.load(lse + stats, mask=valid, other=float("inf"))
    stride = kv_heads * DIM
    tile = key_offsets(kv_heads, KEYS, DIM) + head * DIM
    d_query = tl.zeros([ROWS, DIM], tl.float32)

    k, v = gist_k + batch * num_gists * stride + tile, gist_v + batch * num_gists * stride + tile
    first, last, tiles, full_first, full_last = visited(gist_lo, gist_hi, KEYS)
    d_query = add_query_gradient(
        d_query, query, d_output, row_lse, row_delta, k, v, stride, first, full_last - full_first, full_first,
        full_last, gist_lo, gist_hi, last, SCALE, KEYS, False,
    )  # fmt: skip
    d_query = add_query_gradient(
        d_query, query, d_output, row_lse, row_delta, k, v, stride, first, tiles - (full_last - full_first),
        full_first, full_last, gist_lo, gist_hi, last, SCALE, KEYS, True,
    )  # fmt: skip

    k, v = raw_k + batch * num_raws * stride + tile, raw_v + batch * num_raws * stride + tile
    first, last, tiles, full_first, full_last = visited(raw_lo, raw_hi, KEYS)
    d_query = add_query_gradient(
        d_query, query, d_output, row_lse, row_delta, k, v, stride, first, full_last - full_first, full_first,
        full_last, raw_lo, raw_hi, last, SCALE, KEYS, False,
    )  # fmt: skip
    d_query = add_query_gradient(
        d_query, query, d_output, row_lse, row_delta, k, v, stride, first, tiles - (full_last - full_first),
        full_first, full_last, raw_lo, raw_hi, last, SCALE, KEYS, True,
    )  # fmt: skip

    sinks = gist_lo * 0
    d_query = add_query_gradient(
        d_query, query, d_output, row_lse, row_delta, sink_k + tile, sink_v + tile, stride, 0,
        tl.cdiv(num_sinks, KEYS), 0, 0, sinks, sinks + num_sinks, num_sinks, SCALE, KEYS, True,
    )  # fmt: skip
    tl.store(d_q + entries, (d_query * ROOT).to(d_q.dtype.element_ty), mask=valid[:, None])


@triton.jit
def query_tiles(seen, stop, full_first, full_stop, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Tiles of the rows of positions `[seen, stop)`: how many, and which of them lie in `[full_first, full_stop)`."""
    tiles = tl.cdiv(tl.maximum(stop - seen, 0) * GROUP, ROWS)
    first = tl.minimum(tl.cdiv((full_first - seen) * GROUP, ROWS), tiles)
    return tiles, first, tl.maximum(first, tl.minimum((full_stop - seen) * GROUP // ROWS, tiles))


@triton.jit
def add_key_gradients(
    d_keys, d_values, keys, values, q, d_out, lse, delta, starts, key,
    split, splits, raw_seen, raw_stop, raw_tiles, raw_first, raw_last,
    gist_seen, gist_stop, gist_tiles, gist_first, gist_last,
    units, kv_heads, first_unit, offset,
    SOURCE: tl.constexpr, RATIO: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, SCALE: tl.constexpr,
    ROWS: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Adds to dK and dV [J, D] what this program's share of the query tiles gives: with MASK those outside
    `[first, last)`, else those inside.

    Args:
      q, d_out: pointers to (position 0, the KV head); lse, delta: to row 0 of the KV head.
      *_seen, *_stop: the positions, among raws and among gists, that see a key of the tile.
    """
    raw_count, gist_count = raw_last - raw_first, gist_last - gist_first
    if MASK:
        raw_count, gist_count = raw_tiles - raw_count, gist_tiles - gist_count
    count = raw_count + gist_count
    raw_positions = units * RATIO
    dims = tl.arange(0, DIM)
    for t in range(count * split // splits, count * (split + 1) // splits):
        is_gist = t < gist_count
        back = tl.where(is_gist, gist_count - 1 - t, count - 1 - t)
        if MASK:
            index = tl.where(is_gist, skip_full(back, gist_first, gist_last), skip_full(back, raw_first, raw_last))
        else:
            index = back + tl.where(is_gist, gist_first, raw_first)
        seen = tl.where(is_gist, raw_positions + gist_seen, raw_seen)
        m = seen * GROUP + index * ROWS + tl.arange(0, ROWS)
        stop = tl.where(is_gist, raw_positions + gist_stop, raw_stop) * GROUP
        rows = folded(m, GROUP, DIM, kv_heads)[:, None] + dims[None, :]
        if MASK:
            valid = m < stop
            query = tl.load(q + rows, mask=valid[:, None], other=0.0)
            d_output = tl.load(d_out + rows, mask=valid[:, None], other=0.0)
            row_lse = tl.load(lse + m, mask=valid, other=float("inf"))
            row_delta = tl.load(delta + m, mask=valid, other=0.0)
        else:
            query, d_output = tl.load(q + rows), tl.load(d_out + rows)
            row_lse, row_delta = tl.load(lse + m), tl.load(delta + m)
        weights = tl.math.exp2(tl.dot(keys, tl.trans(query)) * SCALE - row_lse[None, :])
        if MASK and SOURCE != SINKS:
            position, unit = row_units(tl.minimum(m, stop - 1), is_gist, units, GROUP, RATIO)
            if SOURCE == GISTS:
                lo, hi = gist_interval(unit, is_gist, first_unit, starts)
            else:
                lo, hi = raw_interval(position, unit, is_gist, first_unit, offset, starts, RATIO)
            visible = (key[:, None] >= lo[None, :]) & (key[:, None] < hi[None, :])
            weights = tl.where(visible, weights, 0.0)
        d_values = tl.dot(weights.to(d_output.dtype), d_output, d_values)
        d_scores = weights * (tl.dot(values, tl.trans(d_output)) - row_delta[None, :])
        d_keys = tl.dot(d_scores.to(query.dtype), query, d_keys)
    return d_keys, d_values


@triton.jit
def key_gradient_kernel(
    q, d_out, lse, delta, k, v, starts, reach, place,
    units, num_keys, kv_heads, key_stride, starts_stride, reach_stride, splits,
    d_k, d_v,
    SOURCE: tl.constexpr, RATIO: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, SCALE: tl.constexpr,
    ROOT: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Writes the partial sums of dK and dV of a source, [C, B, N, Hkv, D].

    Args:
      q, d_out: [B, P, Hkv, A, D]. lse, delta: [B, Hkv, M].
      k, v: [B or 1, N, Hkv, D]; `key_stride` from one sequence to the next, 0 or N.
      starts: int32 [1 or B, U], the source's part of `UnitStarts`; not read for sinks.
      reach: int32 [1 or B, key tiles, 2], `plan.reach`; not read for sinks.
      place: int32 [2], the segment's first unit and the first unit of the raw keys.
    """
    head, split, batch = tl.program_id(1) // splits, tl.program_id(1) % splits, tl.program_id(2).to(tl.int64)
    first_unit, offset = tl.load(place), tl.load(place + 1) * RATIO
    begin = tl.program_id(0) * KEYS
    key = begin + tl.arange(0, KEYS)
    end = tl.minimum(begin + KEYS, num_keys)
    # the positions that see the first key of the tile, and all keys of it: by the diagonal …
    if SOURCE == SINKS:
        raw_seen, gist_seen, raw_full, gist_full = 0, 0, 0, 0
        stop, full_stop = units, 0
    else:
        if SOURCE == GISTS:
            raw_seen, gist_seen = (begin + 1 - first_unit) * RATIO, begin - first_unit
            raw_full, gist_full = (end - first_unit) * RATIO, end - 1 - first_unit
        else:
            raw_seen, gist_seen = begin + offset - first_unit * RATIO, (begin + offset) // RATIO - first_unit
            raw_full, gist_full = end - 1 + offset - first_unit * RATIO, (end - 1 + offset) // RATIO - first_unit
        # … and by where the documents and windows end
        starts += batch * starts_stride
        reach += batch * reach_stride + 2 * tl.program_id(0)
        stop, full_stop = tl.load(reach), tl.load(reach + 1)
    raw_seen, gist_seen = tl.maximum(raw_seen, 0), tl.maximum(gist_seen, 0)
    raw_stop = stop * RATIO
    raw_tiles, raw_first, raw_last = query_tiles(
        raw_seen, raw_stop, tl.maximum(raw_full, raw_seen), full_stop * RATIO, GROUP, ROWS
    )
    gist_tiles, gist_first, gist_last = query_tiles(
        gist_seen, stop, tl.maximum(gist_full, gist_seen), full_stop, GROUP, ROWS
    )

    positions = units * (RATIO + 1)
    entries = key_offsets(kv_heads, KEYS, DIM)
    at = ((batch * key_stride + begin) * kv_heads + head) * DIM
    inside = (key < num_keys)[:, None]
    keys = tl.load(k + at + entries, mask=inside, other=0.0)
    values = tl.load(v + at + entries, mask=inside, other=0.0)
    q += (batch * positions * kv_heads + head) * (GROUP * DIM)
    d_out += (batch * positions * kv_heads + head) * (GROUP * DIM)
    lse += (batch * kv_heads + head) * positions * GROUP
    delta += (batch * kv_heads + head) * positions * GROUP
    d_keys, d_values = tl.zeros([KEYS, DIM], tl.float32), tl.zeros([KEYS, DIM], tl.float32)
    if SOURCE != SINKS:
        d_keys, d_values = add_key_gradients(
            d_keys, d_values, keys, values, q, d_out, lse, delta, starts, key, split, splits,
            raw_seen, raw_stop, raw_tiles, raw_first, raw_last, gist_seen, stop, gist_tiles, gist_first, gist_last,
            units, kv_heads, first_unit, offset, SOURCE, RATIO, GROUP, DIM, SCALE, ROWS, False,
        )  # fmt: skip
    d_keys, d_values = add_key_gradients(
        d_keys, d_values, keys, values, q, d_out, lse, delta, starts, key, split, splits,
        raw_seen, raw_stop, raw_tiles, raw_first, raw_last, gist_seen, stop, gist_tiles, gist_first, gist_last,
        units, kv_heads, first_unit, offset, SOURCE, RATIO, GROUP, DIM, SCALE, ROWS, True,
    )  # fmt: skip
    part = split * tl.num_programs(2) + batch
    at = ((part * num_keys + begin) * kv_heads + head) * DIM
    tl.store(d_k + at + entries, (d_keys * ROOT).to(d_k.dtype.element_ty), mask=inside)
    tl.store(d_v + at + entries, d_values.to(d_v.dtype.element_ty), mask=inside)
