"""Benchmark of the attention kernels on a GPU: this kernel against its peers, in one process, on random data.

    python -m launch.bench_attention --lengths=16384,32768,131072 --ratios=4,8 --out=bench_attention.json
    python -m launch.bench_attention --tune --lengths=16384,32768,131072     # rows for pallas_kernels/hopper/blocks.py

Peers, all at the same number of heads: jax's cuDNN causal attention on the T raws, and folded cuDNN (the r raws of a
unit, its gist and the query heads of a KV head as heads, against sinks and gists: most of the work, without the local
window). Ceilings: a device copy, counting bytes read and written, and a bf16 matrix product. Every time is the median
of `--repeats` runs after warm-up; short runs are launched several at a time. Correctness is the business of
tests/test_hopper.py: run that first.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp
from absl import flags

from launch.flags import run_main
from pallas_kernels import hopper
from pallas_kernels.backends import usable_backends
from pallas_kernels.gist_attention import GistKV
from pallas_kernels.hopper.blocks import BackwardBlocks, ForwardBlocks
from unigist_jax.layout import GistLayout, unit_starts

LENGTHS = flags.DEFINE_list("lengths", ["16384", "32768", "65536", "131072"], "raw tokens")
RATIOS = flags.DEFINE_list("ratios", ["4", "8"], "raw tokens per gist")
HEADS = flags.DEFINE_integer("heads", 32, "query heads")
KV_HEADS = flags.DEFINE_integer("kv_heads", 8, "KV heads")
DIM = flags.DEFINE_integer("dim", 128, "head dim")
SINKS = flags.DEFINE_integer("sinks", 128, "sinks")
WINDOW = flags.DEFINE_integer("window", 128, "local window in raw tokens")
REPEATS = flags.DEFINE_integer("repeats", 10, "timed runs of each case")
PEERS = flags.DEFINE_list("peers", ["cudnn", "folded"], "which peers to time")
DECODE = flags.DEFINE_list("decode_batches", ["1", "16"], "batch sizes of the decoding step; empty for none")
DOCUMENTS = flags.DEFINE_integer("documents", 16, "packed documents in the longest row, at the first ratio; 0 for none")
TUNE = flags.DEFINE_bool("tune", False, "time candidate block sizes instead of the peers")
OUT = flags.DEFINE_string("out", "", "file for the raw JSON")
PLOT = flags.DEFINE_string("plot", "", "file for a plot of speed-up against length")

CUDNN_CAUSAL = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")


def milliseconds(fn, *args) -> float:
    """Median wall time of one call, in ms."""
    jax.block_until_ready(fn(*args))
    begin = time.perf_counter()
    jax.block_until_ready(fn(*args))
    calls = max(1, int(0.004 / (time.perf_counter() - begin)))
    times = []
    for _ in range(REPEATS.value):
        begin = time.perf_counter()
        for _ in range(calls):
            result = fn(*args)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - begin) / calls)
    return statistics.median(times) * 1e3


def normal(seed: int, *shape: int):
    """Standard normal bf16 data."""
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def with_backward(attend):
    """A jitted forward, and a jitted forward with all gradients for an output cotangent given last."""
    return jax.jit(attend), jax.jit(lambda *args: jax.vjp(attend, *args[:-1])[1](args[-1]))


def ceilings() -> dict:
    """Measured copy bandwidth (TB/s, bytes read and written) and matrix rate (TFLOP/s)."""
    x = jnp.ones(2**30, jnp.float32)
    bandwidth = 2 * x.nbytes / milliseconds(jax.jit(jnp.copy), x) / 1e9
    a, b = normal(0, 8192, 8192), normal(1, 8192, 8192)
    return {"copy_tb_s": bandwidth, "matmul_tflop_s": 2 * 8192**3 / milliseconds(jax.jit(jnp.matmul), a, b) / 1e9}


def inputs(layout: GistLayout, num_units: int):
    """Queries, keys and values of a segment of one sequence, and a cotangent."""
    kv_shape, raws = (KV_HEADS.value, DIM.value), num_units * layout.ratio
    q_shape = (1, num_units + raws, HEADS.value, DIM.value)
    lengths = ((layout.num_sinks,), (1, num_units), (1, raws))
    kv = GistKV(*(normal(2 * i + j, *length, *kv_shape) for i, length in enumerate(lengths) for j in (0, 1)))
    return normal(7, *q_shape), kv, normal(8, *q_shape)


def gist(layout: GistLayout, num_units: int, doc_start=None, **options):
    """This kernel as a function of q and kv."""
    starts = unit_starts(layout, num_units, jnp.int32(0), doc_start)
    return lambda q, kv: hopper.attend(q, kv, layout, 0, 0, starts, **options)


def cudnn(length: int):
    """jax's cuDNN causal attention on the raws: forward ms, forward + backward ms."""
    q, cotangent = (normal(i, 1, length, HEADS.value, DIM.value) for i in (0, 1))
    k, v = (normal(i, 1, length, KV_HEADS.value, DIM.value) for i in (2, 3))
    forward, both = with_backward(CUDNN_CAUSAL)
    return milliseconds(forward, q, k, v), milliseconds(both, q, k, v, cotangent)


def folded(layout: GistLayout, num_units: int):
    """Folded cuDNN, sinks and gists only: forward ms, forward + backward ms."""
    rows = layout.num_sinks + num_units  # s - 1 rows in front and one behind make the unit-level mask causal
    heads = (layout.ratio + 1) * HEADS.value
    q, cotangent = (normal(i, 1, rows, heads, DIM.value) for i in (0, 1))
    k, v = (normal(i, 1, rows, KV_HEADS.value, DIM.value) for i in (2, 3))
    forward, both = with_backward(CUDNN_CAUSAL)
    return milliseconds(forward, q, k, v), milliseconds(both, q, k, v, cotangent)


def exact_flops(layout: GistLayout, num_units: int) -> float:
    """Floating-point operations of the forward pass that no implementation can avoid."""
    r, u = layout.ratio, num_units
    gists = r * u * (u - 1) / 2 + u * (u + 1) / 2
    raws = u * (r * layout.window + r * (r + 1) / 2) + u * (layout.window + r)
    return 4 * DIM.value * HEADS.value * (gists + raws + (r + 1) * u * layout.num_sinks)


def bench_length(length: int, ratio: int, causal) -> dict:
    """One row of the table."""
    layout = GistLayout(ratio, SINKS.value, WINDOW.value)
    units = length // ratio
    q, kv, cotangent = inputs(layout, units)
    forward, both = with_backward(gist(layout, units))
    row = {"length": length, "ratio": ratio, "forward": milliseconds(forward, q, kv)}
    row["both"] = milliseconds(both, q, kv, cotangent)
    row["forward_tflop_s"] = exact_flops(layout, units) / row["forward"] / 1e9
    del q, kv, cotangent
    if causal:
        row |= {"cudnn_forward": causal[0], "cudnn_both": causal[1]}
        row |= {"speedup_forward": causal[0] / row["forward"], "speedup_both": causal[1] / row["both"]}
    if "folded" in PEERS.value:
        row["folded_forward"], row["folded_both"] = folded(layout, units)
    return row


def bench_documents(length: int, ratio: int) -> dict:
    """A row packed with equal documents against one document of the same length."""
    layout = GistLayout(ratio, SINKS.value, WINDOW.value)
    units = length // ratio
    q, kv, cotangent = inputs(layout, units)
    size = units // DOCUMENTS.value
    doc_start = (jnp.arange(units, dtype=jnp.int32) // size * size)[None]
    result = {"length": length, "ratio": ratio, "documents": DOCUMENTS.value}
    for name, starts in (("one", None), ("packed", doc_start)):
        forward, both = with_backward(gist(layout, units, starts))
        result[f"{name}_forward"] = milliseconds(forward, q, kv)
        result[f"{name}_both"] = milliseconds(both, q, kv, cotangent)
    return result


def bench_decode(batch: int, copy_tb_s: float) -> dict:
    """One decoding step at 128K raws, r = 4: microseconds, and the share of the copy bandwidth on the cache's bytes."""
    layout = GistLayout(4, SINKS.value, WINDOW.value)
    gists, ring = 32768, layout.window + layout.ratio
    sets = 6 if batch == 1 else 1  # enough that no cache stays in L2
    caches = []
    for i in range(sets):
        lengths = ((layout.num_sinks,), (batch, gists), (batch, ring))
        kv = (normal(10 * i + j, *shape, KV_HEADS.value, DIM.value) for j, shape in enumerate(lengths) for _ in (0, 1))
        caches.append((normal(10 * i + 9, batch, 2, HEADS.value, DIM.value), GistKV(*kv)))
    raw_index = jnp.full((batch,), gists * layout.ratio - 1, jnp.int32)
    step = jax.jit(lambda caches: [hopper.decode(q, kv, layout, raw_index) for q, kv in caches])
    ms = milliseconds(step, caches) / sets
    tb_s = sum(x.nbytes for x in caches[0][1]) / ms / 1e9
    return {"batch": batch, "us": ms * 1e3, "tb_s": tb_s, "share_of_copy": tb_s / copy_tb_s}


def tune(length: int, ratio: int) -> list[dict]:
    """Times of the candidate block sizes, fastest first."""
    layout = GistLayout(ratio, SINKS.value, WINDOW.value)
    units = length // ratio
    q, kv, cotangent = inputs(layout, units)
    rows = []
    for items in (1, 2, 4, 8):
        blocks = ForwardBlocks(items=items), BackwardBlocks()
        forward, _ = with_backward(gist(layout, units, blocks=blocks))
        rows.append({"forward": blocks[0]._asdict(), "ms": milliseconds(forward, q, kv)})
    for heads in (4, 16):
        blocks = ForwardBlocks(), BackwardBlocks(heads=heads)
        _, both = with_backward(gist(layout, units, blocks=blocks))
        rows.append({"backward": blocks[1]._asdict(), "ms": milliseconds(both, q, kv, cotangent)})
    return [{"length": length, "ratio": ratio} | row for row in sorted(rows, key=lambda row: row["ms"])]


def plot(rows: list[dict], path: str) -> None:
    """Speed-up over cuDNN causal attention against length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for ratio in sorted({row["ratio"] for row in rows}):
        mine = [row for row in rows if row["ratio"] == ratio]
        for key, style in (("speedup_forward", "o-"), ("speedup_both", "s--")):
            name = f"r={ratio} {key.removeprefix('speedup_')}"
            axes.plot([row["length"] for row in mine], [row[key] for row in mine], style, label=name)
    axes.set(xscale="log", xlabel="raw tokens", ylabel="speed-up over cuDNN causal")
    axes.legend()
    figure.savefig(path, bbox_inches="tight", dpi=120)


def main(_: list[str]) -> None:
    if "hopper" not in usable_backends():
        raise ValueError(f"this benchmark needs a GPU of compute capability 9.x, not {jax.devices()[0].device_kind}")
    lengths, ratios = ([int(x) for x in flag.value] for flag in (LENGTHS, RATIOS))
    result = {
        "command": " ".join(["python -m launch.bench_attention", *sys.argv[1:]]),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "repeats": REPEATS.value,
        "shape": {"heads": HEADS.value, "kv_heads": KV_HEADS.value, "dim": DIM.value},
    }

    def record(key, row):
        result.setdefault(key, []).append(row)
        print(key, " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
        if OUT.value:
            with open(OUT.value, "w") as file:
                json.dump(result, file, indent=1)

    if TUNE.value:
        for length in lengths:
            for ratio in ratios:
                for row in tune(length, ratio):
                    record("tune", row)
        return
    record("ceilings", ceilings())
    for batch in DECODE.value:
        record("decode", bench_decode(int(batch), result["ceilings"][0]["copy_tb_s"]))
    for length in lengths:
        causal = cudnn(length) if "cudnn" in PEERS.value else None
        for ratio in ratios:
            record("lengths", bench_length(length, ratio, causal))
    if DOCUMENTS.value:
        record("documents", bench_documents(max(lengths), ratios[0]))
    if PLOT.value and "cudnn" in PEERS.value:
        plot(result["lengths"], PLOT.value)


if __name__ == "__main__":
    run_main(main)
