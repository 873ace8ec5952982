"""Benchmark of the attention kernels on a GPU against their peers, in one process, on random data.

    export XLA_PYTHON_CLIENT_PREALLOCATE=false     # PyTorch, which runs one of the peers, needs memory too
    python -m launch.bench_attention --out=DIR                                # DIR/bench_attention.{json,md,png}
    python -m launch.bench_attention --backends=triton --lengths=32768,131072 --peers=flex --out=DIR
    python -m launch.bench_attention --render=docs/data/bench_attention.json --into=docs/benchmarks.md   # no GPU needed

Peers, all with the same heads, sinks and window: jax's cuDNN causal attention on the T raws, folded cuDNN (sinks and
gists alone) and PyTorch's FlexAttention with the gist-shifted block mask (launch/peers.py). Ceilings: a device copy,
counting bytes read and written, and a bf16 matrix product. Times are medians of `--repeats` samples after warm-up
(launch/timing.py). Correctness is the business of tests/test_kernels.py.

All cases compile first, several at a time; then they are timed, and nothing else runs. The JSON grows with every
measurement. What fails, or no longer fits `--budget`, is recorded with its reason. Contexts above 128K cost as much as
all the others, so they come last.
"""

from __future__ import annotations

import concurrent.futures
import functools
import importlib.metadata
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

from launch import attention_report, peers
from launch.flags import run_main
from launch.timing import Contender, bf16, ceilings, contender, milliseconds, normals, warm_up
from pallas_kernels.backends import BACKENDS, choose, usable_backends
from pallas_kernels.decode_attention import decode_attention, padded_slots
from pallas_kernels.gist_attention import GistKV
from unigist_jax.layout import GistLayout, unit_starts

LENGTHS = flags.DEFINE_list("lengths", ["16384", "32768", "65536", "131072", "262144"], "raw tokens")
RATIOS = flags.DEFINE_list("ratios", ["4", "8"], "raw tokens per gist")
BACKEND = flags.DEFINE_list("backends", None, "backends to time (default: the best one here)")
HEADS = flags.DEFINE_integer("heads", 32, "query heads")
KV_HEADS = flags.DEFINE_integer("kv_heads", 8, "KV heads")
DIM = flags.DEFINE_integer("dim", 128, "head dim")
SINKS = flags.DEFINE_integer("sinks", 128, "sinks")
WINDOW = flags.DEFINE_integer("window", 128, "local window in raw tokens")
REPEATS = flags.DEFINE_integer("repeats", 10, "timed samples of each case", lower_bound=1)
PEERS = flags.DEFINE_list("peers", ["cudnn", "folded", "flex"], "which peers to time")
FLEX_LENGTHS = flags.DEFINE_list(
    "flex_lengths", ["32768", "131072"], "those of --lengths at which to time FlexAttention, which compiles for long"
)
SHAPES = flags.DEFINE_list(
    "shapes", ["32x32x128", "32x8x64"], "further heads to time: query heads x KV heads x head dim; empty for none"
)
SHAPE_LENGTHS = flags.DEFINE_list("shape_lengths", ["32768", "131072"], "raw tokens of the further shapes")
DECODE = flags.DEFINE_list("decode_batches", ["1", "16"], "batch sizes of the decoding step; empty for none")
DECODE_CONTEXT = flags.DEFINE_integer("decode_context", 131072, "raws of context of the decoding step")
DOCUMENTS = flags.DEFINE_integer("documents", 16, "packed documents in a 128K row at the first ratio; 0 for none")
BUDGET = flags.DEFINE_integer(
    "budget", 0, "seconds after which no further measurement begins (compiling counts); 0 for no limit"
)
COMPILE_THREADS = flags.DEFINE_integer("compile_threads", 6, "cases that compile at a time", lower_bound=1)
OUT = flags.DEFINE_string("out", "", "directory for the raw JSON, the tables and the plot")
RENDER = flags.DEFINE_string("render", "", "raw JSON of an earlier run: print its tables and plot it beside, no timing")
INTO = flags.DEFINE_string("into", "", "with --render, a Markdown file to put the tables into, between its two marks")

LONG = 131072  # the row of the packed documents; longer contexts come last


class Job(NamedTuple):
    """One measurement: where it goes in the JSON, what tells it from the others there, and how to take it.

    prepare: compiles what is to be timed, running nothing, and returns the function that takes the measurement.
    """

    kind: str
    key: dict
    prepare: Callable[[], Callable[[], dict]]


def heads() -> peers.Heads:
    """Those of the flags."""
    return peers.Heads(HEADS.value, KV_HEADS.value, DIM.value)


def shape_of(text: str) -> peers.Heads:
    """Heads written as in --shapes. Raises ValueError for anything else."""
    sizes = text.split("x")
    if len(sizes) != 3 or not all(x.isdecimal() for x in sizes):
        raise ValueError(f"--shapes={text}: write query heads x KV heads x head dim, as in 32x8x128")
    return peers.Heads(*map(int, sizes))


def layout_of(ratio: int) -> GistLayout:
    """The flags' layout at a ratio."""
    return GistLayout(ratio, SINKS.value, WINDOW.value)


def types(layout: GistLayout, num_units: int, shape: peers.Heads) -> tuple[jax.ShapeDtypeStruct, GistKV]:
    """Those of the queries, and the keys and values, of a segment of one sequence."""
    raws = num_units * layout.ratio
    lengths = ((layout.num_sinks,), (1, num_units), (1, raws))
    kv = GistKV(*(bf16(*length, shape.kv, shape.dim) for length in lengths for _ in (0, 1)))
    return bf16(1, num_units + raws, shape.query, shape.dim), kv


def attend(backend: str, layout: GistLayout, num_units: int, doc_start=None) -> Callable:
    """A backend as a function of q and kv."""
    starts = unit_starts(layout, num_units, jnp.int32(0), doc_start)
    return lambda q, kv: choose(backend, q, kv, layout)[1].attend(q, kv, layout, 0, 0, starts)


def exact_flops(layout: GistLayout, num_units: int, shape: peers.Heads) -> float:
    """Floating-point operations of the forward pass that no implementation can avoid."""
    r, u = layout.ratio, num_units
    gists = r * u * (u - 1) / 2 + u * (u + 1) / 2
    raws = u * (r * layout.window + r * (r + 1) / 2) + u * (layout.window + r)
    return 4 * shape.dim * shape.query * (gists + raws + (r + 1) * u * layout.num_sinks)


def first_line(error: Exception) -> str:
    """An error in a table's cell."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]


def backend_job(backend: str, layout: GistLayout, units: int, shape: peers.Heads, matmul: float, doc_start=None):
    """Prepares a backend: its milliseconds, and its shares of the matrix rate where the row is one document."""
    programs = contender(attend(backend, layout, units, doc_start), *types(layout, units, shape))

    def measure() -> dict:
        row = programs.times(REPEATS.value)
        if doc_start is None:
            flops = exact_flops(layout, units, shape)
            row["share_forward"] = flops / row["forward"] / 1e9 / matmul
            row["share_both"] = 3.5 * flops / row["both"] / 1e9 / matmul
        return row

    return measure


def decode_job(batch: int, backend: str, copy_tb_s: float) -> Callable[[], dict]:
    """Prepares a decoding step: microseconds with all that the op does, and the cache's bytes over the copy's rate."""
    layout, shape = layout_of(4), (KV_HEADS.value, DIM.value)
    gists, ring = (padded_slots(n) for n in (DECODE_CONTEXT.value // layout.ratio, layout.window + layout.ratio))
    lengths = ((layout.num_sinks,), (batch, gists), (batch, ring))
    kv = GistKV(*(bf16(*length, *shape) for length in lengths for _ in (0, 1)))
    sets = 6 if batch == 1 else 1  # enough that no cache stays in L2
    steps = [(bf16(batch, 2, HEADS.value, DIM.value), kv)] * sets
    raw_index = jnp.full((batch,), DECODE_CONTEXT.value - 1, jnp.int32)
    decode = jax.jit(lambda steps: [decode_attention(q, kv, layout, raw_index, backend) for q, kv in steps])
    program, inputs = decode.lower(steps).compile(), normals(steps)

    def measure() -> dict:
        ms = milliseconds(program, inputs(), repeats=REPEATS.value) / sets
        tb_s = sum(2 * math.prod(x.shape) for x in kv) / ms / 1e9
        return {"us": ms * 1e3, "tb_s": tb_s, "share_of_copy": tb_s / copy_tb_s}

    return measure


def peer_job(programs: Callable[..., Contender], *args) -> Callable[[], dict]:
    """Prepares one of jax's peers."""
    return functools.partial(programs(*args).times, REPEATS.value)


def flex_job(*args) -> Callable[[], dict]:
    """FlexAttention, which compiles when it first runs."""
    return functools.partial(peers.flex_times, *args, REPEATS.value)


def attention_jobs(length: int, ratios: list[int], shape: peers.Heads, backends, matmul: float) -> Iterator[Job]:
    """cuDNN and the backends on one sequence of `length` raws."""
    key = {"length": length} | shape._asdict()
    if "cudnn" in PEERS.value:
        yield Job("attention", {"what": "cudnn"} | key, functools.partial(peer_job, peers.cudnn, length, shape))
    for ratio in ratios:
        for backend in backends:
            prepare = functools.partial(backend_job, backend, layout_of(ratio), length // ratio, shape, matmul)
            yield Job("attention", {"what": backend} | key | {"ratio": ratio}, prepare)


def rival_jobs(what: str, prepare: Callable, lengths: list[int], ratios: list[int]) -> Iterator[Job]:
    """Folded cuDNN or FlexAttention, the longest first."""
    for length in sorted(lengths, reverse=True) if what in PEERS.value else ():
        for ratio in ratios:
            key = {"what": what, "length": length, "ratio": ratio} | heads()._asdict()
            yield Job("attention", key, functools.partial(prepare, layout_of(ratio), length // ratio, heads()))


def document_jobs(ratio: int, backend: str, matmul: float) -> Iterator[Job]:
    """A row packed with equal documents, and the same row as one document."""
    layout, units = layout_of(ratio), LONG // ratio
    size = units // DOCUMENTS.value
    for documents in (1, DOCUMENTS.value):
        packed = (jnp.arange(units, dtype=jnp.int32) // size * size)[None] if documents > 1 else None
        key = {"what": backend, "length": LONG, "ratio": ratio, "documents": documents}
        yield Job("documents", key, functools.partial(backend_job, backend, layout, units, heads(), matmul, packed))


def all_jobs(backends: list[str], limits: dict) -> list[Job]:
    """Every measurement that the flags ask for, the most telling first."""
    lengths, ratios, flex_lengths, shape_lengths = (
        [int(x) for x in flag.value] for flag in (LENGTHS, RATIOS, FLEX_LENGTHS, SHAPE_LENGTHS)
    )
    matmul, jobs = limits["matmul_tflop_s"], []
    for batch in map(int, DECODE.value):
        for backend in backends:
            prepare = functools.partial(decode_job, batch, backend, limits["copy_tb_s"])
            jobs.append(Job("decode", {"what": backend, "batch": batch}, prepare))
    for length in lengths:
        jobs += attention_jobs(length, ratios, heads(), backends, matmul)
    if DOCUMENTS.value:
        jobs += document_jobs(ratios[0], backends[0], matmul)
    jobs += rival_jobs("flex", flex_job, flex_lengths, ratios)
    jobs += rival_jobs("folded", functools.partial(peer_job, peers.folded), lengths, ratios)
    for shape in map(shape_of, SHAPES.value):
        for length in shape_lengths:
            jobs += attention_jobs(length, ratios, shape, backends, matmul)
    return sorted(jobs, key=lambda job: job.key.get("length", 0) > LONG)


def attempt(action: Callable) -> tuple[object, float]:
    """What an action returns, or {"reason": its error}, since one that breaks must not take others with it; seconds."""
    start = time.perf_counter()
    try:
        result = action()
    except Exception as error:
        result = {"reason": first_line(error)}
    return result, round(time.perf_counter() - start, 1)


def compiled(jobs: list[Job], threads: int) -> list[tuple[object, float]]:
    """Compiles all jobs in `threads` threads: what `attempt` gives of each."""
    begin = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        prepared = list(pool.map(lambda job: attempt(job.prepare), jobs))
    print(f"compiled {len(jobs)} cases in {time.perf_counter() - begin:.0f} s", flush=True)
    return prepared


def measured(jobs: list[Job], prepared: list[tuple[object, float]], end: float) -> Iterator[tuple[str, dict]]:
    """Takes one measurement after another, none from time `end` on: their kinds and rows."""
    for job, (measure, compiling) in zip(jobs, prepared, strict=True):
        row, timing = measure, 0.0
        if callable(measure):
            if time.perf_counter() > end:
                row = {"reason": "not begun within the budget"}
            else:
                row, timing = attempt(measure)
        yield job.kind, job.key | row | {"compile_seconds": compiling, "seconds": timing}


def versions() -> dict[str, str]:
    """Releases of what the figures depend on, as far as installed."""
    found = {}
    for name in ("jax", "jaxlib", "triton", "jax-triton", "torch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def checked_backends() -> list[str]:
    """Those of the flags. Raises ValueError for one that cannot run here, an unknown peer or a bad shape."""
    backends = BACKEND.value or usable_backends()[:1]
    for name in backends:
        if name not in usable_backends():
            reason = BACKENDS[name].obstacle(jax.devices()[0]) if name in BACKENDS else "is no backend"
            raise ValueError(f"--backends={name}: {reason}; usable here: {', '.join(usable_backends())}")
    if unknown := set(PEERS.value) - {"cudnn", "folded", "flex"}:
        raise ValueError(f"--peers={','.join(sorted(unknown))}: choose among cudnn, folded, flex")
    for shape in SHAPES.value:
        shape_of(shape)
    return backends


def main(_: list[str]) -> None:
    if RENDER.value:
        attention_report.REPORT.write(Path(RENDER.value), Path(INTO.value) if INTO.value else None)
        return
    if jax.default_backend() != "gpu":
        raise ValueError(f"this benchmark times GPU kernels; this is {jax.devices()[0].device_kind}")
    backends = checked_backends()
    out = Path(OUT.value) if OUT.value else None
    if out:
        out.mkdir(parents=True, exist_ok=True)
    warm_up()
    result = {
        "command": " ".join(["python -m launch.bench_attention", *(x for x in sys.argv[1:] if "--out" not in x)]),
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
        "repeats": REPEATS.value,
        "backends": backends,
        "shape": heads()._asdict() | {"sinks": SINKS.value, "window": WINDOW.value},
        "ceilings": ceilings(REPEATS.value),
    }
    print(result, flush=True)
    end = time.perf_counter() + (BUDGET.value or math.inf)
    jobs = all_jobs(backends, result["ceilings"])
    prepared = compiled(jobs, COMPILE_THREADS.value)
    warm_up()
    for kind, row in measured(jobs, prepared, end):
        result.setdefault(kind, []).append(row)
        print(kind, *(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
        if out:
            (out / "bench_attention.json").write_text(json.dumps(result, indent=1) + "\n")
    print(attention_report.tables(result))
    if out:
        (out / "bench_attention.md").write_text(attention_report.tables(result))
        attention_report.plot(result, out / "bench_attention.png")


if __name__ == "__main__":
    run_main(main)
