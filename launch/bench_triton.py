"""Benchmark of the Triton kernels on a GPU against FlexAttention of PyTorch and the Hopper kernels, on random data.

    export XLA_PYTHON_CLIENT_PREALLOCATE=false     # PyTorch needs memory too
    python -m launch.bench_triton --lengths=32768,131072 --ratios=4,8 --out=bench_triton.json
    python -m launch.bench_triton --tune --lengths=32768 --ratios=4    # rows for pallas_kernels/triton/blocks.py

All peers get the same number of heads, sinks and window. Times are medians of `--repeats` runs after warm-up; a peer
that this machine lacks is recorded with its reason. Correctness is the business of tests/test_kernels.py.
"""

from __future__ import annotations

import functools
import json
import sys

import jax
import jax.numpy as jnp
from absl import flags

from launch import bench_attention as bench
from launch import peers
from launch.flags import run_main
from pallas_kernels.backends import BACKENDS, choose, usable_backends
from pallas_kernels.gist_attention import GistKV
from unigist_jax.layout import GistLayout, unit_starts

KERNELS = flags.DEFINE_list("kernels", ["forward", "query_gradient", "key_gradient", "raw_gradient"], "which to tune")
flags.adopt_module_key_flags(bench)

# (rows, keys, warps, stages); the others of their kind spill hundreds of bytes of registers at head dim 128
CANDIDATES = {
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


def attend(backend: str, layout: GistLayout, num_units: int):
    """A backend as a function of q and kv."""
    starts = unit_starts(layout, num_units, jnp.int32(0))

    def of(q, kv):
        return choose(backend, q, kv, layout)[1].attend(q, kv, layout, 0, 0, starts)

    return of


def bench_length(length: int, ratio: int) -> dict:
    """One row: forward and forward + backward of each peer, and FlexAttention's time over Triton's."""
    layout = GistLayout(ratio, bench.SINKS.value, bench.WINDOW.value)
    units = length // ratio
    row = {"length": length, "ratio": ratio}
    q, kv, cotangent = bench.inputs(layout, units)
    for backend in ("triton", "hopper"):
        if backend not in usable_backends():
            row[f"{backend}_reason"] = BACKENDS[backend].obstacle(jax.devices()[0])
            continue
        forward, both = bench.with_backward(attend(backend, layout, units))
        row[f"{backend}_forward"] = bench.milliseconds(forward, q, kv)
        row[f"{backend}_both"] = bench.milliseconds(both, q, kv, cotangent)
    row["triton_tflop_s"] = bench.exact_flops(layout, units) / row["triton_forward"] / 1e9
    del q, kv, cotangent
    sizes = bench.HEADS.value, bench.KV_HEADS.value, bench.DIM.value
    try:
        flex = peers.flex_times(layout, units, *sizes, repeats=bench.REPEATS.value)
    except Exception as error:  # a peer that breaks must not take the other figures with it
        flex = peers.FlexTimes(reason=_first_line(error))
    if flex.reason:
        return row | {"flex_reason": flex.reason}
    row |= {"flex_forward": flex.forward, "flex_both": flex.both}
    return row | {
        f"flex_over_triton_{part}": row[f"flex_{part}"] / row[f"triton_{part}"] for part in ("forward", "both")
    }


def bench_decode(batch: int) -> dict:
    """One decoding step at 128K raws, r = 4, of each backend: microseconds, and TB/s on the cache's bytes."""
    layout = GistLayout(4, bench.SINKS.value, bench.WINDOW.value)
    gists, ring, heads, dim = 32768, layout.window + layout.ratio, bench.KV_HEADS.value, bench.DIM.value
    sets = 6 if batch == 1 else 1  # enough that no cache stays in L2
    caches = []
    for i in range(sets):
        lengths = ((layout.num_sinks,), (batch, gists), (batch, ring))
        kv = (bench.normal(10 * i + j, *shape, heads, dim) for j, shape in enumerate(lengths) for _ in (0, 1))
        caches.append((bench.normal(10 * i + 9, batch, 2, bench.HEADS.value, dim), GistKV(*kv)))
    raw_index = jnp.full((batch,), gists * layout.ratio - 1, jnp.int32)
    row = {"batch": batch}
    for backend in ("triton", "hopper"):
        if backend in usable_backends():
            module = choose(backend, *caches[0], layout, decode=True)[1]
            step = jax.jit(lambda caches, module=module: [module.decode(q, kv, layout, raw_index) for q, kv in caches])
            ms = bench.milliseconds(step, caches) / sets
            row[f"{backend}_us"] = ms * 1e3
            row[f"{backend}_tb_s"] = sum(x.nbytes for x in caches[0][1]) / ms / 1e9
    return row


def tune(length: int, ratio: int):
    """Times of each kernel alone with its candidate blocks; those that the GPU refuses are recorded with the error."""
    from pallas_kernels.triton import op
    from pallas_kernels.triton.blocks import Blocks, kernel_blocks
    from pallas_kernels.triton.call import capability

    layout = GistLayout(ratio, bench.SINKS.value, bench.WINDOW.value)
    units = length // ratio
    q, kv, d_out = bench.inputs(layout, units)
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
    for name in KERNELS.value:
        run, arguments = runs[name]
        for sizes in CANDIDATES[name]:
            blocks = Blocks(*sizes)
            row = {"length": length, "ratio": ratio, "kernel": name} | blocks._asdict()
            try:
                row["ms"] = bench.milliseconds(jax.jit(functools.partial(run, blocks)), *arguments)
            except Exception as error:  # shared memory exceeded, say: the other candidates are still worth knowing
                row["error"] = _first_line(error)
            yield row


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]


def main(_: list[str]) -> None:
    reason = BACKENDS["triton"].obstacle(jax.devices()[0])
    if reason:
        raise ValueError(f"the Triton backend {reason}")
    lengths, ratios = ([int(x) for x in flag.value] for flag in (bench.LENGTHS, bench.RATIOS))
    result = {
        "command": " ".join(["python -m launch.bench_triton", *sys.argv[1:]]),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "repeats": bench.REPEATS.value,
        "shape": {"heads": bench.HEADS.value, "kv_heads": bench.KV_HEADS.value, "dim": bench.DIM.value},
    }

    def record(key, row):
        result.setdefault(key, []).append(row)
        print(key, " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
        if bench.OUT.value:
            with open(bench.OUT.value, "w") as file:
                json.dump(result, file, indent=1)

    for length in lengths:
        for ratio in ratios:
            if bench.TUNE.value:
                for row in tune(length, ratio):
                    record("tune", row)
            else:
                record("lengths", bench_length(length, ratio))
    if bench.TUNE.value:
        timed = [row for row in result["tune"] if "ms" in row]
        for row in sorted(timed, key=lambda row: (row["length"], row["ratio"], row["kernel"], row["ms"])):
            name = f"{row['length']} r={row['ratio']} {row['kernel']}"
            print(f"{name}: {row['ms']:.3f} ms  Blocks({row['rows']}, {row['keys']}, {row['warps']}, {row['stages']})")
        return
    for batch in bench.DECODE.value:
        record("decode", bench_decode(int(batch)))


if __name__ == "__main__":
    run_main(main)
