"""Attention over per-row key intervals in pure XLA: any device, differentiable, memory O(T * block).

Axis legend
  B  batch                      Hkv KV heads, A  query heads of one KV head (Hq = Hkv * A), D  head dim
  P  query rows, cut into tiles of `block_q`
  N  keys of one source, cut into tiles of `block_k`

            key tiles of one source (here: gists)
  rows      0    1    2    3
  tile 0  [ ▒              ]     ▒ visited, masked by two integer compares
  tile 1  [ ▒    ▒         ]       blank: never visited (the trip count is dynamic)
  tile 2  [ ▒    ▒    ▒    ]

The forward pass keeps a running maximum and sum per row over all sources; the backward pass recomputes the weights tile
by tile from the saved log-sum-exp (natural logarithm). No array has both a query and a key axis longer than a tile.
A source of batch size 1 serves every sequence; its gradient sums over them.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.ranges import RowRanges, source_ranges, tile_bounds
from unigist_jax.layout import GistLayout, UnitStarts, split_segment


class KeySource(NamedTuple):
    """One set of keys and values and the half-open range of it that each query row sees."""

    k: Float[Array, "Bk N Hkv D"]  # Bk: B, or 1 for a source that all sequences share
    v: Float[Array, "Bk N Hkv D"]
    rows: RowRanges


class BlockSizes(NamedTuple):
    q: int = 128
    k: int = 128


def interval_attention(
    q: Float[Array, "B P Hq D"], sources: tuple[KeySource, ...], block: BlockSizes = BlockSizes()
) -> Float[Array, "B P Hq D"]:
    """Softmax attention of each row over the union of its intervals in every source.

    Scores and accumulation are float32; products of bf16 or fp16 operands run in their own dtype. A row that sees no key
    gives zeros. Differentiable in reverse mode with respect to q, k and v.
    """
    if q.shape[1] == 0:
        return q
    num_kv_heads = sources[0].k.shape[2]
    rows = tuple(
        RowRanges(*(jnp.broadcast_to(x, q.shape[:2]).astype(jnp.int32) for x in source.rows)) for source in sources
    )
    present = [i for i, source in enumerate(sources) if source.k.shape[1]]
    grouped = q.reshape(*q.shape[:2], num_kv_heads, -1, q.shape[3])
    out = _attend(
        block, grouped, tuple((sources[i].k, sources[i].v) for i in present), tuple(rows[i] for i in present)
    )
    return out.reshape(q.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(block, q, keys, rows):
    return _forward(block, q, keys, rows)[0]


def _tiles(x, size, axis=1):
    """Pads `axis` to a multiple of `size` with zeros and moves its tiles to the front: [tiles, …, size, …]."""
    x = _pad(x, size, axis)
    x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _untile(x, length):
    """The inverse of `_tiles` on axis 1."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _pad(x, size, axis=1):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % size)
    return jnp.pad(x, widths)


def _take(x, index, size):
    """Key tile `index`, [Bk, size, Hkv, D]."""
    return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis=1)


def _scores(q, k, rows, index, block_k, scale):
    """Masked float32 scores of a query tile against key tile `index`, [B, Hkv, A, Q, K]."""
    k = jnp.broadcast_to(k, (q.shape[0], *k.shape[1:]))
    scores = jnp.einsum("bqhad,bkhd->bhaqk", q, k, preferred_element_type=jnp.float32) * scale
    column = index * block_k + jnp.arange(block_k)
    visible = (column >= rows.lo[..., None]) & (column < rows.hi[..., None])
    return jnp.where(visible[:, None, None], scores, -jnp.inf)


def _forward(block, q, keys, rows):
    length, scale = q.shape[1], q.shape[-1] ** -0.5
    padded = [(_pad(k, block.k), _pad(v, block.k)) for k, v in keys]

    def query_tile(tile):
        q_tile, row_tile = tile
        batch, size, heads, group, dim = q_tile.shape
        state = (
            jnp.full((batch, heads, group, size), -jnp.inf, jnp.float32),
            jnp.zeros((batch, heads, group, size), jnp.float32),
            jnp.zeros((batch, heads, group, size, dim), jnp.float32),
        )
        for (k, v), source_rows in zip(padded, row_tile, strict=True):

            def key_tile(index, state, k=k, v=v, source_rows=source_rows):
                maximum, total, acc = state
                scores = _scores(q_tile, _take(k, index, block.k), source_rows, index, block.k, scale)
                new_maximum = jnp.maximum(maximum, scores.max(-1))
                safe = jnp.where(jnp.isneginf(new_maximum), 0.0, new_maximum)
                weights = jnp.exp(scores - safe[..., None])
                shrink = jnp.exp(maximum - safe)
                v_tile = jnp.broadcast_to(_take(v, index, block.k), (batch, block.k, heads, dim))
                update = jnp.einsum(
                    "bhaqk,bkhd->bhaqd", weights.astype(v.dtype), v_tile, preferred_element_type=jnp.float32
                )
                return new_maximum, total * shrink + weights.sum(-1), acc * shrink[..., None] + update

            state = jax.lax.fori_loop(*tile_bounds(source_rows, block.k), key_tile, state)
        maximum, total, acc = state
        seen = total > 0
        out = jnp.where(seen[..., None], acc / jnp.where(seen, total, 1.0)[..., None], 0.0)
        lse = jnp.where(seen, maximum + jnp.log(jnp.where(seen, total, 1.0)), 0.0)
        return jnp.einsum("bhaqd->bqhad", out).astype(q.dtype), jnp.einsum("bhaq->bqha", lse)

    tiles = _tiles(q, block.q), jax.tree.map(lambda x: _tiles(x, block.q), rows)
    out, lse = jax.lax.map(query_tile, tiles)
    out = _untile(out, length)
    return out, (q, keys, rows, out, _untile(lse, length))


def _backward(block, residuals, d_out):
    q, keys, rows, out, lse = residuals
    length, scale = q.shape[1], q.shape[-1] ** -0.5
    padded = [(_pad(k, block.k), _pad(v, block.k)) for k, v in keys]
    delta = jnp.einsum("bqhad,bqhad->bqha", d_out.astype(jnp.float32), out.astype(jnp.float32))

    def query_tile(d_keys, tile):
        q_tile, row_tile, d_out_tile, lse_tile, delta_tile = tile
        lse_tile, delta_tile = (jnp.einsum("bqha->bhaq", x)[..., None] for x in (lse_tile, delta_tile))
        d_q = jnp.zeros(q_tile.shape, jnp.float32)
        new_d_keys = []
        for (k, v), source_rows, d_source in zip(padded, row_tile, d_keys, strict=True):

            def key_tile(index, state, k=k, v=v, source_rows=source_rows):
                d_q, d_k, d_v = state
                k_tile, v_tile = _take(k, index, block.k), _take(v, index, block.k)
                weights = jnp.exp(_scores(q_tile, k_tile, source_rows, index, block.k, scale) - lse_tile)
                k_tile, v_tile = (jnp.broadcast_to(x, (q_tile.shape[0], *x.shape[1:])) for x in (k_tile, v_tile))
                d_weights = jnp.einsum("bqhad,bkhd->bhaqk", d_out_tile, v_tile, preferred_element_type=jnp.float32)
                d_scores = (weights * (d_weights - delta_tile) * scale).astype(q.dtype)
                d_q += jnp.einsum("bhaqk,bkhd->bqhad", d_scores, k_tile, preferred_element_type=jnp.float32)
                d_k_tile = jnp.einsum("bhaqk,bqhad->bkhd", d_scores, q_tile, preferred_element_type=jnp.float32)
                d_v_tile = jnp.einsum(
                    "bhaqk,bqhad->bkhd", weights.astype(q.dtype), d_out_tile, preferred_element_type=jnp.float32
                )
                return d_q, _add_tile(d_k, d_k_tile, index), _add_tile(d_v, d_v_tile, index)

            d_q, *d_source = jax.lax.fori_loop(*tile_bounds(source_rows, block.k), key_tile, (d_q, *d_source))
            new_d_keys.append(tuple(d_source))
        return tuple(new_d_keys), d_q.astype(q.dtype)

    d_keys = tuple(tuple(jnp.zeros(x.shape, jnp.float32) for x in pair) for pair in padded)
    tiles = jax.tree.map(lambda x: _tiles(x, block.q), (q, rows, d_out, lse, delta))
    d_keys, d_q = jax.lax.scan(query_tile, d_keys, tiles)
    d_keys = jax.tree.map(lambda x, like: x[:, : like.shape[1]].astype(like.dtype), d_keys, keys)
    return _untile(d_q, length), d_keys, jax.tree.map(lambda _: None, rows)


def _add_tile(total, tile, index):
    """Adds a key tile's gradient [B, K, Hkv, D] into `total` [Bk, N, Hkv, D], summing over the batch if Bk is 1."""
    if total.shape[0] == 1:
        tile = tile.sum(0, keepdims=True)
    start = index * tile.shape[1]
    old = jax.lax.dynamic_slice_in_dim(total, start, tile.shape[1], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(total, old + tile, start, axis=1)


_attend.defvjp(_forward, _backward)


def gist_attention_blocked(
    q,
    kv,
    layout: GistLayout,
    first_unit: int | jax.Array,
    first_raw_unit: int | jax.Array,
    starts: UnitStarts,
    block: BlockSizes = BlockSizes(),
) -> Float[Array, "B P Hq D"]:
    """Blocked form of `pallas_kernels.gist_attention.gist_attention`; same arguments, `starts` per unit of the segment.

    Raw and gist rows are tiled apart: a tile that held both would visit the gists of the first and the raws of the last.
    """
    num_units = layout.segment_units(q.shape[1])
    ranges = source_ranges(layout, num_units, kv.sink_k.shape[0], first_unit, first_raw_unit, starts)
    keys = (kv.sink_k[None], kv.sink_v[None]), (kv.gist_k, kv.gist_v), (kv.raw_k, kv.raw_v)
    raw_rows, gist_rows = (
        jax.tree.map(lambda x, part=part: split_segment(x, layout, axis=1)[part], ranges) for part in (0, 1)
    )
    outputs = [
        interval_attention(rows_q, tuple(KeySource(*pair, r) for pair, r in zip(keys, rows, strict=True)), block)
        for rows_q, rows in zip(split_segment(q, layout, axis=1), (raw_rows, gist_rows), strict=True)
    ]
    return jnp.concatenate(outputs, axis=1)


def causal_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T Hkv D"],
    v: Float[Array, "B T Hkv D"],
    begin: jax.Array | None = None,
    block: BlockSizes = BlockSizes(),
) -> Float[Array, "B T Hq D"]:
    """Full causal attention, for the sinks among themselves and for models without gists.

    Args:
      begin: int32 [B, T], first visible key of each query (the start of its document); None: 0.
    """
    position = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
    begin = jnp.zeros_like(position) if begin is None else begin
    return interval_attention(q, (KeySource(k, v, RowRanges(begin, position + 1)),), block)
