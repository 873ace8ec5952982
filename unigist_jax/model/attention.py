"""Attention of a decoder layer: projections, and the call of the attention op on each device's own share.

Axis legend
  B  batch      P  positions of a segment, (r + 1) * U      E  hidden size
  Hq query heads, Hkv KV heads, D head dim                  s  sinks, G gist keys, R raw keys
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels import GistKV, decode_attention, documents, gist_attention
from pallas_kernels.backends import target_device
from pallas_kernels.blocked import causal_attention
from pallas_kernels.reference import masked_attention
from unigist_jax.context import AXIS, Placement, all_gists, raws_before
from unigist_jax.layout import GistLayout, split_segment
from unigist_jax.model.config import LlamaConfig
from unigist_jax.sharding import partition_spec

INPUTS = "attention_inputs"  # the name under which `jax.checkpoint` policies find rotated q and k, and v


class Attention(nnx.Module):
    """Query, key, value and output projections of grouped-query attention."""

    def __init__(self, config: LlamaConfig, stack: tuple[int, ...] = (), *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02, dtype=config.param_dtype)
        size, dim = config.hidden_size, config.head_dim
        self.query = nnx.Param(init(rngs.params(), (*stack, size, config.num_heads, dim)))
        self.key = nnx.Param(init(rngs.params(), (*stack, size, config.num_kv_heads, dim)))
        self.value = nnx.Param(init(rngs.params(), (*stack, size, config.num_kv_heads, dim)))
        self.out = nnx.Param(init(rngs.params(), (*stack, config.num_heads, dim, size)))

    def project(
        self, x: Float[Array, "B P E"], cos: Float[Array, "_ P half"], sin: Float[Array, "_ P half"]
    ) -> tuple[Float[Array, "B P Hq D"], Float[Array, "B P Hkv D"], Float[Array, "B P Hkv D"]]:
        """Queries and keys, both rotated, and values."""
        q, k, v = (jnp.einsum("bpe,ehd->bphd", x, w[...].astype(x.dtype)) for w in (self.query, self.key, self.value))
        return tuple(checkpoint_name(y, INPUTS) for y in (rotate(q, cos, sin), rotate(k, cos, sin), v))

    def output(self, context: Float[Array, "B P Hq D"]) -> Float[Array, "B P E"]:
        """The output projection of what the heads have gathered."""
        return jnp.einsum("bphd,hde->bpe", context, self.out[...].astype(context.dtype))


def rotate(
    x: Float[Array, "B P H D"], cos: Float[Array, "_ P half"], sin: Float[Array, "_ P half"]
) -> Float[Array, "B P H D"]:
    """Turns the pairs (x[i], x[i + D/2]) by the angles, in float32 (the pairing of HF's Llama)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


_ROWS = partition_spec("batch", None)
_HEADS = partition_spec("batch", None, "heads", None)
_PLACED_HEADS = partition_spec("batch", "positions", "heads", None)
_SINK_HEADS = partition_spec(None, "heads", None)
_SHARED_HEADS = partition_spec(None, None, "heads", None)
_KV_HEADS = GistKV(_SINK_HEADS, _SINK_HEADS, *[_HEADS] * 4)


def _on_each_device(function, in_specs, out_specs, *arguments):
    """Runs `function` under shard_map over the mesh in context (batch and heads split), or as it is without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(*arguments)
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arguments)


def segment_attention(
    q: Float[Array, "B P Hq D"],
    kv: GistKV,
    layout: GistLayout,
    first_unit: int | Int[Array, ""] = 0,
    first_raw_unit: int | Int[Array, ""] = 0,
    doc_start: Int[Array, "B G"] | None = None,
    backend: str | None = None,
) -> Float[Array, "B P Hq D"]:
    """`gist_attention` on each device's rows and heads."""

    def attend(q, kv, first_unit, first_raw_unit, *doc_start):
        return gist_attention(q, kv, layout, first_unit, first_raw_unit, *doc_start, backend=backend)

    scalar, documents = partition_spec(), () if doc_start is None else (doc_start,)
    specs = _HEADS, _KV_HEADS, scalar, scalar, *[_ROWS for _ in documents]
    units = jnp.asarray(first_unit, jnp.int32), jnp.asarray(first_raw_unit, jnp.int32)
    return _on_each_device(attend, specs, _HEADS, q, kv, *units, *documents)


def step_attention(
    q: Float[Array, "B 2 Hq D"], kv: GistKV, layout: GistLayout, raw_index: Int[Array, " B"], backend: str | None = None
) -> Float[Array, "B 2 Hq D"]:
    """`decode_attention` on each device's rows and heads."""

    # no sinks are made where they are wanted: XLA of jax 0.11.2 crashes on empty arrays over several CPU devices
    sinks, held = (kv[:2] if layout.num_sinks else ()), kv[2:]

    def attend(q, held, raw_index, *sinks):
        none = jnp.zeros((0, *held[0].shape[2:]), held[0].dtype)
        return decode_attention(q, GistKV(*(sinks or (none, none)), *held), layout, raw_index, backend)

    specs = _HEADS, (_HEADS,) * 4, partition_spec("batch"), *[_SINK_HEADS for _ in sinks]
    return _on_each_device(attend, specs, _HEADS, q, held, raw_index, *sinks)


def placed_attention(
    q: Float[Array, "B P Hq D"],
    k: Float[Array, "B P Hkv D"],
    v: Float[Array, "B P Hkv D"],
    sinks: tuple[Float[Array, "s Hkv D"], Float[Array, "s Hkv D"]],
    layout: GistLayout,
    placement: Placement,
    doc_start: Int[Array, "B U"] | None,
    backend: str | None = None,
) -> Float[Array, "B P Hq D"]:
    """`gist_attention` of whole rows in placed order, on each device's rows, heads and pieces (context.py)."""
    pieces = 1 if placement.devices == 1 else 2  # of a device
    k_units = layout.window_units
    halo = k_units * layout.ratio

    def attend(q, k, v, sink_k, sink_v, doc_start):
        (raw_k, gist_k), (raw_v, gist_v) = (
            zip(*(split_segment(piece, layout, axis=1) for piece in jnp.split(x, pieces, axis=1)), strict=True)
            for x in (k, v)
        )
        gists = [jnp.concatenate(x, axis=1) for x in (gist_k, gist_v)]
        first_pieces = [0]
        if placement.devices > 1:
            gists = [all_gists(x, placement) for x in gists]
            device = jax.lax.axis_index(AXIS)
            first_pieces = [device, placement.pieces - 1 - device]
            if halo:
                raw_k, raw_v = (
                    [jnp.concatenate(pair, axis=1) for pair in zip(before, raws, strict=True)]
                    for raws in (raw_k, raw_v)
                    for before in [raws_before(tuple(x[:, -halo:] for x in raws), placement.devices)]
                )
        units = gist_k[0].shape[1]
        out = []
        for index, piece in enumerate(first_pieces):
            kv = GistKV(sink_k, sink_v, *gists, raw_k[index], raw_v[index])
            first = jnp.asarray(piece * units, jnp.int32)
            first_raw = first - (k_units if placement.devices > 1 else 0)
            queries = jnp.split(q, pieces, axis=1)[index]
            out.append(gist_attention(queries, kv, layout, first, first_raw, doc_start, backend=backend))
        return jnp.concatenate(out, axis=1)

    specs = _PLACED_HEADS, _PLACED_HEADS, _PLACED_HEADS, _SINK_HEADS, _SINK_HEADS, _ROWS
    return _on_each_device(attend, specs, _PLACED_HEADS, q, k, v, *sinks, doc_start)


def full_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T Hkv D"],
    v: Float[Array, "B T Hkv D"],
    begin: Int[Array, "B T"] | None,
    unit: int = 1,
) -> Float[Array, "B T Hq D"]:
    """Plain causal attention on each device's rows and heads.

    On NVIDIA GPUs rows of one document each go to cuDNN, which knows no documents, and packed rows to the kernels of
    gist attention (`pallas_kernels.documents`). What these do not take (documents that begin anywhere, say) takes the
    blocked path (slower, exact), if a row of the batch packs documents, which is seen while the step runs.

    Args:
      begin: each query's first visible key, the start of its document; None: every row is one document.
      unit: documents begin at multiples of it.
    """

    def attend(q, k, v, begin):
        if documents.kernel(q, k, unit):
            return documents.causal_documents(q, k, v, begin[:, ::unit] // unit)
        if not cudnn_takes(q, k):
            return causal_attention(q, k, v, begin)
        return jax.lax.cond(begin.any(), causal_attention, lambda q, k, v, _: cudnn_attention(q, k, v), q, k, v, begin)

    if begin is None:
        attend_rows = cudnn_attention if cudnn_takes(q, k) else causal_attention
        return _on_each_device(attend_rows, (_HEADS, _HEADS, _HEADS), _HEADS, q, k, v)
    return _on_each_device(attend, (_HEADS, _HEADS, _HEADS, _ROWS), _HEADS, q, k, v, begin)


def cudnn_takes(q: Float[Array, "B T Hq D"], k: Float[Array, "B T Hkv D"]) -> bool:
    """Whether cuDNN's fused attention runs on the target device and takes these arrays, forward and backward."""
    device = target_device()
    if device.platform not in ("gpu", "cuda") or not str(getattr(device, "compute_capability", "")):
        return False
    short = all(x.dtype in (jnp.bfloat16, jnp.float16) for x in (q, k))
    even = q.shape[1] % 2 == k.shape[1] % 2 == 0
    return float(device.compute_capability) >= 8 and short and even and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


def cudnn_attention(
    q: Float[Array, "B T Hq D"], k: Float[Array, "B T Hkv D"], v: Float[Array, "B T Hkv D"]
) -> Float[Array, "B T Hq D"]:
    """Causal attention by cuDNN's fused kernel, one document a row."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def sink_attention(
    q: Float[Array, "1 s Hq D"], k: Float[Array, "1 s Hkv D"], v: Float[Array, "1 s Hkv D"]
) -> Float[Array, "1 s Hq D"]:
    """Causal attention of the sinks among themselves, on each device's heads; dense, since they are few."""

    def attend(q, k, v):
        return masked_attention(q, k, v, jnp.tri(q.shape[1], dtype=bool)[None])

    return _on_each_device(attend, (_SHARED_HEADS,) * 3, _SHARED_HEADS, q, k, v)
