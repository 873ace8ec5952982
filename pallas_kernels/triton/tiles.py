"""What the Triton kernels share: the rows of a query tile, the key tiles it visits, and their masks.

Axis legend
  P   query positions [ raws | gists ], A  query heads of a KV head
  M   folded rows of one KV head, P * A: row p * A + a is head a at position p
  I   rows of a query tile, J  keys of a key tile, D  head dim

The query heads of a KV head share its keys, so they lie side by side in a tile's rows: a tile of I rows holds I / A
positions, and sees that many fewer raws and boundary gists. Raw rows come first; no tile holds both kinds of rows.

In each source a row sees one interval `[lo, hi)` of keys. A query tile visits key tiles from its smallest `lo` on,
whatever that is modulo J:

               tile 0   1   2   3   4
  row 0          ▒ │ █ │ █ │ ▒ │             full tiles (█ in every row) are visited first, without a mask
  row 1            │ █ │ █ │ ▒ │ ▒           masked tiles (▒ in any row) after them, by two integer compares
"""

import triton
import triton.language as tl

MASKED = tl.constexpr(-1e9)  # a masked score: finite, so that a row that has seen no key yet needs no guard


@triton.jit
def folded(m, GROUP: tl.constexpr, DIM: tl.constexpr, kv_heads):
    """Offsets of folded rows in an array [P, Hkv, A, D], from that of (position 0, the KV head)."""
    return ((m // GROUP).to(tl.int64) * (kv_heads * GROUP) + m % GROUP) * DIM


@triton.jit
def row_units(m, is_gist, units, GROUP: tl.constexpr, RATIO: tl.constexpr):
    """Position of folded rows among their kind (raws or gists), and the segment's unit that they belong to."""
    position = m // GROUP - tl.where(is_gist, units * RATIO, 0)
    return position, tl.where(is_gist, position, position // RATIO)


@triton.jit
def gist_interval(unit, is_gist, first_unit, starts):
    """Visible gists of rows in `unit`; `starts` points at the sequence's first visible gists."""
    return tl.load(starts + unit), first_unit + unit + tl.where(is_gist, 1, 0)


@triton.jit
def raw_interval(position, unit, is_gist, first_unit, offset, starts, RATIO: tl.constexpr):
    """Visible raws of rows, counted from the first raw key, `offset` of the whole context."""
    lo = tl.maximum(tl.load(starts + unit) * RATIO - offset, 0)
    last = tl.where(is_gist, position * RATIO + RATIO - 1, position)
    return lo, first_unit * RATIO + last + 1 - offset


@triton.jit
def query_tile(index, units, GROUP: tl.constexpr, RATIO: tl.constexpr, ROWS: tl.constexpr):
    """The query tile of a program, heavy tiles first: its folded rows, whether they are gists, and where they end."""
    gist_tiles = tl.cdiv(units * GROUP, ROWS)
    raw_rows = units * (RATIO * GROUP)
    is_gist = index < gist_tiles
    from_end = tl.where(is_gist, index, index - gist_tiles)
    tiles = tl.where(is_gist, gist_tiles, tl.cdiv(raw_rows, ROWS))
    begin = tl.where(is_gist, raw_rows, 0) + (tiles - 1 - from_end) * ROWS
    end = tl.where(is_gist, raw_rows + units * GROUP, raw_rows)
    return begin + tl.arange(0, ROWS), is_gist, end


@triton.jit
def visited(lo, hi, KEYS: tl.constexpr):
    """The key tiles of a query tile: first key, end, number of tiles, and the range of tiles that need no mask."""
    begin, end = tl.min(lo, 0), tl.max(hi, 0)
    tiles = tl.cdiv(tl.maximum(end - begin, 0), KEYS)
    full_first = tl.minimum(tl.cdiv(tl.max(lo, 0) - begin, KEYS), tiles)
    full_last = tl.maximum(full_first, (tl.maximum(tl.min(hi, 0) - begin, 0)) // KEYS)
    return begin, end, tiles, full_first, full_last


@triton.jit
def skip_full(t, full_first, full_last):
    """The masked tile number `t`, which are those outside `[full_first, full_last)`."""
    return t + tl.where(t >= full_first, full_last - full_first, 0)


@triton.jit
def key_offsets(kv_heads, KEYS: tl.constexpr, DIM: tl.constexpr):
    """Offsets of a key tile's entries in an array [N, Hkv, D] from (first key, the KV head)."""
    return (tl.arange(0, KEYS) * (kv_heads * DIM))[:, None] + tl.arange(0, DIM)[None, :]
