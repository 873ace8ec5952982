"""The pairing of a backend's forward and backward kernels into one differentiable function."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax

from pallas_kernels.backends import named_residuals


def paired(forward: Callable, backward: Callable) -> Callable:
    """Attention from its kernels, differentiable in reverse mode with respect to q and kv.

    Args:
      forward: `forward(*static, q, kv, *tables)` gives the output, and the log-sum-exp as `backward` wants it.
      backward: `backward(*static, q, kv, *tables, out, lse, d_out)` gives the gradients of q and kv.

    Returns:
      `attend(static, q, kv, *tables)`, which gives the output: `static` a hashable tuple, `tables` trees of integers.
      The output and the log-sum-exp are `named_residuals`.
    """

    @partial(jax.custom_vjp, nondiff_argnums=(0,))
    def attend(static, q, kv, *tables):
        return forward(*static, q, kv, *tables)[0]

    def attend_forward(static, q, kv, *tables):
        out, lse = named_residuals(*forward(*static, q, kv, *tables))
        return out, (q, kv, tables, out, lse)

    def attend_backward(static, residuals, d_out):
        q, kv, tables, out, lse = residuals
        d_q, d_kv = backward(*static, q, kv, *tables, out, lse, d_out)
        return d_q, d_kv, *(None for _ in tables)

    attend.defvjp(attend_forward, attend_backward)
    return attend
