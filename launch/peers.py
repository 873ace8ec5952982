"""Peers of the attention kernels, for the benchmarks: jax's cuDNN attention, plain and folded, and FlexAttention.

Axis legend
  P   query positions (r + 1) * U, gist-shifted [ U * r raws | U gists ]
  N   keys: s sinks, then U gists, then U * r raws
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax

from launch.timing import PARTS, Contender, Program, bf16, contender
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


def flex(layout: GistLayout, num_units: int, heads: Heads) -> dict[str, Program]:
    """Compiled FlexAttention on one bf16 sequence: forward, and forward + backward; each compiles in its first call.

    The block mask is built here, and not timed.

    Raises:
      RuntimeError: where it cannot run, saying why.
    """
    reason = flex_obstacle()
    if reason:
        raise RuntimeError(reason)
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.config.recompile_limit = 64  # a program a ratio, length and pass; beyond the limit none is compiled
    raws = num_units * layout.ratio
    positions, keys = raws + num_units, layout.num_sinks + num_units + raws
    mask = create_block_mask(
        gist_mask(layout, num_units), None, None, positions, keys, device="cuda", _compile=True
    )  # without _compile the dense mask is built first: 100 GB at 128K

    def draw(length, count):
        return torch.randn(1, count, length, heads.dim, device="cuda", dtype=torch.bfloat16)

    q, k, v = draw(positions, heads.query), draw(keys, heads.kv), draw(keys, heads.kv)
    leaves, cotangent = [x.detach().requires_grad_() for x in (q, k, v)], draw(positions, heads.query)
    attend = torch.compile(functools.partial(flex_attention, block_mask=mask, enable_gqa=True), dynamic=False)

    def forward():
        with torch.no_grad():
            return attend(q, k, v)

    def both():
        return torch.autograd.grad(attend(*leaves), leaves, cotangent)

    return {
        name: Program(run, lambda _: torch.cuda.synchronize()) for name, run in zip(PARTS, (forward, both), strict=True)
    }


def free_flex() -> None:
    """Gives PyTorch's unused memory back to the device, for jax."""
    if flex_obstacle() is None:
        import torch

        torch.cuda.empty_cache()
