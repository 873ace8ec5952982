"""Timing on an accelerator, for the benchmarks: medians over windows long enough that launching costs nothing."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

WINDOW_SECONDS = 0.05


def milliseconds(fn: Callable, *args, repeats: int = 10) -> float:
    """Median time of one call in ms, after warm-up.

    Each of the `repeats` samples enqueues calls for at least `WINDOW_SECONDS` and waits for the last: the device works
    without a pause, and at the clock that it can hold. A call that takes longer than that is a sample by itself.
    """

    def sample(calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            result = fn(*args)
        jax.block_until_ready(result)
        return (time.perf_counter() - begin) / calls

    jax.block_until_ready(fn(*args))
    calls, one = 1, sample(1)
    while calls * one < WINDOW_SECONDS:  # the first calls are slower than the others
        calls = math.ceil(1.2 * WINDOW_SECONDS / one)
        one = sample(calls)
    return statistics.median([one, *(sample(calls) for _ in range(repeats - 1))]) * 1e3


def warm_up(seconds: float = 1.0) -> None:
    """Keeps the device busy with matrix products until its clocks are up."""
    x, product = jnp.ones((4096, 4096), jnp.bfloat16), jax.jit(jnp.matmul)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        jax.block_until_ready([product(x, x) for _ in range(50)])


def with_backward(attend: Callable) -> tuple[Callable, Callable]:
    """A jitted forward, and a jitted forward with all gradients for an output cotangent given last."""
    return jax.jit(attend), jax.jit(lambda *args: jax.vjp(attend, *args[:-1])[1](args[-1]))


def bf16(*shape: int) -> jax.ShapeDtypeStruct:
    """The type of a bf16 array."""
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def normals(types) -> Callable[[], tuple]:
    """One compiled program that draws standard normal arrays of the given types, a tree."""
    leaves, tree = jax.tree.flatten(types)

    def draw(key):
        keys = jax.random.split(key, len(leaves))
        return tree.unflatten([jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)])

    key = jax.random.key(0)  # an argument: XLA would fold constants
    return functools.partial(jax.jit(draw).lower(key).compile(), key)


class Contender(NamedTuple):
    """Compiled programs of an attention: its inputs with a cotangent of its output, forward, forward + backward."""

    inputs: Callable[[], tuple]
    forward: Callable
    both: Callable

    def times(self, repeats: int) -> dict[str, float]:
        """Milliseconds of both programs."""
        *given, cotangent = self.inputs()
        return {
            "forward": milliseconds(self.forward, *given, repeats=repeats),
            "both": milliseconds(self.both, *given, cotangent, repeats=repeats),
        }


def contender(attend: Callable, *types) -> Contender:
    """Compiles an attention for arguments of the given types (trees); nothing runs."""
    types = *types, jax.eval_shape(attend, *types)
    forward, both = with_backward(attend)
    return Contender(normals(types), forward.lower(*types[:-1]).compile(), both.lower(*types).compile())


def ceilings(repeats: int = 10) -> dict[str, float]:
    """Measured copy bandwidth (TB/s, bytes read and written) and bf16 matrix rate (TFLOP/s) of the device."""
    x = jax.random.normal(jax.random.key(0), (2**30,), jnp.float32)
    bandwidth = 2 * x.nbytes / milliseconds(jax.jit(jnp.copy), x, repeats=repeats) / 1e9
    del x
    a, b = normals((bf16(8192, 8192),) * 2)()
    rate = 2 * 8192**3 / milliseconds(jax.jit(jnp.matmul), a, b, repeats=repeats) / 1e9
    return {"copy_tb_s": bandwidth, "matmul_tflop_s": rate}
