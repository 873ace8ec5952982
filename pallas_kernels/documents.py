"""Causal attention within the documents of a packed row, by the kernels of gist attention.

Axis legend
  B  batch      T  positions, U = T / r units      Hq query heads, Hkv KV heads, D head dim

Attention over documents is gist attention whose window reaches back to a document's start, and whose gists no raw sees:
`gist_start[u] = u` leaves nothing between a unit's first visible gist and itself. The gists' own rows and keys are
zeros, and their output is dropped. So key tiles that no document of a query tile reaches are skipped, in O(T) memory.

  raws see         gists    raws, from the document's start on
  [ tile 17 ]   [ . . . . ]   [ .  .  .  .  ▒  █  █  ▒ ]
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.backends import choose
from pallas_kernels.gist_attention import GistKV
from unigist_jax.layout import GistLayout, UnitStarts

KERNELS = "hopper", "triton"  # backends that skip tiles on a GPU


def kernel(q: Float[Array, "B T Hq D"], k: Float[Array, "B T Hkv D"], ratio: int) -> str | None:
    """The kernel that takes these arrays here, cut into units of `ratio`; None if there is none."""
    if ratio < 2 or q.shape[1] % ratio:
        return None
    layout, (segment, kv) = GistLayout(ratio, 0, 0), jax.eval_shape(lambda q, k: _segment(q, k, k, ratio), q, k)
    name = choose(None, segment, kv, layout)[0]
    return name if name in KERNELS else None


def causal_documents(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T Hkv D"],
    v: Float[Array, "B T Hkv D"],
    doc_start: Int[Array, "B U"],
    backend: str | None = None,
) -> Float[Array, "B T Hq D"]:
    """Causal attention of each position within its document. Differentiable with respect to q, k and v.

    Args:
      doc_start: first unit of each unit's document; documents begin at multiples of r = T / U.
      backend: a name in `pallas_kernels.backends.BACKENDS`, or None for the first that can.

    Returns:
      [B, T, Hq, D] in q's dtype.

    Raises:
      ValueError: for an unknown backend, or one that cannot run here or does not take the arguments.
    """
    length, units = q.shape[1], doc_start.shape[1]
    layout = GistLayout(length // units, 0, 0)
    segment, kv = _segment(q, k, v, layout.ratio)
    unit = jnp.broadcast_to(jnp.arange(units, dtype=jnp.int32), doc_start.shape)
    name, module = choose(backend, segment, kv, layout)
    zero = jnp.int32(0)
    with jax.named_scope(f"causal_documents_{name}"):
        starts = UnitStarts(unit, doc_start.astype(jnp.int32))
        return module.attend(segment, kv, layout, zero, zero, starts)[:, :length]


def _segment(q, k, v, ratio: int):
    """Queries and keys of a segment of the raws, with zeros for gists."""
    batch, units, (heads, dim) = q.shape[0], q.shape[1] // ratio, k.shape[2:]
    gists, none = jnp.zeros((batch, units, heads, dim), k.dtype), jnp.zeros((0, heads, dim), k.dtype)
    rows = jnp.zeros((batch, units, *q.shape[2:]), q.dtype)
    return jnp.concatenate([q, rows], axis=1), GistKV(none, none, gists, gists, k, v)
