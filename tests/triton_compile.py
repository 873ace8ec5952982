"""Compiles the Triton kernels for a GPU that need not be here, and prints what the compiler says of each as JSON.

    python tests/triton_compile.py CAPABILITY DIM     # for 86 and 128: compute capability 8.6, head dim 128

A process of its own, because Triton reads its kernels' source, which the suite's import hook rewrites.
"""

import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pallas_kernels.triton import backward_kernel, blocks, decode_kernel, forward_kernel

FLOATS = "lse", "delta"
INTEGERS = "gist_start", "raw_start", "place", "starts", "reach", "raw_index"
SIZES = (
    *("units", "num_sinks", "num_gists", "num_raws", "num_keys", "kv_heads", "splits", "slots", "window_units"),
    *("gist_start_stride", "raw_start_stride", "key_stride", "starts_stride", "reach_stride"),
)


def compile_kernel(name: str, capability: int, dim: int):
    """The kernel compiled for r = 4 and 4 query heads a KV head, in bf16, with the blocks of the table."""
    kernels = {
        "forward": (forward_kernel.forward_kernel, {}),
        "query_gradient": (backward_kernel.query_gradient_kernel, {"ROOT": dim**-0.5}),
        "key_gradient": (backward_kernel.key_gradient_kernel, {"ROOT": dim**-0.5, "SOURCE": 1}),
        "raw_gradient": (backward_kernel.key_gradient_kernel, {"ROOT": dim**-0.5, "SOURCE": 2}),
        "decode": (decode_kernel.decode_kernel, {}),
    }
    kernel, constants = kernels[name]
    sizes = getattr(blocks.kernel_blocks(capability, dim), name, None)
    sizes = sizes or blocks.Blocks(16, blocks.DECODE.keys, blocks.DECODE.warps, blocks.DECODE.stages)
    constants |= {"RATIO": 4, "GROUP": 4, "DIM": dim, "SCALE": dim**-0.5, "ROWS": sizes.rows, "KEYS": sizes.keys}
    signature, aligned = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in SIZES:
            signature[argument] = "i32"
        else:
            kind = "fp32" if argument in FLOATS or (name, argument) == ("decode", "out") else "bf16"
            signature[argument] = "*" + ("i32" if argument in INTEGERS else kind)
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": sizes.warps, "num_stages": sizes.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


if __name__ == "__main__":
    capability, dim = (int(x) for x in sys.argv[1:])
    for name in ("forward", "query_gradient", "key_gradient", "raw_gradient", "decode"):
        compiled = compile_kernel(name, capability, dim)
        wgmma = "wgmma.mma_async" in compiled.asm["ptx"]
        print(json.dumps({"kernel": name, "shared_bytes": compiled.metadata.shared, "wgmma": wgmma}), flush=True)
