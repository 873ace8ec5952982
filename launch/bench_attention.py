"""Benchmark of the attention kernels on a GPU against their peers, in one process, on random data.

    export XLA_PYTHON_CLIENT_PREALLOCATE=false     # PyTorch, which runs one of the peers, needs memory too
    python -m launch.bench_attention --out=DIR                                # DIR/bench_attention.{json,md,png}
    python -m launch.bench_attention --backends=triton --lengths=32768,131072 --peers=flex --out=DIR
    python -m launch.bench_attention --merge=A/bench_attention.json,B/bench_attention.json --out=DIR    # two runs
    python -m launch.bench_attention --render=docs/data/h200/bench_attention.json --into=docs/benchmarks.md

Peers, all with the same heads, sinks and window: jax's cuDNN causal attention on the T raws, folded cuDNN (sinks and
gists alone) and PyTorch's FlexAttention with the gist-shifted block mask (launch/peers.py). Yardsticks: a device copy,
counting bytes read and written, and a bf16 matrix product. Correctness is the business of tests/test_kernels.py.

A GPU at its limit of power changes its clock with what it has just done. So all that is compared is timed by turns
(launch/by_turns.py): `--repeats` rounds, in each one sample of every program of a group, the yardstick among them.
Times are medians of the samples, speed-ups and shares medians of the ratios within a round. A group is one length
with one shape of the heads; FlexAttention beside the kernels; decoding; packed documents.

All but FlexAttention compiles first, several cases at a time; then groups are timed, and nothing else runs. The JSON
grows with every group. What fails, or no longer fits `--budget`, is recorded with its reason. Contexts above 128K cost
as much as all the others, so they come last.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags

from launch import attention_report, peers
from launch.by_turns import Case, Group, compiled, measured
from launch.flags import output_folder, run_main, whole_numbers
from launch.markdown import read_figures
from launch.timing import (
    PARTS,
    Contender,
    Program,
    bf16,
    contender,
    copy_tb_s,
    matmul_tflop_s,
    normals,
    warm_up,
)
from pallas_kernels.backends import check_runs_here, choose, usable_backends
from pallas_kernels.decode_attention import decode_attention, padded_slots
from pallas_kernels.gist_attention import GistKV
from unigist_jax.layout import GistLayout, unit_starts

LENGTHS = flags.DEFINE_list("lengths", ["32768", "131072", "16384"], "raw tokens, timed first and in this order")
MORE_LENGTHS = flags.DEFINE_list("more_lengths", ["65536", "262144"], "further raw tokens, timed after all else")
RATIOS = flags.DEFINE_list("ratios", ["4", "8"], "raw tokens per gist")
BACKEND = flags.DEFINE_list("backends", None, "backends to time (default: the best one here)")
HEADS = flags.DEFINE_integer("heads", 32, "query heads")
KV_HEADS = flags.DEFINE_integer("kv_heads", 8, "KV heads")
DIM = flags.DEFINE_integer("dim", 128, "head dim")
SINKS = flags.DEFINE_integer("sinks", 128, "sinks")
WINDOW = flags.DEFINE_integer("window", 128, "local window in raw tokens")
REPEATS = flags.DEFINE_integer("repeats", 10, "rounds of each group: timed samples of each case", lower_bound=1)
PEERS = flags.DEFINE_list("peers", ["cudnn", "folded", "flex"], "which peers to time")
FLEX_LENGTHS = flags.DEFINE_list(
    "flex_lengths", ["131072", "32768"], "raw tokens at which to time FlexAttention, which compiles for long"
)
SHAPES = flags.DEFINE_list(
    "shapes", ["32x32x128", "32x8x64"], "further heads to time: query heads x KV heads x head dim; empty for none"
)
SHAPE_LENGTHS = flags.DEFINE_list("shape_lengths", ["32768", "131072"], "raw tokens of the further shapes")
DECODE = flags.DEFINE_list("decode_batches", ["1", "16"], "batch sizes of the decoding step; empty for none")
DECODE_CONTEXT = flags.DEFINE_integer("decode_context", 131072, "raws of context of the decoding step")
DOCUMENTS = flags.DEFINE_integer("documents", 16, "packed documents in a 128K row at the first ratio; 0 for none")
BUDGET = flags.DEFINE_integer(
    "budget", 0, "seconds after which no further round begins (compiling counts); 0 for no limit"
)
COMPILE_THREADS = flags.DEFINE_integer("compile_threads", 12, "cases that compile at a time", lower_bound=1)
OUT = flags.DEFINE_string("out", "", "directory for the raw JSON, the tables and the plot")
MERGE = flags.DEFINE_list("merge", [], "raw JSONs of runs that measured different groups: one of all goes to --out")
RENDER = flags.DEFINE_string("render", "", "raw JSON of an earlier run: print its tables and plot it beside, no timing")
INTO = flags.DEFINE_string("into", "", "with --render, a Markdown file to put the tables into, between its two marks")

RAW = "bench_attention.json"
LONG = 131072  # the row of the packed documents; longer contexts come last


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


def brief(value: object) -> str:
    """A figure as it is printed."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def medians(samples: dict[str, list[float]], _: list[float]) -> dict:
    """Milliseconds of each part."""
    return {part: statistics.median(times) for part, times in samples.items()}


def with_shares(flops: float, samples: dict[str, list[float]], product: list[float]) -> dict:
    """The same, and the shares of the matrix rate; `flops` are those of the forward pass."""
    row = medians(samples, product)
    for part, work in zip(PARTS, (flops, 3.5 * flops), strict=True):
        rates = zip(samples[part], map(matmul_tflop_s, product), strict=True)
        row[f"share_{part}"] = statistics.median(work / ms / 1e9 / rate for ms, rate in rates)
    return row


def backend_case(key: dict, backend: str, layout: GistLayout, units: int, shape: peers.Heads, doc_start=None) -> Case:
    """A backend, with its shares of the matrix rate where the row is one document."""

    def prepare():
        return contender(attend(backend, layout, units, doc_start), *types(layout, units, shape)).programs

    flops = exact_flops(layout, units, shape)
    return Case(key, prepare, medians if doc_start is not None else functools.partial(with_shares, flops))


def decode_case(batch: int, backend: str) -> Case:
    """A decoding step: microseconds with all that the op does, and the cache's bytes over the copy's rate."""
    layout, shape = layout_of(4), (KV_HEADS.value, DIM.value)
    gists, ring = (padded_slots(n) for n in (DECODE_CONTEXT.value // layout.ratio, layout.window + layout.ratio))
    lengths = ((layout.num_sinks,), (batch, gists), (batch, ring))
    kv = GistKV(*(bf16(*length, *shape) for length in lengths for _ in (0, 1)))
    num_bytes = sum(2 * math.prod(x.shape) for x in kv)
    sets = 6 if batch == 1 else 1  # enough that no cache stays in L2
    steps = [(bf16(batch, 2, HEADS.value, DIM.value), kv)] * sets

    def prepare():
        raw_index = jnp.full((batch,), DECODE_CONTEXT.value - 1, jnp.int32)
        step = jax.jit(lambda q, kv: decode_attention(q, kv, layout, raw_index, backend))  # traced once for all steps
        decode = jax.jit(lambda steps: [step(q, kv) for q, kv in steps])
        program, inputs = decode.lower(steps).compile(), normals(steps)
        return lambda: {"steps": Program(functools.partial(program, inputs()))}

    def figures(samples: dict[str, list[float]], copies: list[float]) -> dict:
        rates = [num_bytes * sets / ms / 1e9 for ms in samples["steps"]]
        shares = [rate / copy_tb_s(ms) for rate, ms in zip(rates, copies, strict=True)]
        us = statistics.median(samples["steps"]) / sets * 1e3
        return {"us": us, "tb_s": statistics.median(rates), "share_of_copy": statistics.median(shares)}

    return Case({"what": backend, "batch": batch}, prepare, figures)


def peer_case(what: str, key: dict, make: Callable[[], Contender]) -> Case:
    """One of jax's peers."""
    return Case({"what": what} | key, lambda: make().programs, medians)


def backend_cases(length: int, ratios: list[int], shape: peers.Heads, backends: list[str]) -> Iterator[Case]:
    """The backends on one sequence of `length` raws."""
    for ratio in ratios:
        for backend in backends:
            key = {"what": backend, "length": length, "ratio": ratio} | shape._asdict()
            yield backend_case(key, backend, layout_of(ratio), length // ratio, shape)


def attention_group(length: int, ratios: list[int], shape: peers.Heads, backends: list[str], fold: bool) -> Group:
    """cuDNN causal, the backends and, with `fold`, folded cuDNN on one sequence of `length` raws."""
    key, cases = {"length": length} | shape._asdict(), []
    if "cudnn" in PEERS.value:
        cases.append(peer_case("cudnn", key, functools.partial(peers.cudnn, length, shape)))
    cases += backend_cases(length, ratios, shape, backends)
    for ratio in ratios if fold and "folded" in PEERS.value else ():
        make = functools.partial(peers.folded, layout_of(ratio), length // ratio, shape)
        cases.append(peer_case("folded", key | {"ratio": ratio}, make))
    return Group("attention", "matmul", cases)


def flex_group(length: int, ratios: list[int], backends: list[str]) -> Group:
    """FlexAttention, which compiles when it first runs, and the backends."""
    cases = list(backend_cases(length, ratios, heads(), backends))
    for ratio in ratios:
        run = functools.partial(peers.flex, layout_of(ratio), length // ratio, heads())
        key = {"what": "flex", "length": length, "ratio": ratio} | heads()._asdict()
        cases.append(Case(key, lambda run=run: run, medians))
    return Group("flex", "matmul", cases)


def document_group(ratio: int, backend: str) -> Group:
    """A row packed with equal documents, and the same row as one document."""
    layout, units = layout_of(ratio), LONG // ratio
    size, cases = units // DOCUMENTS.value, []
    for documents in (1, DOCUMENTS.value):
        packed = (jnp.arange(units, dtype=jnp.int32) // size * size)[None] if documents > 1 else None
        key = {"what": backend, "length": LONG, "ratio": ratio, "documents": documents}
        cases.append(backend_case(key, backend, layout, units, heads(), packed))
    return Group("documents", "matmul", cases)


def all_groups(backends: list[str]) -> list[Group]:
    """Every measurement that the flags ask for, the most telling first."""
    lengths, more, ratios, flex_lengths, shape_lengths = map(
        whole_numbers, (LENGTHS, MORE_LENGTHS, RATIOS, FLEX_LENGTHS, SHAPE_LENGTHS)
    )
    for length in (*lengths, *more, *flex_lengths, *shape_lengths):
        for ratio in ratios:
            layout_of(ratio).num_units(length)
    groups = [attention_group(length, ratios, heads(), backends, fold=True) for length in lengths]
    decodes = [decode_case(batch, backend) for batch in whole_numbers(DECODE) for backend in backends]
    groups += [Group("decode", "copy", decodes)] if decodes else []
    groups += [document_group(ratios[0], backends[0])] if DOCUMENTS.value else []
    groups += [flex_group(length, ratios, backends) for length in flex_lengths if "flex" in PEERS.value]
    groups += [attention_group(length, ratios, heads(), backends, fold=True) for length in more]
    for shape in map(shape_of, SHAPES.value):
        groups += [attention_group(length, ratios, shape, backends, fold=False) for length in shape_lengths]
    return sorted(groups, key=lambda group: group.cases[0].key.get("length", 0) > LONG)


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
        check_runs_here(name)
    if unknown := set(PEERS.value) - {"cudnn", "folded", "flex"}:
        raise ValueError(f"--peers={','.join(sorted(unknown))}: choose among cudnn, folded, flex")
    for shape in SHAPES.value:
        shape_of(shape)
    return backends


def out_folder() -> Path:
    """That of --out. Raises ValueError where the flag is missing."""
    if not OUT.value:
        raise ValueError("--out is missing: the folder for the results")
    return output_folder(OUT.value)


def save(result: dict, out: Path) -> None:
    """Writes raw figures, tables and plot."""
    (out / RAW).write_text(json.dumps(result, indent=1) + "\n")
    (out / RAW).with_suffix(".md").write_text(attention_report.tables(result))
    attention_report.plot(result, (out / RAW).with_suffix(".png"))


def main(_: list[str]) -> None:
    if RENDER.value:
        attention_report.REPORT.write(Path(RENDER.value), Path(INTO.value) if INTO.value else None)
        return
    if MERGE.value:
        save(attention_report.merged([read_figures(Path(x)) for x in MERGE.value]), out_folder())
        return
    if jax.default_backend() != "gpu":
        raise ValueError(f"this benchmark times GPU kernels; this is {jax.devices()[0].device_kind}")
    backends = checked_backends()
    groups = all_groups(backends)
    out = out_folder() if OUT.value else None
    warm_up()
    result = {
        "commands": [" ".join(["python -m launch.bench_attention", *(x for x in sys.argv[1:] if "--out" not in x)])],
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
        "repeats": REPEATS.value,
        "backends": backends,
        "shape": heads()._asdict() | {"sinks": SINKS.value, "window": WINDOW.value},
        "groups": [],
    }
    print(result, flush=True)
    end = time.perf_counter() + (BUDGET.value or math.inf)
    prepared = compiled(groups, COMPILE_THREADS.value)
    warm_up()
    for group, rows, state in measured(groups, prepared, REPEATS.value, end):
        peers.free_flex()
        result.setdefault(group.kind, []).extend(rows)
        result["groups"].append({"kind": group.kind, "cases": len(rows)} | state)
        for row in rows:
            print(group.kind, *(f"{k}={brief(v)}" for k, v in row.items() if k != "samples"), flush=True)
        print(result["groups"][-1], flush=True)
        if out:
            (out / RAW).write_text(json.dumps(result, indent=1) + "\n")
    print(attention_report.tables(result))
    if out:
        save(result, out)


if __name__ == "__main__":
    run_main(main)
