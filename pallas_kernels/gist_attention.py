"""The public op of gist attention: its checks, the choice of a backend, and the call.

Axis legend
  B    batch
  U    gist units of the query segment, P = (r + 1) * U its positions, stored gist-shifted [ U * r raws | U gists ]
  G    gists given as keys (unit index 0 … G - 1), R raws given as keys (from unit `first_raw_unit`), s sinks
  Hq   query heads, Hkv  KV heads (Hq a multiple of Hkv), D  head dim

One op serves four situations; only where the keys come from differs:

  |                     | queries              | gist keys               | raw keys                        |
  |---------------------|----------------------|-------------------------|---------------------------------|
  | one-pass training   | the whole row        | the segment's own       | the segment's own               |
  | chunked prefill     | one chunk            | cache, then the chunk's | last k units, then the chunk's  |
  | context parallelism | one device's segment | all-gathered            | neighbour's last k units + own  |
  | decoding            | `decode_attention`: one raw and the gist it may complete, against the cache in place   |
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.backends import choose
from unigist_jax.layout import GistLayout, unit_starts


class GistKV(NamedTuple):
    """Keys (already rotated) and values of gist attention."""

    sink_k: Float[Array, "s Hkv D"]
    sink_v: Float[Array, "s Hkv D"]
    gist_k: Float[Array, "B G Hkv D"]
    gist_v: Float[Array, "B G Hkv D"]
    raw_k: Float[Array, "B R Hkv D"]
    raw_v: Float[Array, "B R Hkv D"]


def gist_attention(
    q: Float[Array, "B P Hq D"],
    kv: GistKV,
    layout: GistLayout,
    first_unit: int | Int[Array, ""] = 0,
    first_raw_unit: int | Int[Array, ""] = 0,
    doc_start: Int[Array, "B G"] | None = None,
    raw_start: Int[Array, "B G"] | None = None,
    backend: str | None = None,
) -> Float[Array, "B P Hq D"]:
    """Attention of a gist-shifted segment over sinks, gists and a window of raws (UniGist, Eq. 3).

    Args:
      q: queries of units `first_unit … first_unit + U - 1`, already rotated.
      kv: keys and values. Gists after a query's unit are never seen, so a cache may be passed at full capacity.
      layout: ratio, sinks and window.
      first_unit: first unit of the segment; an int or a traced int32 scalar.
      first_raw_unit: unit of the first raw key; an int or a traced int32 scalar. The raws must reach from the first
        visible unit, `max(0, first_unit - k)` or its document's start, to the segment's end.
      doc_start: int32 [B, G], first unit of each unit's document; None for one document from unit 0.
      raw_start: int32 [B, G], first unit whose raws a unit sees, in place of the sliding window `u - k`; for chunk
        windows. The document's start still cuts it.
      backend: a name in `pallas_kernels.backends.BACKENDS`, or None for the first that can.

    Returns:
      [B, P, Hq, D] in q's dtype. Scores are scaled by D ** -0.5.

    Raises:
      ValueError: for shapes that do not fit each other or the layout, raws that do not reach far enough (when the units
        are ints), an unknown backend, or one that cannot run here or does not take the arguments.
    """
    num_units = _check(q, kv, layout, first_unit, first_raw_unit, doc_start, raw_start)
    if q.size == 0:
        return q
    name, module = choose(backend, q, kv, layout)
    positions = first_unit, first_raw_unit, doc_start, raw_start
    # known positions are computed here and now: a backend may make its tables of them beforehand
    known = not any(isinstance(x, jax.core.Tracer) for x in positions)
    with jax.ensure_compile_time_eval() if known else contextlib.nullcontext():
        first_unit, first_raw_unit = (jnp.asarray(x, jnp.int32) for x in (first_unit, first_raw_unit))

        def of_segment(per_unit):
            if per_unit is None:
                return None
            return jax.lax.dynamic_slice_in_dim(per_unit.astype(jnp.int32), first_unit, num_units, axis=1)

        starts = unit_starts(layout, num_units, first_unit, of_segment(doc_start), of_segment(raw_start))
    with jax.named_scope(f"gist_attention_{name}"):
        return module.attend(q, kv, layout, first_unit, first_raw_unit, starts)


def check_kv(q: Array, kv: GistKV, layout: GistLayout) -> None:
    """Raises ValueError unless queries, keys and values fit each other and the layout's sinks."""
    for name, x in {"q": q, **kv._asdict()}.items():
        rank = 3 if name.startswith("sink") else 4
        if x.ndim != rank or not jnp.issubdtype(x.dtype, jnp.floating):
            axes = {3: "[s, Hkv, D]", 4: "[B, positions, heads, D]"}[rank]
            raise ValueError(f"{name} has shape {x.shape} and dtype {x.dtype}, expected floating numbers {axes}")
    batch, _, num_heads, dim = q.shape
    num_kv_heads = kv.gist_k.shape[2]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads are not a multiple of {num_kv_heads} KV heads")
    num_gists, num_raws = kv.gist_k.shape[1], kv.raw_k.shape[1]
    expected = {
        "sink": (kv.sink_k.shape[0], num_kv_heads, dim),
        "gist": (batch, num_gists, num_kv_heads, dim),
        "raw": (batch, num_raws, num_kv_heads, dim),
    }
    for part, shape in expected.items():
        for name in (f"{part}_k", f"{part}_v"):
            if getattr(kv, name).shape != shape:
                raise ValueError(f"kv.{name} has shape {getattr(kv, name).shape}, expected {shape} beside q {q.shape}")
    if kv.sink_k.shape[0] != layout.num_sinks:
        raise ValueError(f"kv holds {kv.sink_k.shape[0]} sinks, the layout has num_sinks={layout.num_sinks}")


def _check(q, kv, layout, first_unit, first_raw_unit, doc_start, raw_start) -> int:
    """Checks everything that is known before the call; returns the segment's units."""
    check_kv(q, kv, layout)
    num_units, num_gists = layout.segment_units(q.shape[1]), kv.gist_k.shape[1]
    raw_units = layout.num_units(kv.raw_k.shape[1])
    for name, per_unit in (("doc_start", doc_start), ("raw_start", raw_start)):
        if per_unit is None:
            continue
        if per_unit.shape != (q.shape[0], num_gists) or not jnp.issubdtype(per_unit.dtype, jnp.integer):
            raise ValueError(
                f"{name} has shape {per_unit.shape} and dtype {per_unit.dtype}, expected one integer a gist: "
                f"{(q.shape[0], num_gists)}"
            )
    if num_gists < num_units:
        raise ValueError(f"{num_gists} gists given for a segment of {num_units} units: pass at least its own gists")
    if isinstance(first_unit, int) and not 0 <= first_unit <= num_gists - num_units:
        raise ValueError(f"units {first_unit} … {first_unit + num_units - 1} queried, but kv holds {num_gists} gists")
    if isinstance(first_unit, int) and isinstance(first_raw_unit, int):
        last = first_unit + num_units
        need = 0 if raw_start is not None else max(0, first_unit - layout.window_units)
        window_missing = first_raw_unit > need and doc_start is None and raw_start is None
        if window_missing or first_raw_unit + raw_units < last:
            raise ValueError(
                f"raws of units {first_raw_unit} … {first_raw_unit + raw_units - 1} given, but the segment sees units "
                f"{need} … {last - 1}"
            )
    return num_units
