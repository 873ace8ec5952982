"""Useful floating-point operations of a training step: what the method cannot do without, nothing recomputed.

Axis legend
  B  batch      T  raws of a row      U  units of a row      r  raws a unit      k  units of the window      s  sinks

A product of [m, k] and [k, n] counts 2 m k n. A backward pass costs twice the forward pass: a gradient for either
factor; once where the weights are frozen, since only the activations' is needed. The sinks' own stream (s positions a
step, whatever the batch) and everything elementwise are left out.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from unigist_jax.layout import GistLayout, unit_starts
from unigist_jax.model import LlamaConfig

# Dense bf16 peak of one device in FLOP/s by jax's device kind, from the vendors' data sheets.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def peak_flops(device: Any) -> float | None:
    """The device's dense bf16 peak in FLOP/s, None if its kind is not in the table."""
    matches = [name for name in PEAK_FLOPS if device.device_kind.startswith(name)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


def gist_pairs(layout: GistLayout, doc_start: Int[Array, "B U"]) -> Float[Array, ""]:
    """Pairs of a query and a key that it sees in gist attention of whole rows, over the batch, float32."""
    r, num_units = layout.ratio, doc_start.shape[1]
    starts = unit_starts(layout, num_units, doc_start=doc_start)
    unit = jnp.arange(num_units, dtype=jnp.int32)
    gists = r * (unit - starts.gist_start) + (unit + 1 - starts.gist_start)
    window = unit - starts.raw_start
    raws = r * r * window + r * (r + 1) // 2 + r * (window + 1)
    return jnp.sum((gists + raws + (r + 1) * layout.num_sinks).astype(jnp.float32))


def causal_pairs(ratio: int, doc_start: Int[Array, "B U"]) -> Float[Array, ""]:
    """The same for full causal attention of the raws."""
    before = (jnp.arange(doc_start.shape[1], dtype=jnp.int32) - doc_start).astype(jnp.float32)
    return jnp.sum(ratio * ratio * before + ratio * (ratio + 1) / 2)


def summary_windows(layout: GistLayout, num_raws: int) -> list[int]:
    """Positions that AutoCompressors read for each chunk of a row; all its summaries, whatever the documents."""
    starts = range(0, num_raws, layout.chunk)
    own = [min(layout.chunk, num_raws - start) + layout.num_sinks for start in starts]
    own[-1] -= layout.num_sinks  # the last chunk is not summarised
    return [index * layout.num_sinks + size for index, size in enumerate(own)]


def forward_flops(config: LlamaConfig, positions: int, raws: int, pairs: Any) -> Any:
    """One forward pass over `positions` positions of which `raws` reach the head, with so many pairs in a layer."""
    heads = config.num_heads + config.num_kv_heads
    projections = 2 * config.hidden_size * heads * config.head_dim
    mlp = 3 * config.hidden_size * config.intermediate_size
    layer = 2.0 * (projections + mlp) * positions + 4 * config.num_heads * config.head_dim * pairs
    return config.num_layers * layer + 2.0 * config.hidden_size * config.vocab_size * raws


def step_flops(
    config: LlamaConfig,
    layout: GistLayout,
    doc_start: Int[Array, "B U"],
    *,
    frozen: bool = False,
    teacher: bool = False,
) -> Float[Array, ""]:
    """A whole training step on rows of packed documents.

    Args:
      doc_start: first unit of each unit's document, in units of `layout`.
      frozen: only embeddings learn (`train.trainable="gist"`).
      teacher: a full-attention model of the same shape reads the rows too.
    """
    batch, units = doc_start.shape
    raws = batch * units * layout.ratio
    full = forward_flops(config, raws, raws, causal_pairs(layout.ratio, doc_start))
    if config.attention == "full":
        forward = full
    elif config.attention == "autocompressors":
        windows = summary_windows(layout, units * layout.ratio)
        pairs = sum(window * (window + 1) / 2 for window in windows)
        forward = forward_flops(config, batch * sum(windows), raws, batch * pairs)
    else:
        forward = forward_flops(config, raws + batch * units, raws, gist_pairs(layout, doc_start))
    return forward * (2 if frozen else 3) + (full if teacher else 0.0)
