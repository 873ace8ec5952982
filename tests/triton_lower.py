"""Lowers the Triton backend for an A100 through jax-triton, and prints how many kernels are launched, as JSON.

    python tests/triton_lower.py     # exits with 77 where jax_triton does not import

A process of its own, because Triton reads its kernels' source, which the suite's import hook rewrites.
"""

import json
import os
import sys
from types import SimpleNamespace

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__))), os.path.dirname(os.path.abspath(__file__))]

import jax  # noqa: E402
import kernel_cases  # noqa: E402
from triton.runtime.cache import get_cache_manager  # noqa: E402

from pallas_kernels import triton as backend  # noqa: E402
from pallas_kernels.backends import compiling_for  # noqa: E402
from pallas_kernels.triton import call  # noqa: E402

CASE, STEP = kernel_cases.Case(40), kernel_cases.Decoding((159,), 40)


def gradients(q, kv, cotangent):
    attend = kernel_cases.direct(backend.attend)
    return jax.vjp(lambda q, kv: attend(q, kv, CASE.layout, 0, 0, None, None), q, kv)[1](cotangent)


def decode(q, kv, raw_index):
    return backend.decode(q, kv, STEP.layout, raw_index)


def launches(function, arguments) -> int:
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    return text.count("triton_kernel_call")


try:
    call._jax_triton()
except ImportError:
    sys.exit(77)
with compiling_for(SimpleNamespace(platform="cuda", device_kind="A100", compute_capability="8.0")):
    counts = {
        "forward and backward": launches(gradients, kernel_cases.inputs(CASE)[:3]),
        "decode": launches(decode, kernel_cases.decode_inputs(STEP)),
    }
get_cache_manager("00ff")  # as torch.compile does in the same process: jax-triton's import alone makes it fail
print(json.dumps(counts))
