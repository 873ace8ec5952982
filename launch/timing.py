"""Timing on an accelerator, for the benchmarks: samples long enough that launching costs nothing."""

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
PARTS = ("forward", "both")  # both: forward + backward
MATMUL = 8192  # rows and columns of the matrices whose product is the measured matrix rate


class Program(NamedTuple):
    """What is timed: a call that enqueues work on the device, and a wait for the result of the last one."""

    call: Callable[[], object]
    wait: Callable[[object], object] = jax.block_until_ready

    def seconds(self, calls: int) -> float:
        """A sample: seconds of one call, of so many enqueued one after another."""
        begin = time.perf_counter()
        for _ in range(calls):
            result = self.call()
        self.wait(result)
        return (time.perf_counter() - begin) / calls

    def warmed(self) -> int:
        """Warms up. Returns the calls of a sample of `WINDOW_SECONDS`: 1 where a call takes longer."""
        self.seconds(1)
        calls, one = 1, self.seconds(1)
        while calls * one < WINDOW_SECONDS:  # the first calls are slower than the others
            calls = math.ceil(1.2 * WINDOW_SECONDS / one)
            one = self.seconds(calls)
        return calls


def milliseconds(fn: Callable, *args, repeats: int = 10) -> float:
    """Median time of one call in ms, after warm-up.

    Each of the `repeats` samples enqueues calls for at least `WINDOW_SECONDS` and waits for the last: the device works
    without a pause, and at the clock that it can hold. A call that takes longer than that is a sample by itself.
    """
    program = Program(functools.partial(fn, *args))
    calls = program.warmed()
    return statistics.median(program.seconds(calls) for _ in range(repeats)) * 1e3


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

    def programs(self) -> dict[str, Program]:
        """Both, on inputs that are drawn now."""
        *given, cotangent = self.inputs()
        calls = functools.partial(self.forward, *given), functools.partial(self.both, *given, cotangent)
        return dict(zip(PARTS, map(Program, calls), strict=True))


def contender(attend: Callable, *types) -> Contender:
    """Compiles an attention for arguments of the given types (trees); nothing runs."""
    types = *types, jax.eval_shape(attend, *types)
    forward, both = with_backward(attend)
    return Contender(normals(types), forward.lower(*types[:-1]).compile(), both.lower(*types).compile())


def matmul() -> Program:
    """A large bf16 matrix product, the yardstick of the matrix rate."""
    a, b = normals((bf16(MATMUL, MATMUL),) * 2)()
    return Program(functools.partial(jax.jit(jnp.matmul), a, b))


def matmul_tflop_s(ms: float) -> float:
    """TFLOP/s of a product of `matmul` that took `ms`."""
    return 2 * MATMUL**3 / ms / 1e9


def copy(num_bytes: int = 2**32) -> Program:
    """A copy of `num_bytes` on the device, the yardstick of the memory's rate."""
    return Program(functools.partial(jax.jit(jnp.copy), jax.random.normal(jax.random.key(0), (num_bytes // 4,))))


def copy_tb_s(ms: float, num_bytes: int = 2**32) -> float:
    """TB/s, bytes read and written, of a copy of `copy` that took `ms`."""
    return 2 * num_bytes / ms / 1e9
