"""The backends of gist attention: where each can run, what it takes, and which one is chosen where none is named.

A backend is a module with four functions, imported when it is first asked for:

    refusal(q, kv, layout) -> str | None           why it does not compute attention on these arguments, None if it does
    decode_refusal(q, kv, layout) -> str | None    the same for a decoding step
    attend(q, kv, layout, first_unit, first_raw_unit, starts)       see `pallas_kernels.gist_attention`
    decode(q, kv, layout, raw_index)                                see `pallas_kernels.decode_attention`

  |             | runs on                                      | chosen by None                       |
  |-------------|----------------------------------------------|--------------------------------------|
  | "hopper"    | GPUs of compute capability 9.x, jax >= 0.11  | first, where it takes the arguments  |
  | "triton"    | NVIDIA GPUs from compute capability 8.0 on,  | next, where it takes the arguments   |
  |             | with the packages triton and jax-triton      |                                      |
  | "tpu"       | TPUs                                         | first, where it takes the arguments  |
  | "blocked"   | any device                                   | else                                 |
  | "reference" | any device; dense, for tests                 | never                                |
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

RESIDUALS = "attention_residuals"  # the name under which `jax.checkpoint` policies find them

_TARGET: contextvars.ContextVar[Any] = contextvars.ContextVar("target_device", default=None)


class Backend(NamedTuple):
    """Where the backend's functions are, and why they cannot run on a device (None if they can)."""

    module: str
    obstacle: Callable[[Any], str | None]


def _runs_anywhere(_) -> None:
    return None


def _not_hopper(device) -> str | None:
    if jax.__version_info__ < (0, 11):
        return f"needs jax 0.11 or later, this is {jax.__version__}"
    if device.platform not in ("gpu", "cuda") or not str(getattr(device, "compute_capability", "")).startswith("9."):
        return f"needs a GPU of compute capability 9.x, this is {device.device_kind}"
    return None


def _not_triton(device) -> str | None:
    capability = str(getattr(device, "compute_capability", ""))
    if device.platform not in ("gpu", "cuda") or not capability.split(".")[0].isdecimal() or float(capability) < 8:
        return f"needs an NVIDIA GPU of compute capability 8.0 or later, this is {device.device_kind}"
    missing = [name for name in ("triton", "jax_triton") if importlib.util.find_spec(name) is None]
    if missing:
        return f"needs the packages triton and jax-triton (requirements-gpu.txt), {' and '.join(missing)} not found"
    return None


def _not_tpu(device) -> str | None:
    return None if device.platform == "tpu" else f"needs a TPU, this is {device.device_kind}"


# in the order in which None tries them
BACKENDS = {
    "hopper": Backend("pallas_kernels.hopper", _not_hopper),
    "triton": Backend("pallas_kernels.triton", _not_triton),
    "tpu": Backend("pallas_kernels.tpu", _not_tpu),
    "blocked": Backend("pallas_kernels.blocked", _runs_anywhere),
    "reference": Backend("pallas_kernels.reference", _runs_anywhere),
}


def refusal_of(q, kv, layout, dtypes: tuple, head_dims: tuple, ratios: tuple | None = None) -> str | None:
    """Why kernels that take these dtypes (all arrays of one), head dims and ratios (None: any) refuse; None if not."""
    found = {jnp.dtype(x.dtype) for x in (q, *kv)}
    if len(found) > 1 or not found <= {jnp.dtype(x) for x in dtypes}:
        allowed = " or all in ".join(jnp.dtype(x).name for x in dtypes)
        return f"takes q and kv all in {allowed}, got {', '.join(sorted(x.name for x in found))}"
    if q.shape[-1] not in head_dims:
        return f"takes head dims {head_dims}, got {q.shape[-1]}"
    if ratios is not None and layout.ratio not in ratios:
        return f"takes ratios {ratios}, got {layout.ratio}"
    return None


def named_residuals(out, lse):
    """A forward pass's output and log-sum-exp, named, so that a rematerialised layer may keep them (`RESIDUALS`)."""
    return checkpoint_name(out, RESIDUALS), checkpoint_name(lse, RESIDUALS)


@contextlib.contextmanager
def compiling_for(device) -> Iterator[None]:
    """Within it, backends are chosen for `device`, a device of an ahead-of-time topology, instead of this machine's."""
    token = _TARGET.set(device)
    try:
        yield
    finally:
        _TARGET.reset(token)


def usable_backends() -> list[str]:
    """Names of the backends that run on this machine's first device (or that of `compiling_for`), best first."""
    device = target_device()
    return [name for name, backend in BACKENDS.items() if backend.obstacle(device) is None]


def check_name(name: str | None) -> None:
    """Raises ValueError for a name that is neither a backend nor None, naming those that exist."""
    if name is not None and name not in BACKENDS:
        raise ValueError(f"unknown attention backend {name!r}; choose one of {sorted(BACKENDS)} or None")


def check_runs_here(name: str | None) -> None:
    """Raises ValueError for a backend that cannot run on the target device, with the reason and those that can."""
    check_name(name)
    reason = None if name is None else BACKENDS[name].obstacle(target_device())
    if reason is not None:
        raise ValueError(f'backend="{name}" {reason}; here {", ".join(usable_backends())} or None can be used')


def choose(name: str | None, q, kv, layout, decode: bool = False) -> tuple[str, ModuleType]:
    """The backend that computes these arguments here: its name and its module.

    Args:
      name: a backend, or None for the first that can.
      decode: for a decoding step.

    Raises:
      ValueError: for an unknown backend, or one that cannot run on this device or does not take the arguments; the
        message says why and which ones can.
    """
    check_name(name)
    if name is None:
        return next(_able(q, kv, layout, decode))
    reason = BACKENDS[name].obstacle(target_device())
    if reason is None:
        reason = _refusal(name, q, kv, layout, decode)
    if reason is None:
        return name, importlib.import_module(BACKENDS[name].module)
    able = ", ".join(f'"{able}"' for able, _ in _able(q, kv, layout, decode))
    raise ValueError(f'backend="{name}" {reason}; here {able} or None can be used')


def target_device():
    """The device that backends are chosen for: that of `compiling_for`, or this machine's first."""
    return _TARGET.get() or jax.devices()[0]


def _refusal(name: str, q, kv, layout, decode: bool) -> str | None:
    if decode and layout.chunk and name not in ("blocked", "reference"):
        return f"decodes with sliding windows only, not with chunks of {layout.chunk}"
    module = importlib.import_module(BACKENDS[name].module)
    return (module.decode_refusal if decode else module.refusal)(q, kv, layout)


def _able(q, kv, layout, decode: bool) -> Iterator[tuple[str, ModuleType]]:
    for name in usable_backends():
        if _refusal(name, q, kv, layout, decode) is None:
            yield name, importlib.import_module(BACKENDS[name].module)
