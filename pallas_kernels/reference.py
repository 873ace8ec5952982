"""The oracle of gist attention: dense, float32, at highest matmul precision, straight from the paper's Eq. 3.

Axis legend
  B  batch                       Hq  query heads, Hkv  KV heads, D  head dim
  P  query positions, (r + 1) * U, gist-shifted [ U * r raws | U gists ]
  K  all keys: s sinks, then G gists, then R raws

It builds the whole [B, P, K] mask and [B, Hkv, Hq/Hkv, P, K] scores: for tests and for reading, not for long inputs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.decode_attention import ring_raw_index
from unigist_jax.layout import GistLayout, UnitStarts


def visibility_mask(
    layout: GistLayout,
    num_units: int,
    num_sinks: int,
    num_gists: int,
    num_raws: int,
    first_unit: int | jax.Array,
    first_raw_unit: int | jax.Array,
    starts: UnitStarts,
) -> Bool[Array, "B P K"]:
    """Which key each query sees; keys in the order sinks, gists, raws."""
    r = layout.ratio
    unit = first_unit + jnp.arange(num_units)
    raw_index = (unit[:, None] * r + jnp.arange(r)).reshape(-1)
    key_gist = jnp.arange(num_gists)
    key_raw = first_raw_unit * r + jnp.arange(num_raws)

    def rows(query_unit, last_gist, last_raw, begin, window):
        sinks = jnp.ones((*begin.shape, num_sinks), bool)
        gists = (key_gist >= begin[..., None]) & (key_gist <= last_gist[:, None])
        raws = (key_raw // r >= window[..., None]) & (key_raw <= last_raw[:, None])
        return jnp.concatenate([sinks, gists, raws], axis=-1)

    begin, window = (jnp.atleast_2d(x) for x in starts)
    raw_rows = rows(unit.repeat(r), unit.repeat(r) - 1, raw_index, begin.repeat(r, -1), window.repeat(r, -1))
    gist_rows = rows(unit, unit, (unit + 1) * r - 1, begin, window)
    return jnp.concatenate([raw_rows, gist_rows], axis=-2)


def masked_attention(
    q: Float[Array, "B P Hq D"],
    k: Float[Array, "B K Hkv D"],
    v: Float[Array, "B K Hkv D"],
    mask: Bool[Array, "#B P K"],
) -> Float[Array, "B P Hq D"]:
    """Softmax attention under a dense mask in float32; grouped queries share a KV head. Returns q's dtype."""
    batch, length, num_heads, dim = q.shape
    group = num_heads // k.shape[2]
    grouped = q.reshape(batch, length, k.shape[2], group, dim).astype(jnp.float32)
    precision = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("bphgd,bkhd->bhgpk", grouped, k.astype(jnp.float32), precision=precision) * dim**-0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bhgpk,bkhd->bphgd", weights, v.astype(jnp.float32), precision=precision)
    return out.reshape(q.shape).astype(q.dtype)


def refusal(q, kv, layout) -> None:
    """It takes everything."""
    return None


decode_refusal = refusal


def attend(q, kv, layout, first_unit, first_raw_unit, starts) -> Float[Array, "B P Hq D"]:
    """Oracle of `pallas_kernels.gist_attention.gist_attention`; same arguments, `starts` per unit of the segment."""
    batch = q.shape[0]
    mask = visibility_mask(
        layout,
        layout.segment_units(q.shape[1]),
        kv.sink_k.shape[0],
        kv.gist_k.shape[1],
        kv.raw_k.shape[1],
        first_unit,
        first_raw_unit,
        starts,
    )

    def keys(sinks, gists, raws):
        sinks = jnp.broadcast_to(sinks, (batch, *sinks.shape))
        return jnp.concatenate([x.astype(jnp.float32) for x in (sinks, gists, raws)], axis=1)

    return masked_attention(q, keys(kv.sink_k, kv.gist_k, kv.raw_k), keys(kv.sink_v, kv.gist_v, kv.raw_v), mask)


def decode_mask(
    layout: GistLayout, num_sinks: int, num_gists: int, slots: int, raw_index: Int32[Array, " B"]
) -> Bool[Array, "B 2 K"]:
    """What the new raw (row 0) and its unit's gist (row 1) see; keys in the order sinks, gists, ring slots."""
    unit = (raw_index // layout.ratio)[:, None]
    gist = jnp.arange(num_gists)
    held = ring_raw_index(raw_index, slots)
    reach = unit % (layout.chunk // layout.ratio) if layout.chunk else layout.window_units
    raws = held >= jnp.maximum(0, unit - reach) * layout.ratio
    sinks = jnp.ones((raw_index.shape[0], num_sinks), bool)
    rows = [jnp.concatenate([sinks, gists, raws], axis=-1) for gists in (gist < unit, gist <= unit)]
    return jnp.stack(rows, axis=1)


def decode(q, kv, layout, raw_index) -> Float[Array, "B 2 Hq D"]:
    """Oracle of `pallas_kernels.decode_attention.decode_attention`; same arguments."""
    mask = decode_mask(layout, kv.sink_k.shape[0], kv.gist_k.shape[1], kv.raw_k.shape[1], raw_index)

    def keys(sinks, gists, raws):
        return jnp.concatenate([jnp.broadcast_to(sinks, (q.shape[0], *sinks.shape)), gists, raws], axis=1)

    return masked_attention(q, keys(kv.sink_k, kv.gist_k, kv.raw_k), keys(kv.sink_v, kv.gist_v, kv.raw_v), mask)
