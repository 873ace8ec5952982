"""Runs the Hopper kernels on a CPU: the part of Pallas Mosaic GPU that they use, in NumPy and threads.

    python tests/hopper_emulator.py                # the whole grid of kernel_cases.py against the oracle, in minutes,
                                                   # also with the backward pass's walks cut into pieces
    python tests/hopper_emulator.py RESULTS.npz    # values of its small cases, which test_kernels.py checks

Pallas's own interpreter of Mosaic GPU lacks what they need. Here the blocks of a grid run one after another, in the
order in which a GPU starts them; the warpgroups of a block, and the warps of a `warp_map`, are threads that meet at
barriers as on the device, each with its own parity of a barrier's phases. Copies and matrix products happen at once;
memory begins as NaN.

So it checks what a kernel computes, which tiles it visits, the protocol of its barriers (a wrong number of arrivals or
a wrong parity ends in a deadlock or in wrong numbers), the order of its additions and where in its buffers it copies.
It does not check layouts in memory and registers, what is read before a copy or product has ended, or how numbers are
rounded.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import sys
import threading
from types import SimpleNamespace
from unittest import mock

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import kernel_cases
import numpy as np

from pallas_kernels.hopper.blocks import BackwardBlocks, ForwardBlocks

CUT, SINKS_CUT = BackwardBlocks(heads=2, walk=5), BackwardBlocks(walk=7, sinks_alone=True)
PATIENCE = 60.0  # seconds without an arrival that count as a deadlock
KERNELS = "forward", "backward", "decode"

here = threading.local()  # in a warpgroup's thread: its block, its number, and its parities by barrier


# --- memory, barriers, threads ----------------------------------------------------------------------------------------


class Ref:
    """A view of global memory, of shared memory, or of a warpgroup's accumulator."""

    def __init__(self, array: np.ndarray):
        self.array = array

    shape = property(lambda self: self.array.shape)
    T = property(lambda self: Ref(self.array.T))
    at = property(lambda self: At(lambda index: Ref(self.array[(*index, ...)])))

    def __getitem__(self, index):
        return self.array[index].copy()

    def __setitem__(self, index, value):
        self.array[index] = value


class At:
    """`x.at[index]`, the index as NumPy takes it."""

    def __init__(self, view):
        self.view = view

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        return self.view(tuple(i if isinstance(i, slice) else int(i) for i in index))


class Barrier:
    """One barrier in shared memory."""

    def __init__(self, num_arrivals: int):
        self.num_arrivals, self.arrived, self.phase = num_arrivals, 0, 0

    def arrive(self) -> None:
        self.arrived += 1
        if self.arrived == self.num_arrivals:
            self.arrived, self.phase = 0, self.phase + 1


class Barriers(list):
    """Barriers of one allocation."""

    at = property(lambda self: At(lambda index: self[index[0]]))


class Block:
    """What the threads of a block share; `counters` are those of all blocks."""

    def __init__(self, number: int, counters: dict):
        self.number, self.counters, self.failure = number, counters, None
        self.changed = threading.Condition()

    def wait_until(self, holds, what: str) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.failure or holds(), PATIENCE):
                self.failure = RuntimeError(
                    f"block {self.number}, warpgroup {here.wg}: nothing ends its wait for {what}"
                )
                self.changed.notify_all()
            if self.failure:
                raise self.failure

    def change(self, action) -> None:
        with self.changed:
            action()
            self.changed.notify_all()

    def run(self, threads: list) -> None:
        """Runs functions in a thread each; raises what the first of them to fail raises."""

        def guarded(function):
            try:
                function()
            except Exception as error:
                self.failure = self.failure or error
                self.change(lambda: None)

        running = [threading.Thread(target=guarded, args=(function,), daemon=True) for function in threads]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        if self.failure:
            raise self.failure


def poisoned(shape, dtype) -> np.ndarray:
    """Memory that nothing has written."""
    dtype = np.dtype(dtype)
    return np.full(shape, 2**30 if dtype.kind == "i" else np.nan, dtype)


# --- jax.experimental.pallas.mosaic_gpu -------------------------------------------------------------------------------


def kernel(body, *, out_type, scratch_types, grid, num_threads, **_):
    shapes = out_type if isinstance(out_type, tuple) else (out_type,)

    def run(*inputs):
        references = [Ref(np.array(x)) for x in inputs] + [Ref(poisoned(x.shape, x.dtype)) for x in shapes]
        counters = {}
        for number in range(grid[0]):
            block = Block(number, counters)
            scratch = [make() for make in scratch_types]

            def warpgroup(wg, block=block, scratch=scratch):
                here.block, here.wg, here.parity = block, np.int32(wg), {}
                body(*references, *scratch)

            block.run([functools.partial(warpgroup, wg) for wg in range(num_threads)])
        outputs = tuple(ref.array for ref in references[len(inputs) :])
        return outputs if isinstance(out_type, tuple) else outputs[0]

    return lambda *inputs: jax.pure_callback(run, out_type, *inputs)


def warp_map(body):
    block, wg, parity = here.block, here.wg, here.parity

    def warp(number):
        here.block, here.wg, here.parity = block, wg, dict(parity)
        body(np.int32(number))

    block.run([functools.partial(warp, number) for number in range(4)])


class Accumulator:
    """`plgpu.ACC`."""

    def __init__(self, shape, dtype):
        self.make = lambda: Ref(np.zeros(shape, dtype))

    @staticmethod
    def init(value):
        return Ref(np.array(value, np.float32))


def first(barrier):
    return barrier[0] if isinstance(barrier, Barriers) else barrier


def barrier_arrive(barrier, predicate=True):
    if predicate:
        here.block.change(first(barrier).arrive)


def barrier_wait(barrier):
    barrier = first(barrier)
    parity = here.parity.get(barrier, 0)
    here.block.wait_until(lambda: barrier.phase % 2 != parity, "a barrier")
    here.parity[barrier] = 1 - parity


def semaphore_signal(counter, memory_scope):
    here.block.change(lambda: counter.array.__iadd__(1))


def semaphore_wait(counter, value, decrement, memory_scope):
    here.block.wait_until(lambda: counter.array >= value, f"a counter to reach {value}")


def check_alignment(shared: Ref) -> None:
    """What the copy engine reads or writes in shared memory begins at a multiple of 128 bytes of its allocation."""
    owner = shared.array if shared.array.base is None else shared.array.base
    offset = shared.array.__array_interface__["data"][0] - owner.__array_interface__["data"][0]
    if offset % 128:
        raise ValueError(f"a copy at byte {offset} of its buffer {owner.shape}: the copy engine takes multiples of 128")


def copy_gmem_to_smem(source, target, barrier):
    check_alignment(target)
    target.array[...] = 0  # what lies outside
    target.array[tuple(map(slice, source.shape))] = source.array
    barrier_arrive(barrier)


def copy_smem_to_gmem(source, target, reduction_op=None):
    check_alignment(source)
    value = source.array[tuple(map(slice, target.shape))]
    target.array[...] = value if reduction_op is None else target.array + value


def wgmma(accumulator, a, b):
    a, b = (np.asarray(x.array if isinstance(x, Ref) else x, np.float32) for x in (a, b))
    accumulator.array[...] += a @ b


MOSAIC = dict(
    kernel=kernel,
    warp_map=warp_map,
    SMEM=lambda shape, dtype, transforms=(): lambda: Ref(poisoned(shape, dtype)),
    Barrier=lambda num_arrivals=1, num_barriers=1: lambda: Barriers(Barrier(num_arrivals) for _ in range(num_barriers)),
    ACC=Accumulator,
    barrier_arrive=barrier_arrive,
    barrier_wait=barrier_wait,
    semaphore_signal=semaphore_signal,
    semaphore_wait=semaphore_wait,
    copy_gmem_to_smem=copy_gmem_to_smem,
    copy_smem_to_gmem=copy_smem_to_gmem,
    wgmma=wgmma,
    wgmma_accumulator_load=lambda accumulator, wait_n: accumulator.array.copy(),
    load=lambda ref, layout, optimized=True: ref.array.copy(),
    layout_cast=lambda value, layout: value,
    broadcasted_iota=lambda dtype, shape, axis, layout: np.indices(shape, np.int32)[axis],
    set_max_registers=lambda *_, **__: None,
    commit_smem=lambda: None,
    wait_smem_to_gmem=lambda *_, **__: None,
)

# --- jax.experimental.pallas, and jax within a kernel -----------------------------------------------------------------


def run_state(body):
    def run(state):
        body(state)
        return jax.tree.map(lambda ref: ref.array, state)

    return run


def loop(begin, end):
    return lambda body: [body(np.int32(i)) for i in range(int(begin), int(end))]


def fori_loop(begin, end, body, state):
    for i in range(int(begin), int(end)):
        state = body(np.int32(i), state)
    return state


def get_global(kind):
    with here.block.changed:
        return here.block.counters.setdefault("all", Ref(np.zeros(kind.shape, np.int32)))


def broadcast_in_dim(x, shape, axes):
    return np.broadcast_to(np.expand_dims(x, [i for i in range(len(shape)) if i not in axes]), shape)


PALLAS = dict(
    when=lambda condition: lambda body: body() if condition else None,
    loop=loop,
    ds=lambda start, size: slice(int(start), int(start) + size),
    run_scoped=lambda body, *types: body(*(x.make() for x in types)),
    run_state=run_state,
    get_global=get_global,
)
LAX = dict(
    axis_index=lambda name: here.wg if name == "wg" else np.int32(here.block.number),
    rem=np.remainder,  # nothing here is negative
    div=np.floor_divide,
    cond=lambda condition, then, otherwise, *operands: (then if condition else otherwise)(*operands),
    fori_loop=fori_loop,
    broadcast_in_dim=broadcast_in_dim,
    optimization_barrier=lambda x: x,
)


class Stead:
    """A module in whose stead others are used; `inside`: in the threads of a kernel alone."""

    def __init__(self, module, replaced, inside: bool):
        self._module, self._replaced, self._inside = module, replaced, inside

    def __getattr__(self, name):
        if name in self._replaced and (hasattr(here, "block") or not self._inside):
            return self._replaced[name]
        return getattr(self._module, name)


@contextlib.contextmanager
def emulation():
    """Within it the kernels of pallas_kernels.hopper run here; yields their modules."""
    steads = {
        "plgpu": Stead(plgpu, MOSAIC, inside=False),
        "pl": Stead(pl, PALLAS, inside=True),
        "lax": Stead(jax.lax, LAX, inside=True),
        "jnp": Stead(jnp, vars(np), inside=True),
    }
    # by importlib: the package's attribute of the name "decode" is a function
    modules = {name: importlib.import_module(f"pallas_kernels.hopper.{name}") for name in ("op", *KERNELS)}
    with contextlib.ExitStack() as stack:
        for name in KERNELS:
            stack.enter_context(mock.patch.multiple(modules[name], **steads))
        yield SimpleNamespace(**modules)


def values(hopper, case, backward: BackwardBlocks | None = None) -> dict[str, np.ndarray]:
    """Output, and where it is not a decoding step every gradient, of a case; `backward` in place of the table's."""
    if isinstance(case, kernel_cases.Case):
        attend = functools.partial(hopper.op.attend, blocks=backward and (ForwardBlocks(), backward))
        return kernel_cases.values(kernel_cases.direct(attend), case, kernel_cases.inputs(case))
    return {"out": kernel_cases.decoded(hopper.decode.decode, case, kernel_cases.decode_inputs(case))}


def check_all() -> None:
    """Holds every case to the oracle, in its own dtype, and prints the largest relative error of its parts."""
    with emulation() as hopper:
        for name, case in kernel_cases.ATTENTION.items():
            oracle = kernel_cases.expected(case)
            for how, backward in (("", None), (", walks cut", CUT), (", sinks' walks cut", SINKS_CUT)):
                found = values(hopper, case, backward)
                error = max(kernel_cases.relative(found[part], oracle[part]) for part in found)
                print(f"{name}{how}: {error:.1e}", flush=True)
                kernel_cases.check(found, case)
        for name, case in kernel_cases.DECODING.items():
            kernel_cases.check_decoding(values(hopper, case)["out"], case, kernel_cases.decode_inputs(case))
            print(f"decoding, {name}: right", flush=True)


def main(path: str) -> None:
    ways = itertools.cycle((None, CUT._replace(walk=1), None, SINKS_CUT._replace(walk=1)))  # few query tiles in each
    with emulation() as hopper:
        cases = [(name, values(hopper, case, next(ways))) for name, case in kernel_cases.elsewhere()]
    np.savez(path, **{f"{name}/{part}": np.asarray(x) for name, parts in cases for part, x in parts.items()})


if __name__ == "__main__":
    main(sys.argv[1]) if len(sys.argv) > 1 else check_all()
