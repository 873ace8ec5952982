"""Attention over per-row key intervals in pure XLA: any device, differentiable, memory O(T * block).

Axis legend
  B  batch                      Hkv KV heads, A  query heads of one KV head (Hq = Hkv * A), D  head dim
  P  query rows, cut into tiles of `block.q`
  S  key sources (sinks, gists, raws), each padded to whole tiles of `block.k` and laid one behind the other: N keys

               key tiles   sinks | gists                | raws
  row tile 0 (raws)        [ ▒   | ▒                    | ▒              ]    ▒ visited, masked by two compares
  row tile 1 (raws)        [ ▒   | ▒    ▒               | ▒    ▒         ]      blank: never visited
  row tile 2 (gists)       [ ▒   | ▒    ▒               | ▒    ▒         ]

Each row sees one interval of each source, so a row tile visits one run of key tiles in each: a single loop walks the
runs one after the other, its trip count computed from the intervals. The forward pass keeps a running maximum and sum
per row; the backward pass recomputes the weights tile by tile from the saved log-sum-exp (natural logarithm). No array
has both a query and a key axis longer than a tile.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.backends import named_residuals
from pallas_kernels.ranges import RowRanges, source_ranges, tile_runs
from pallas_kernels.reference import decode, decode_refusal, refusal
from unigist_jax.layout import GistLayout, UnitStarts, split_segment

# a decoding step is one pair of rows: the dense form needs no blocks; and like it this takes any arguments
__all__ = ["BlockSizes", "attend", "causal_attention", "decode", "decode_refusal", "interval_attention", "refusal"]


class KeySource(NamedTuple):
    """One set of keys and values and the half-open range of it that each query row sees."""

    k: Float[Array, "Bk N Hkv D"]  # Bk: B, or 1 for a source that all sequences share
    v: Float[Array, "Bk N Hkv D"]
    rows: RowRanges


class BlockSizes(NamedTuple):
    """Rows of a query tile, and keys of a key tile."""

    q: int = 128
    k: int = 128


def interval_attention(
    q: Float[Array, "B P Hq D"], sources: tuple[KeySource, ...], block: BlockSizes = BlockSizes()
) -> Float[Array, "B P Hq D"]:
    """Softmax attention of each row over the union of its intervals in every source.

    Scores and accumulation are float32; products of bf16 or fp16 operands run in their own dtype. A row that sees no
    key gives zeros. Differentiable in reverse mode with respect to q, k and v.
    """
    batch, length, _, dim = q.shape
    if length == 0:
        return q
    block_q = min(block.q, -(-length // 8) * 8)
    keys, values, lo, hi, offset = [], [], [], [], 0
    for source in sources:
        k, v = (_pad(x, block.k) for x in (source.k, source.v))
        keys.append(jnp.broadcast_to(k, (batch, *k.shape[1:])))
        values.append(jnp.broadcast_to(v, (batch, *v.shape[1:])))
        for ends, end in ((lo, source.rows.lo), (hi, source.rows.hi)):
            ends.append(_pad(jnp.broadcast_to(end, (batch, length)).astype(jnp.int32), block_q) + offset)
        offset += k.shape[1]
    rows = RowRanges(jnp.stack(lo, axis=1), jnp.stack(hi, axis=1))
    grouped = _pad(q.reshape(batch, length, keys[0].shape[2], -1, dim), block_q)
    out = _attend(BlockSizes(block_q, block.k), grouped, jnp.concatenate(keys, 1), jnp.concatenate(values, 1), rows)
    return out[:, :length].reshape(q.shape)


def _pad(x, size):
    """Pads axis 1 with zeros to a multiple of `size`."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))


def _tiles(x, size, axis=1):
    """Tiles of `axis` in front: [tiles, …, size, …]."""
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)


def _untile(x):
    """The inverse of `_tiles` on axis 1."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(block, q, k, v, rows):
    """q [B, P, Hkv, A, D], k and v [B, N, Hkv, D], rows [B, S, P]; P and N are whole tiles."""
    return _forward(block, q, k, v, rows)[0]


def _masked_scores(block, q, k, rows, source, index):
    """Float32 scores of a query tile against key tile `index`, -inf where masked: [B, Hkv, A, Q, K]."""
    k = jax.lax.dynamic_slice_in_dim(k, index * block.k, block.k, axis=1)
    scores = jnp.einsum("bqhad,bkhd->bhaqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    column = index * block.k + jnp.arange(block.k, dtype=jnp.int32)
    lo, hi = (jax.lax.dynamic_index_in_dim(x, source, axis=1, keepdims=False)[..., None] for x in rows)
    visible = (column >= lo) & (column < hi)
    return jnp.where(visible[:, None, None], scores, -jnp.inf), k


def _forward(block, q, k, v, rows):
    def query_tile(tile):
        q_tile, row_tile = tile
        count, locate = tile_runs(row_tile, block.k)

        def key_tile(i, state):
            maximum, total, acc = state
            source, index = locate(i)
            scores, _ = _masked_scores(block, q_tile, k, row_tile, source, index)
            new_maximum = jnp.maximum(maximum, scores.max(-1))
            safe = jnp.where(jnp.isneginf(new_maximum), 0.0, new_maximum)
            weights = jnp.exp(scores - safe[..., None])
            shrink = jnp.exp(maximum - safe)
            v_tile = jax.lax.dynamic_slice_in_dim(v, index * block.k, block.k, axis=1)
            update = jnp.einsum(
                "bhaqk,bkhd->bhaqd", weights.astype(v.dtype), v_tile, preferred_element_type=jnp.float32
            )
            return new_maximum, total * shrink + weights.sum(-1), acc * shrink[..., None] + update

        batch, size, heads, group, dim = q_tile.shape
        shape = (batch, heads, group, size)
        state = jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.float32), jnp.zeros((*shape, dim))
        maximum, total, acc = jax.lax.fori_loop(0, count, key_tile, state)
        seen = total > 0
        total = jnp.where(seen, total, 1.0)
        lse = jnp.where(seen, maximum + jnp.log(total), 0.0)
        return jnp.einsum("bhaqd->bqhad", acc / total[..., None]).astype(q.dtype), jnp.einsum("bhaq->bqha", lse)

    tiles = _tiles(q, block.q), jax.tree.map(lambda x: _tiles(x, block.q, axis=2), rows)
    out, lse = named_residuals(*(_untile(x) for x in jax.lax.map(query_tile, tiles)))
    return out, (q, k, v, rows, out, lse)


def _backward(block, residuals, d_out):
    q, k, v, rows, out, lse = residuals
    delta = jnp.einsum("bqhad,bqhad->bqha", d_out.astype(jnp.float32), out.astype(jnp.float32))

    def add_tile(total, tile, start):
        old = jax.lax.dynamic_slice_in_dim(total, start, block.k, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(total, old + tile, start, axis=1)

    def query_tile(d_kv, tile):
        q_tile, row_tile, d_out_tile, lse_tile, delta_tile = tile
        lse_tile, delta_tile = (jnp.einsum("bqha->bhaq", x)[..., None] for x in (lse_tile, delta_tile))
        count, locate = tile_runs(row_tile, block.k)

        def key_tile(i, state):
            d_q, d_k, d_v = state
            source, index = locate(i)
            scores, k_tile = _masked_scores(block, q_tile, k, row_tile, source, index)
            v_tile = jax.lax.dynamic_slice_in_dim(v, index * block.k, block.k, axis=1)
            weights = jnp.exp(scores - lse_tile)
            d_weights = jnp.einsum("bqhad,bkhd->bhaqk", d_out_tile, v_tile, preferred_element_type=jnp.float32)
            d_scores = (weights * (d_weights - delta_tile) * q.shape[-1] ** -0.5).astype(q.dtype)
            weights = weights.astype(q.dtype)
            d_q += jnp.einsum("bhaqk,bkhd->bqhad", d_scores, k_tile, preferred_element_type=jnp.float32)
            d_k_tile = jnp.einsum("bhaqk,bqhad->bkhd", d_scores, q_tile, preferred_element_type=jnp.float32)
            d_v_tile = jnp.einsum("bhaqk,bqhad->bkhd", weights, d_out_tile, preferred_element_type=jnp.float32)
            start = index * block.k
            return d_q, add_tile(d_k, d_k_tile, start), add_tile(d_v, d_v_tile, start)

        d_q, *d_kv = jax.lax.fori_loop(0, count, key_tile, (jnp.zeros(q_tile.shape, jnp.float32), *d_kv))
        return tuple(d_kv), d_q.astype(q.dtype)

    row_tiles = jax.tree.map(lambda x: _tiles(x, block.q, axis=2), rows)
    tiles = _tiles(q, block.q), row_tiles, *(_tiles(x, block.q) for x in (d_out, lse, delta))
    zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    (d_k, d_v), d_q = jax.lax.scan(query_tile, zeros, tiles)
    return _untile(d_q), d_k.astype(k.dtype), d_v.astype(v.dtype), jax.tree.map(lambda _: None, rows)


_attend.defvjp(_forward, _backward)


def attend(
    q,
    kv,
    layout: GistLayout,
    first_unit: int | jax.Array,
    first_raw_unit: int | jax.Array,
    starts: UnitStarts,
    block: BlockSizes = BlockSizes(),
) -> Float[Array, "B P Hq D"]:
    """Blocked form of `pallas_kernels.gist_attention.gist_attention`; same arguments, `starts` per unit of the segment.

    Raws are padded to whole row tiles, so that no tile holds both: it would visit the gists of the first gist rows and
    the raws of the last raw rows.
    """
    num_units = layout.segment_units(q.shape[1])
    num_raws = num_units * layout.ratio
    ranges = source_ranges(layout, num_units, kv.sink_k.shape[0], first_unit, first_raw_unit, starts)
    block = BlockSizes(min(block.q, -(-num_raws // 8) * 8), block.k)

    def pad_raws(x):
        raws, gists = split_segment(x, layout, axis=1)
        return jnp.concatenate([_pad(raws, block.q), gists], axis=1)

    sinks, gists, raws = (RowRanges(*(pad_raws(end) for end in rows)) for rows in ranges)
    sources = (
        KeySource(kv.sink_k[None], kv.sink_v[None], sinks),
        KeySource(kv.gist_k, kv.gist_v, gists),
        KeySource(kv.raw_k, kv.raw_v, raws),
    )
    out = interval_attention(pad_raws(q), sources, block)
    return jnp.concatenate([out[:, :num_raws], out[:, out.shape[1] - num_units :]], axis=1)


def causal_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T Hkv D"],
    v: Float[Array, "B T Hkv D"],
    begin: jax.Array | None = None,
    block: BlockSizes = BlockSizes(),
) -> Float[Array, "B T Hq D"]:
    """Full causal attention, for models without gists.

    Args:
      begin: int32 [B, T], first visible key of each query (the start of its document); None: 0.
    """
    position = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
    begin = jnp.zeros_like(position) if begin is None else begin
    return interval_attention(q, (KeySource(k, v, RowRanges(begin, position + 1)),), block)
