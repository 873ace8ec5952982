"""The call of a Triton kernel from JAX, and the compute capability that it is compiled for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import ModuleType

import jax

from pallas_kernels.backends import target_device


def capability() -> int:
    """Compute capability of the target device times ten: 90 for 9.0."""
    major, minor = str(target_device().compute_capability).split(".")
    return int(major) * 10 + int(minor)


def _jax_triton() -> ModuleType:
    """The package, imported when the first kernel is called: it does not import where jaxlib has no GPU.

    Its import empties TRITON_CACHE_DIR, without which no other user of Triton (torch.compile) works in this process.
    """
    before = os.environ.get("TRITON_CACHE_DIR")
    import jax_triton

    os.environ.pop("TRITON_CACHE_DIR", None)
    if before is not None:
        os.environ["TRITON_CACHE_DIR"] = before
    return jax_triton


def launch(
    kernel,
    grid: tuple[int, ...],
    inputs: Sequence[jax.Array | int],
    outputs: Sequence[jax.ShapeDtypeStruct | jax.Array],
    warps: int,
    stages: int,
    **constants,
) -> tuple[jax.Array, ...]:
    """Runs `kernel(*inputs, *outputs, **constants)` on a grid, and returns the outputs.

    Args:
      inputs: arrays, then ints, in the order of the kernel's arguments.
      outputs: the shapes and dtypes of arrays that the kernel writes, or arrays alike; what it leaves unwritten is
        undefined.
    """
    return tuple(
        _jax_triton().triton_call(
            *inputs,
            kernel=kernel,
            out_shape=tuple(outputs),
            grid=grid,
            num_warps=warps,
            num_stages=stages,
            compute_capability=capability(),
            **constants,
        )
    )
