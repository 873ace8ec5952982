"""Benchmark of inference at full size: time to the first token, time a token, memory, batch and context that fit.

  python -m launch.bench_inference --out=docs/data                       # 64K first, then what is less important
  python -m launch.bench_inference --out=docs/data --suites=latency --contexts=131072 --resume
  python -m launch.bench_inference --render=docs/data/bench_inference.json --into=docs/benchmarks.md

As for the paper's table: a prompt of random tokens, 128 new ones, random weights of the exact shape in bf16.
Every case is a process of its own (launch/inference_case.py) that is ended after --timeout; its result is written to
OUT/bench_inference.json as soon as it is there. Systems: unigist4, unigist8 and so on (the digits are the ratio), full
(full attention here), transformers (Hugging Face's, on torch), and every other method with its ratio: snapkv4,
activation_beacon4, unigist_int84.

Suites (all but the first: unigist and full alone)
  latency  --contexts, --batch sequences each
  batch    the largest batch that fits, at the first context: decoding alone
  limit    the longest context under --limit_gib: the first of --limit_tokens (times the ratio) that fits
  chunks   prefill by --chunk_sizes, at the first context
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from launch import inference_report
from launch.flags import output_folder, run_main, whole_numbers
from launch.inference_case import Case, device_memory, parse_system
from launch.markdown import read_figures
from unigist_jax.model.shapes import named_shape

RESULT = "bench_inference.json"
QUICK_AUTOTUNING = "--xla_gpu_autotune_level=2"  # times what 4, the default, does, but does not check the results
SUITES = ("latency", "batch", "chunks", "limit")

_OUT = flags.DEFINE_string("out", None, f"directory for {RESULT} and the plot")
_RENDER = flags.DEFINE_string("render", None, "only make tables and plot of this raw JSON")
_INTO = flags.DEFINE_string("into", None, "with --render: Markdown file that gets the tables between its marks")
_SHAPE = flags.DEFINE_string("shape", "llama3.1-8b", "a published Llama (unigist_jax/model/shapes.py), or tiny")
_SUITES = flags.DEFINE_list("suites", list(SUITES), f"which of {', '.join(SUITES)}, in this order")
_SYSTEMS = flags.DEFINE_list("systems", ["unigist4", "unigist8", "full", "transformers"], "what to measure")
_CONTEXTS = flags.DEFINE_list("contexts", ["65536", "131072", "32768", "16384"], "tokens of a prompt, in this order")
_BATCH = flags.DEFINE_integer("batch", 1, "latency: sequences", lower_bound=1)
_TENSOR = flags.DEFINE_integer("tensor", 1, "latency: devices that share a model", lower_bound=1)
_MEMORY_GIB = flags.DEFINE_float("memory_gib", None, "latency: GiB that the process may use of the device")
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 128, "tokens generated", lower_bound=2)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "timed rounds of a case, of which the median counts", lower_bound=1)
_CHUNK_SIZES = flags.DEFINE_list("chunk_sizes", ["4096", "8192", "16384", "32768"], "chunks: raws of a prefill chunk")
_LIMIT_GIB = flags.DEFINE_float(
    "limit_gib", 40.0, "limit: GiB that the process may use of the device", lower_bound=1e-3
)
_LIMIT_TOKENS = flags.DEFINE_list("limit_tokens", ["180224", "163840"], "limit: tokens tried, over the ratio")
_LIMIT_CHUNK = flags.DEFINE_integer("limit_chunk", 2048, "limit: raws of a prefill chunk")
_OVERHEAD_GIB = flags.DEFINE_float("overhead_gib", 0.75, "limit: GiB of it kept for the driver's context and programs")
_TIMEOUT = flags.DEFINE_integer(
    "timeout", 300, "seconds that a case may take, compilation and autotuning included", lower_bound=1
)
_BUDGET = flags.DEFINE_integer("budget", 100_000, "seconds after which no case begins any more", lower_bound=1)
_RESUME = flags.DEFINE_bool("resume", False, f"keep what {RESULT} in --out holds, and measure the rest")


def main(_: list[str]) -> None:
    if _RENDER.value:
        inference_report.REPORT.write(Path(_RENDER.value), Path(_INTO.value) if _INTO.value else None)
        return
    if not _OUT.value:
        raise ValueError("--out is missing: the directory for the results (or --render=FILE for tables alone)")
    planned = list(cases())
    file = output_folder(_OUT.value) / RESULT
    before = read_figures(file) if _RESUME.value and file.exists() else {"commands": [], "records": []}
    records, command = before["records"], " ".join(["python -m launch.bench_inference", *sys.argv[1:]])
    commands = [*before["commands"], command]
    start, fitting = time.perf_counter(), set()
    with tempfile.TemporaryDirectory() as scratch:
        for case in planned:
            known = next((record for record in records if record["name"] == case.name), None)
            if known and "error" not in known:
                continue
            if case.kind == "limit" and (case.system, case.ratio) in fitting:
                continue
            records = [record for record in records if record is not known]
            if time.perf_counter() - start > _BUDGET.value:
                result = {"error": f"not begun: --budget={_BUDGET.value} s were over"}
            else:
                result = run(case, Path(scratch))
            if "error" not in result:
                fitting.add((case.system, case.ratio)) if case.kind == "limit" else None
            records.append({"name": case.name, **dataclasses.asdict(case), **result})
            print(inference_report.line(records[-1]), flush=True)
            file.write_text(json.dumps({"commands": commands, "records": records}, indent=1) + "\n")
    inference_report.REPORT.write(file, None)


def cases() -> Iterator[Case]:
    """What the flags ask for, the most important first. Raises ValueError for what none of them can be."""
    contexts, systems = whole_numbers(_CONTEXTS), [parse_system(s) for s in _SYSTEMS.value]
    named_shape(_SHAPE.value)  # checks it
    if not contexts:
        raise ValueError("--contexts is empty; give the tokens of a prompt, such as 65536")
    common = {"shape": _SHAPE.value, "new_tokens": _NEW_TOKENS.value, "rounds": _ROUNDS.value}
    ours = [(system, ratio) for system, ratio in systems if system in ("unigist", "full")]
    for suite in _SUITES.value:
        if suite == "latency":
            for context in contexts:
                for system, ratio in systems:
                    latency = {"batch": _BATCH.value, "memory_gib": _MEMORY_GIB.value, "tensor": _TENSOR.value}
                    yield Case(system, "latency", ratio, context=context, **latency, **common)
        elif suite == "batch":
            for system, ratio in ours:
                yield Case(system, "decode", ratio, context=contexts[0], batch=0, **common)
        elif suite == "chunks":
            sizes = tuple(whole_numbers(_CHUNK_SIZES))
            for system, ratio in ours:
                if ratio:
                    yield Case(system, "chunks", ratio, context=contexts[0], chunk_sizes=sizes, **common)
        elif suite == "limit":
            for system, ratio in ours:
                for tokens in whole_numbers(_LIMIT_TOKENS) if ratio else ():
                    # whole chunks, and room behind them for what is generated
                    context = tokens * ratio - _LIMIT_CHUNK.value
                    limit = {"memory_gib": _LIMIT_GIB.value, "chunk_sizes": (_LIMIT_CHUNK.value,)}
                    yield Case(system, "limit", ratio, context=context, **limit, **common)
        else:
            raise ValueError(f"--suites: unknown {suite!r}; choose among {SUITES}")


def run(case: Case, scratch: Path) -> dict[str, Any]:
    """The result of a case's process, or the `error` that ended it."""
    target, log = scratch / f"{case.name}.json", scratch / "log"
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(scratch / "compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{memory_fraction(case):.4f}",
    }
    environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_AUTOTUNING}".strip()
    if case.system == "transformers":
        environment["JAX_PLATFORMS"] = "cpu"  # the device is torch's
    command = [sys.executable, "-m", "launch.inference_case", json.dumps(dataclasses.asdict(case)), str(target)]
    with log.open("w") as output:
        try:
            code = subprocess.run(
                command, env=environment, stdout=output, stderr=output, timeout=_TIMEOUT.value, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return {"error": f"took more than --timeout={_TIMEOUT.value} s"}
    if not target.exists():
        last = (log.read_text().strip().splitlines() or ["nothing"])[-1]
        return {"error": f"ended with exit code {code} and said: {last[:300]}"}
    return json.loads(target.read_text())


def memory_fraction(case: Case) -> float:
    """Share of the device's memory for jax's pool; the driver's context and the programs take their part beside it."""
    if case.memory_gib is None:
        return 0.93
    try:
        total = device_memory()[1]
    except (OSError, subprocess.SubprocessError):  # no GPU
        return 0.93
    return (case.memory_gib - _OVERHEAD_GIB.value) * 2**30 / total


if __name__ == "__main__":
    run_main(main)
