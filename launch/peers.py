"""Peers of the attention kernels, for the benchmarks: jax's cuDNN attention, plain and folded, and FlexAttention.

Axis legend
  P   query positions (r + 1) * U, gist-shifted [ U * r raws | U gists ]
  N   keys: s sinks, then U gists, then U * r raws
"""

from __future__ import annotations

import functools
import statistics
from typing import NamedTuple

import jax

from launch.timing import WINDOW_SECONDS, Contender, bf16, contender
from unigist_jax.layout import GistLayout


class Heads(NamedTuple):
    """Heads of a benchmark's attention."""

    query: int
    kv: int
    dim: int


def cudnn(length: int, heads: Heads) -> Contender:
    """jax's cuDNN causal attention on one bf16 sequence of `length` raws, compiled."""
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    keys = bf16(1, length, heads.kv, heads.dim)
    return contender(attend, bf16(1, length, heads.query, heads.dim), keys, keys)


def folded(layout: GistLayout, num_units: int, heads: Heads) -> Contender:
    """The same op on sinks and gists alone: most of gist attention's work, without the local window.

    The r raws of a unit, its gist and the query heads of a KV head are its heads; s - 1 rows in front and one behind
    make the unit-level mask causal.
    """
    return cudnn(layout.num_sinks + num_units, heads._replace(query=(layout.ratio + 1) * heads.query))


def gist_mask(layout: GistLayout, num_units: int):
    """FlexAttention's `mask_mod` of a segment of `num_units` units that is one document: Eq. 3.

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


def flex_times(layout: GistLayout, num_units: int, heads: Heads, repeats: int = 10) -> dict[str, float]:
    """Median milliseconds of compiled FlexAttention on one bf16 sequence: forward, and forward + backward.

    The block mask is built once, beforehand, and not timed.

    Raises:
      RuntimeError: where it cannot run, saying why.
    """
    reason = flex_obstacle()
    if reason:
        raise RuntimeError(reason)
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    raws = num_units * layout.ratio
    positions, keys = raws + num_units, layout.num_sinks + num_units + raws
    mask = create_block_mask(
        gist_mask(layout, num_units), None, None, positions, keys, device="cuda", _compile=True
    )  # without _compile the dense mask is built first: 100 GB at 128K

    def random(length, count):
        return torch.randn(1, count, length, heads.dim, device="cuda", dtype=torch.bfloat16)

    q, k, v = random(positions, heads.query), random(keys, heads.kv), random(keys, heads.kv)
    cotangent = random(positions, heads.query)
    torch._dynamo.reset()  # else the second length compiles for dynamic shapes
    attend = torch.compile(functools.partial(flex_attention, block_mask=mask, enable_gqa=True), dynamic=False)
    with torch.no_grad():
        forward = _torch_milliseconds(functools.partial(attend, q, k, v), repeats)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def both():
        torch.autograd.grad(attend(*leaves), leaves, cotangent)

    return {"forward": forward, "both": _torch_milliseconds(both, repeats)}


def _torch_milliseconds(run, repeats: int) -> float:
    """`launch.timing.milliseconds` by CUDA events."""
    import torch

    def sample(calls: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in (0, 1))
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / calls

    run()
    sample(1)
    calls = max(1, round(WINDOW_SECONDS * 1e3 / sample(1)))
    if calls > 1:
        sample(calls)
    return statistics.median(sample(calls) for _ in range(repeats))
