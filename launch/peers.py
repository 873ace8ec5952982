"""Peers of the attention kernels from outside JAX, for the benchmarks: FlexAttention of PyTorch.

Axis legend
  P   query positions (r + 1) * U, gist-shifted [ U * r raws | U gists ]
  N   keys: s sinks, then U gists, then U * r raws
"""

from __future__ import annotations

import functools
import statistics
from typing import NamedTuple

from unigist_jax.layout import GistLayout


class FlexTimes(NamedTuple):
    """Milliseconds of FlexAttention, or why there are none."""

    forward: float | None = None
    both: float | None = None
    reason: str | None = None


def gist_mask(layout: GistLayout, num_units: int):
    """FlexAttention's `mask_mod` of a segment of `num_units` units that is one document: METHOD's closed forms.

    Queries are [raws | gists], keys are [sinks | gists | raws].
    """
    import torch

    r, s, window, raws = layout.ratio, layout.num_sinks, layout.window_units, num_units * layout.ratio

    def visible(_batch, _head, query, key):
        is_gist = query >= raws
        unit = torch.where(is_gist, query - raws, query // r)
        gist, raw = key - s, key - s - num_units
        last_raw = torch.where(is_gist, unit * r + r - 1, query)
        sees_gist = (gist >= 0) & (gist < torch.where(is_gist, unit + 1, unit))
        sees_raw = (raw >= 0) & (raw // r >= unit - window) & (raw <= last_raw)
        return (key < s) | sees_gist | sees_raw

    return visible


def flex_obstacle() -> str | None:
    """Why FlexAttention cannot be timed here; None if it can."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def flex_times(layout: GistLayout, num_units: int, heads: int, kv_heads: int, dim: int, repeats: int = 10) -> FlexTimes:
    """Median milliseconds of compiled FlexAttention on one bf16 sequence: forward, and forward + backward.

    The block mask is built once, beforehand, and not timed.
    """
    reason = flex_obstacle()
    if reason:
        return FlexTimes(reason=reason)
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    raws = num_units * layout.ratio
    positions, keys = raws + num_units, layout.num_sinks + num_units + raws
    mask = create_block_mask(
        gist_mask(layout, num_units), None, None, positions, keys, device="cuda", _compile=True
    )  # without _compile the dense mask is built first: 100 GB at 128K

    def normal(length, count):
        return torch.randn(1, count, length, dim, device="cuda", dtype=torch.bfloat16)

    q, k, v = normal(positions, heads), normal(keys, kv_heads), normal(keys, kv_heads)
    cotangent = normal(positions, heads)
    torch._dynamo.reset()  # else the second length compiles for dynamic shapes
    attend = torch.compile(functools.partial(flex_attention, block_mask=mask, enable_gqa=True), dynamic=False)
    with torch.no_grad():
        forward = _milliseconds(functools.partial(attend, q, k, v), repeats)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def both():
        torch.autograd.grad(attend(*leaves), leaves, cotangent)

    return FlexTimes(forward, _milliseconds(both, repeats))


def _milliseconds(run, repeats: int) -> float:
    """Median time of a call by CUDA events, after three calls that are not timed."""
    import torch

    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in (0, 1))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)
