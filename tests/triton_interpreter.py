"""The Triton backend on a CPU: its kernels run by Triton's interpreter, called from JAX in place of jax-triton.

Triton decides at import whether to interpret, so this is a process of its own:

    python tests/triton_interpreter.py FILE.npz     # runs every small case of kernel_cases.py

Blocks are small (16 folded rows by 16 keys), so that small cases have many tiles; outputs are filled with NaN before.
"""

import importlib
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__))), os.path.dirname(os.path.abspath(__file__))]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import kernel_cases  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from pallas_kernels.triton import op  # noqa: E402
from pallas_kernels.triton.blocks import Blocks, DecodeBlocks, KernelBlocks  # noqa: E402

decode = importlib.import_module("pallas_kernels.triton.decode")  # the package's attribute of this name is a function
SMALL = KernelBlocks(*[Blocks(16, 16, 4, 1)] * 4)

_patch_tensor = interpreter._patch_lang_tensor


def patch_tensor(tensor, scope):
    """The interpreter's tensor, but with loop bounds that NumPy 2.4 takes: int() of an array [1] is an error there."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def to_torch(x):
    x = np.array(x)
    return torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16) if x.dtype == jnp.bfloat16 else torch.from_numpy(x)


def to_numpy(x, dtype):
    return x.view(torch.uint16).numpy().view(dtype) if x.dtype == torch.bfloat16 else x.numpy()


def interpret(kernel, grid, inputs, outputs, warps, stages, **constants):
    """`pallas_kernels.triton.call.launch` on the CPU."""

    def run(*arrays):
        arrays = iter(arrays)
        arguments = [x if isinstance(x, int) else to_torch(next(arrays)) for x in inputs]
        results = [to_torch(np.full(x.shape, np.nan, x.dtype)) for x in outputs]
        kernel[grid](*arguments, *results, **constants)
        return tuple(to_numpy(x, like.dtype) for x, like in zip(results, outputs, strict=True))

    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs)
    return jax.pure_callback(run, shapes, *[x for x in inputs if not isinstance(x, int)])


def attend(*arguments):
    return op.attend(*arguments, blocks=SMALL)


def decode_step(*arguments):
    return decode.decode(*arguments, blocks=DecodeBlocks(keys=16))


def main(path):
    interpreter._patch_lang_tensor = patch_tensor
    op.launch = decode.launch = interpret
    results = {}
    for name, case in kernel_cases.elsewhere():
        if isinstance(case, kernel_cases.Case):
            values = kernel_cases.values(kernel_cases.direct(attend), case, kernel_cases.inputs(case))
            results |= {f"{name}/{part}": np.asarray(x) for part, x in values.items()}
        else:
            results[f"{name}/out"] = np.asarray(
                kernel_cases.decoded(decode_step, case, kernel_cases.decode_inputs(case))
            )
    np.savez(path, **results)


if __name__ == "__main__":
    main(sys.argv[1])
