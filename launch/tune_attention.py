"""Times candidate block sizes of the GPU kernels, for the tables in pallas_kernels/{hopper,triton}/blocks.py.

    python -m launch.tune_attention --backend=hopper --lengths=16384,32768,131072
    python -m launch.tune_attention --backend=triton --lengths=32768 --ratios=4 --kernels=key_gradient

Each row is printed as it comes, all of them sorted at the end; `--out=DIR` keeps them as DIR/tune_BACKEND.json. Heads,
sinks and window are those of launch.bench_attention's flags.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from absl import flags

from launch import bench_attention as bench
from launch.by_turns import first_line
from launch.flags import run_main, whole_numbers
from launch.timing import milliseconds, normals, with_backward
from pallas_kernels.backends import check_runs_here
from pallas_kernels.gist_attention import GistKV
from unigist_jax.layout import GistLayout, unit_starts

BACKEND = flags.DEFINE_enum("backend", "hopper", ["hopper", "triton"], "whose blocks")
KERNELS = flags.DEFINE_list("kernels", None, "which of the backend's kernels (default: all)")
flags.adopt_module_key_flags(bench)

# (rows, keys, warps, stages); the others of their kind spill hundreds of bytes of registers at head dim 128
TRITON = {
    "forward": (
        *((128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 4), (128, 128, 8, 2), (128, 128, 8, 3), (128, 32, 8, 4)),
        *((64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2)),
    ),
    "query_gradient": (
        *((128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3)),
    ),
    "key_gradient": (
        *((64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 3), (128, 64, 8, 2)),
        *((64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 3)),
    ),
    "raw_gradient": ((64, 64, 4, 2), (64, 128, 8, 2), (32, 64, 4, 3), (32, 128, 8, 3)),
}
# fields of ForwardBlocks and BackwardBlocks
HOPPER = {
    "forward": tuple({"items": items} for items in (1, 2, 4, 8)),
    "backward": tuple({"heads": heads, "walk": walk} for heads in (1, 2, 4, 8) for walk in (0, 256, 640, 1280)),
}


def kernels(candidates: dict) -> list[str]:
    """The kernels to tune. Raises ValueError for one that the backend lacks."""
    chosen = KERNELS.value or list(candidates)
    if unknown := set(chosen) - set(candidates):
        raise ValueError(f"--kernels={','.join(sorted(unknown))}: {BACKEND.value} has {', '.join(candidates)}")
    return chosen


def timed(row: dict, run, arguments) -> dict:
    """The row with its time, or with what the GPU said: the other candidates are still worth knowing."""
    try:
        return row | {"ms": milliseconds(jax.jit(run), *arguments, repeats=bench.REPEATS.value)}
    except Exception as error:
        return row | {"error": first_line(error)}


def inputs(layout: GistLayout, num_units: int) -> tuple[jax.Array, GistKV, jax.Array]:
    """Queries, keys and values of a segment of one sequence, and a cotangent."""
    q, kv = bench.types(layout, num_units, bench.heads())
    return normals((q, kv, q))()


def tune_hopper(length: int, ratio: int) -> Iterator[dict]:
    """Forward alone, and forward with backward, for each candidate."""
    from pallas_kernels import hopper
    from pallas_kernels.hopper.blocks import BackwardBlocks, ForwardBlocks

    layout, units = bench.layout_of(ratio), length // ratio
    q, kv, cotangent = inputs(layout, units)
    starts = unit_starts(layout, units, jnp.int32(0))
    for name in kernels(HOPPER):
        for fields in HOPPER[name]:
            forward = name == "forward"
            blocks = (
                (ForwardBlocks(**fields), BackwardBlocks()) if forward else (ForwardBlocks(), BackwardBlocks(**fields))
            )
            attend = functools.partial(hopper.attend, blocks=blocks)
            runs = with_backward(lambda q, kv, attend=attend: attend(q, kv, layout, 0, 0, starts))
            row = {"length": length, "ratio": ratio, "kernel": name} | fields
            yield timed(row, runs[0] if forward else runs[1], (q, kv) if forward else (q, kv, cotangent))


def tune_triton(length: int, ratio: int) -> Iterator[dict]:
    """Each kernel alone, for each candidate."""
    from pallas_kernels.triton import op
    from pallas_kernels.triton.blocks import Blocks, kernel_blocks
    from pallas_kernels.triton.call import capability

    layout, units = bench.layout_of(ratio), length // ratio
    q, kv, d_out = inputs(layout, units)
    starts = jax.tree.map(jnp.atleast_2d, unit_starts(layout, units, jnp.int32(0)))
    table, place = kernel_blocks(capability(), bench.DIM.value), jnp.zeros(2, jnp.int32)
    out, lse = jax.jit(functools.partial(op.forward, layout, table.forward))(q, kv, starts, place)
    queries = functools.partial(op.query_gradient, layout)
    _, delta = jax.jit(functools.partial(queries, table.query_gradient))(q, kv, starts, place, out, lse, d_out)
    rest = (q, d_out, lse, delta), place
    runs = {
        "forward": (functools.partial(op.forward, layout), (q, kv, starts, place)),
        "query_gradient": (queries, (q, kv, starts, place, out, lse, d_out)),
        "key_gradient": (
            lambda blocks, *x: op.key_gradients(layout, op.GISTS, blocks, *x),
            (*rest, kv.gist_k, kv.gist_v, starts.gist_start),
        ),
        "raw_gradient": (
            lambda blocks, *x: op.key_gradients(layout, op.RAWS, blocks, *x),
            (*rest, kv.raw_k, kv.raw_v, starts.raw_start),
        ),
    }
    for name in kernels(TRITON):
        run, arguments = runs[name]
        for sizes in TRITON[name]:
            blocks = Blocks(*sizes)
            row = {"length": length, "ratio": ratio, "kernel": name} | blocks._asdict()
            yield timed(row, functools.partial(run, blocks), arguments)


def main(_: list[str]) -> None:
    check_runs_here(BACKEND.value)
    tune = {"hopper": tune_hopper, "triton": tune_triton}[BACKEND.value]
    rows = []
    for length in whole_numbers(bench.LENGTHS):
        for ratio in whole_numbers(bench.RATIOS):
            for row in tune(length, ratio):
                print(row, flush=True)
                rows.append(row)
    if bench.OUT.value:
        (bench.out_folder() / f"tune_{BACKEND.value}.json").write_text(json.dumps(rows, indent=1))
    print()
    best = sorted((r for r in rows if "ms" in r), key=lambda r: (r["length"], r["ratio"], r["kernel"], r["ms"]))
    for row in best:
        fields = ", ".join(f"{k}={v}" for k, v in row.items() if k not in ("length", "ratio", "kernel", "ms"))
        print(f"{row['length']} r={row['ratio']} {row['kernel']}: {row['ms']:.3f} ms  {fields}")


if __name__ == "__main__":
    run_main(main)
