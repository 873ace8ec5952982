"""The gists of one layer, keys or values, as a cache stores them: plain, or quantised page by page.

Axis legend
  B  batch      G  gist slots      N = G / PAGE  pages      U  units of a chunk      Hkv KV heads      D  head dim

  plain      [ g0 g1 g2 … ]                                   in the compute dtype
  quantised  values [ page 0 | page 1 | page 2 … ]            int8 or fp8, one scale a page and head
             page   [ g128 g129 . . ]                         the page in progress, in the compute dtype

A page is quantised once it is whole, so a gist is rounded once. The page in progress is what later steps still write
to; its rounded form is written along at every step and seen by nothing. Attention takes plain gists: quantised ones are
restored one layer at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Num

from unigist_jax.pages import PAGE
from unigist_jax.rows import set_slots
from unigist_jax.sharding import constrain

GIST_DTYPES = ("int8", "float8_e4m3fn")


class QuantizedGists(NamedTuple):
    """Keys or values of gists, rounded, and the page of each sequence that is not."""

    values: Num[Array, "B G Hkv D"]
    scale: Float[Array, "B N Hkv"]
    page: Float[Array, "B PAGE Hkv D"]


Gists = Array | QuantizedGists


def check_gist_dtype(name: str | None) -> None:
    """Raises ValueError for a dtype that gists are not stored in, naming those that they are."""
    if name is not None and name not in GIST_DTYPES:
        raise ValueError(f"gist_dtype={name!r} is unknown; choose one of {GIST_DTYPES} or None for the compute dtype")


def empty_gists(batch: int, slots: int, heads: int, dim: int, dtype: str, gist_dtype: str | None) -> Gists:
    """No gists yet, in `slots` slots; heads split over the mesh in context, if there is one."""
    if gist_dtype is None:
        return constrain(jnp.zeros((batch, slots, heads, dim), dtype), "batch", None, "heads", None)
    values = constrain(jnp.zeros((batch, slots, heads, dim), gist_dtype), "batch", None, "heads", None)
    scale = constrain(jnp.ones((batch, slots // PAGE, heads), jnp.float32), "batch", None, "heads")
    return QuantizedGists(values, scale, empty_gists(batch, PAGE, heads, dim, dtype, None))


def num_slots(gists: Gists) -> int:
    """`G`, slots of each sequence."""
    return (gists.values if isinstance(gists, QuantizedGists) else gists).shape[1]


def with_slots(gists: Gists, slots: int) -> Gists:
    """The same gists in more (or fewer) slots."""

    def resize(x, size):
        return jnp.pad(x[:, :size], [(0, 0), (0, max(0, size - x.shape[1]))] + [(0, 0)] * (x.ndim - 2))

    if isinstance(gists, QuantizedGists):
        return QuantizedGists(resize(gists.values, slots), resize(gists.scale, slots // PAGE), gists.page)
    return resize(gists, slots)


def write_chunk(
    gists: Gists, new: Float[Array, "B U Hkv D"], first_unit: Int32[Array, ""], before: Array, after: Array
) -> tuple[Gists, Float[Array, "B G Hkv D"]]:
    """Writes a chunk's gists from slot `first_unit` on; the new store, and all gists as attention takes them.

    Args:
      before, after: int32 [B], the unit in progress of each sequence before and after the chunk.
    """
    if not isinstance(gists, QuantizedGists):
        gists = jax.lax.dynamic_update_slice_in_dim(gists, new, first_unit, axis=1)
        return gists, gists
    plain = jax.lax.dynamic_update_slice_in_dim(_plain(gists, before), new, first_unit, axis=1)
    values, scale = _quantize(plain, gists.values.dtype)
    touched = jnp.arange(scale.shape[1]) >= first_unit // PAGE  # pages before are rounded already
    values = jnp.where(touched.repeat(PAGE)[None, :, None, None], values, gists.values)
    scale = jnp.where(touched[None, :, None], scale, gists.scale)
    slots = _page_slots(after, plain.shape[1])
    return QuantizedGists(values, scale, plain[jnp.arange(len(slots))[:, None], slots]), plain


def write_step(
    gists: Gists, new: Float[Array, "B Hkv D"], unit: Int32[Array, " B"]
) -> tuple[Gists, Float[Array, "B G Hkv D"]]:
    """Writes one gist of each sequence to slot `unit`; the new store, and all gists as attention takes them.

    Slots beyond the last are dropped as `set_slots` does.
    """
    if not isinstance(gists, QuantizedGists):
        gists = set_slots(gists, unit, new)
        return gists, gists
    rows = jnp.arange(unit.shape[0])
    page = set_slots(gists.page, unit % PAGE, new)
    values, scale = _quantize(page, gists.values.dtype)
    slots = unit[:, None] // PAGE * PAGE + jnp.arange(PAGE)
    gists = QuantizedGists(
        gists.values.at[rows[:, None], slots].set(values), gists.scale.at[rows, unit // PAGE].set(scale[:, 0]), page
    )
    return gists, _plain(gists, unit)


def _page_slots(unit, slots: int):
    """Slots [B, PAGE] of the page that holds unit `unit` [B], the last page for one beyond it."""
    return jnp.minimum(unit // PAGE, slots // PAGE - 1)[:, None] * PAGE + jnp.arange(PAGE)


def _plain(gists: QuantizedGists, unit: Int32[Array, " B"]) -> Float[Array, "B G Hkv D"]:
    """All gists in the compute dtype; those of the page that holds `unit` as they were."""
    scale = gists.scale.repeat(PAGE, axis=1)[..., None]
    plain = (gists.values.astype(jnp.float32) * scale).astype(gists.page.dtype)
    slots = _page_slots(unit, plain.shape[1])
    return plain.at[jnp.arange(len(slots))[:, None], slots].set(gists.page)


def _quantize(plain: Float[Array, "B G Hkv D"], dtype) -> tuple[Num[Array, "B G Hkv D"], Float[Array, "B N Hkv"]]:
    """Rounds each head of each page by its own largest magnitude."""
    batch, slots, heads, dim = plain.shape
    pages = plain.reshape(batch, slots // PAGE, PAGE, heads, dim).astype(jnp.float32)
    integer = jnp.issubdtype(dtype, jnp.integer)
    largest = float(jnp.iinfo(dtype).max if integer else jnp.finfo(dtype).max)
    scale = jnp.abs(pages).max(axis=(2, 4)) / largest
    scale = jnp.where(scale > 0, scale, 1.0)
    values = pages / scale[:, :, None, :, None]
    values = (jnp.round(values) if integer else values).astype(dtype)
    return values.reshape(plain.shape), scale
