"""One decoding step of gist attention in Triton: the cache read once, in place, by programs that share its key tiles.

Axis legend
  B   batch                 Hkv  KV heads, A  query heads of a KV head, D  head dim
  G   gist slots, W  slots of the raw ring (see `pallas_kernels.decode_attention`), s  sinks
  I   rows of a program: the raw's A queries, then the gist's A queries, padded to a power of two
  C   splits of a sequence's key tiles among programs

Key tiles of J keys of one sequence and one KV head, all masked by compares, cut into C runs of equal length:

    sinks    gists 0 … unit                                    raw ring
  [ ▒ ▒ |    ▒ ▒ ▒ ▒ ▒ ▒ ▒ ▒ ▒ ▒ ▒ ▒ ▒ ▒ ▒ ▒ ▒ ▒ ▒ ▒ ▒ ▒   |   ▒ ▒ ▒ ]      slots after `unit` are never read
  └─ split 0 ──────┴─ split 1 ──────┴─ split 2 ──────┴─ split 3 ─────┘

Sequences of different lengths take runs of different lengths, from `raw_index` on the device. A second kernel merges
the C partial outputs of a row by their log-sum-exp (base 2).
"""

import triton
import triton.language as tl

from pallas_kernels.triton.forward_kernel import attend_keys
from pallas_kernels.triton.tiles import MASKED, key_offsets


@triton.jit
def attend_ring(
    state, q, k, v, stride, first_tile, last_tile, newest, oldest, slots,
    SCALE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Adds tiles of the raw ring to a softmax state (`attend_keys`): those slots that hold raws from `oldest` on."""
    acc, total, maximum = state
    for t in range(first_tile, last_tile):
        slot = t * KEYS + tl.arange(0, KEYS)
        inside = slot < slots
        at = t * KEYS * stride
        keys = tl.load(k + at, mask=inside[:, None], other=0.0)
        age = newest % slots - slot
        age = tl.where(age < 0, age + slots, age)
        visible = inside & (age <= newest - oldest)
        scores = tl.where(visible[None, :], tl.dot(q, tl.trans(keys)), MASKED)
        new_maximum = tl.maximum(maximum, tl.max(scores, 1) * SCALE)
        weights = tl.math.exp2(scores * SCALE - new_maximum[:, None])
        shrink = tl.math.exp2(maximum - new_maximum)
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(v + at, mask=inside[:, None], other=0.0)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None])
        maximum = new_maximum
    return acc, total, maximum


@triton.jit
def decode_kernel(
    q, sink_k, sink_v, gist_k, gist_v, ring_k, ring_v, raw_index,
    num_sinks, num_gists, slots, kv_heads, window_units,
    out, lse,
    RATIO: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, SCALE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Writes partial outputs [C, B, Hkv, I, D] and their log-sum-exps [C, B, Hkv, I], float32. Grid: (Hkv, C, B).

    Args:
      q: [B, 2, Hkv, A, D]. sink_k, sink_v: [s, Hkv, D]; gist_*: [B, G, Hkv, D]; ring_*: [B, W, Hkv, D].
      raw_index: int32 [B], the newest raw of each sequence.
    """
    head, split, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    splits = tl.num_programs(1)
    newest = tl.load(raw_index + batch)
    unit = newest // RATIO
    sink_tiles, gist_tiles = tl.cdiv(num_sinks, KEYS), tl.cdiv(unit + 1, KEYS)
    tiles = sink_tiles + gist_tiles + tl.cdiv(slots, KEYS)
    begin, stop = tiles * split // splits, tiles * (split + 1) // splits

    row, dims = tl.arange(0, ROWS), tl.arange(0, DIM)
    valid = row < 2 * GROUP
    is_gist = row // GROUP
    entries = ((batch * 2 + is_gist) * kv_heads + head) * (GROUP * DIM) + row % GROUP * DIM
    query = tl.load(q + entries[:, None] + dims[None, :], mask=valid[:, None], other=0.0)
    stride = kv_heads * DIM
    tile = key_offsets(kv_heads, KEYS, DIM) + head * DIM
    state = (
        tl.zeros([ROWS, DIM], tl.float32),
        tl.zeros([ROWS], tl.float32),
        tl.full([ROWS], float("-inf"), tl.float32),
    )
    none = row * 0
    first, last = tl.minimum(begin, sink_tiles), tl.minimum(stop, sink_tiles)
    state = attend_keys(
        state, query, sink_k + tile, sink_v + tile, stride, first * KEYS, last - first, 0, 0, none,
        none + num_sinks, num_sinks, SCALE, KEYS, True,
    )  # fmt: skip
    at = batch * num_gists * stride
    first = tl.minimum(tl.maximum(begin - sink_tiles, 0), gist_tiles)
    last = tl.minimum(tl.maximum(stop - sink_tiles, 0), gist_tiles)
    state = attend_keys(
        state, query, gist_k + at + tile, gist_v + at + tile, stride, first * KEYS, last - first, 0, 0, none,
        unit + is_gist, unit + 1, SCALE, KEYS, True,
    )  # fmt: skip
    at = batch * slots * stride
    first = tl.maximum(begin - sink_tiles - gist_tiles, 0)
    last = tl.maximum(stop - sink_tiles - gist_tiles, 0)
    oldest = tl.maximum(unit - window_units, 0) * RATIO
    state = attend_ring(
        state, query, ring_k + at + tile, ring_v + at + tile, stride, first, last, newest, oldest, slots, SCALE, KEYS
    )

    acc, total, maximum = state
    # a program without tiles writes zeros that weigh nothing
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    part = ((split * tl.num_programs(2) + batch) * kv_heads + head) * ROWS + row
    tl.store(out + part[:, None] * DIM + dims[None, :], acc)
    tl.store(lse + part, tl.where(total > 0, maximum + tl.log2(total), float("-inf")))


@triton.jit
def merge_kernel(
    parts, lse, kv_heads, splits, out,
    GROUP: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Merges C partial outputs of each row into out [B, 2, Hkv, A, D]. Grid: (2 * A, Hkv, B); PARTS >= C."""
    row, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    part, dims = tl.arange(0, PARTS), tl.arange(0, DIM)
    at = ((part.to(tl.int64) * tl.num_programs(2) + batch) * kv_heads + head) * ROWS + row
    inside = part < splits
    weights = tl.load(lse + at, mask=inside, other=float("-inf"))
    weights = tl.math.exp2(weights - tl.max(weights, 0))
    values = tl.load(parts + at[:, None] * DIM + dims[None, :], mask=inside[:, None], other=0.0)
    merged = tl.sum(weights[:, None] * values, 0) / tl.sum(weights, 0)
    at = ((batch * 2 + row // GROUP) * kv_heads + head) * GROUP + row % GROUP
    tl.store(out + at * DIM + dims, merged.to(out.dtype.element_ty))
