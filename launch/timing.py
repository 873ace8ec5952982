"""Timing on an accelerator, for the benchmarks: medians over windows long enough that launching costs nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

WINDOW_SECONDS = 0.05


def milliseconds(fn: Callable, *args, repeats: int = 10) -> float:
    """Median time of one call in ms, after warm-up.

    Each of the `repeats` samples enqueues calls for at least `WINDOW_SECONDS` and waits for the last: the device works
    without a pause, and at the clock that it can hold. A call that takes longer than that is a sample by itself.
    """
    jax.block_until_ready(fn(*args))
    begin = time.perf_counter()
    jax.block_until_ready(fn(*args))
    calls = max(1, round(WINDOW_SECONDS / (time.perf_counter() - begin)))

    def sample() -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            result = fn(*args)
        jax.block_until_ready(result)
        return (time.perf_counter() - begin) / calls

    if calls > 1:
        sample()
    return statistics.median(sample() for _ in range(repeats)) * 1e3


def with_backward(attend: Callable) -> tuple[Callable, Callable]:
    """A jitted forward, and a jitted forward with all gradients for an output cotangent given last."""
    return jax.jit(attend), jax.jit(lambda *args: jax.vjp(attend, *args[:-1])[1](args[-1]))


def normal(seed: int, *shape: int) -> jax.Array:
    """Standard normal bf16 data."""
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def ceilings(repeats: int = 10) -> dict[str, float]:
    """Measured copy bandwidth (TB/s, bytes read and written) and bf16 matrix rate (TFLOP/s) of the device."""
    x = jax.random.normal(jax.random.key(0), (2**30,), jnp.float32)
    bandwidth = 2 * x.nbytes / milliseconds(jax.jit(jnp.copy), x, repeats=repeats) / 1e9
    del x
    a, b = normal(0, 8192, 8192), normal(1, 8192, 8192)
    rate = 2 * 8192**3 / milliseconds(jax.jit(jnp.matmul), a, b, repeats=repeats) / 1e9
    return {"copy_tb_s": bandwidth, "matmul_tflop_s": rate}
