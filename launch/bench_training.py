"""Benchmark of the training step: UniGist against full attention in the same code, random tokens.

    python -m launch.bench_training --out=DIR                                   # DIR/bench_training.{json,md}
    python -m launch.bench_training --lengths=32768 --ratios=4 --remat=attention --steps=5
    python -m launch.bench_training --lengths=131072 --remat=attention+attention_output+attention --steps=1
    python -m launch.bench_training --mesh=context=2 --nofull                   # on two devices
    python -m launch.bench_training --topology=h100:1                           # only compiles, on any machine

For each length it trains the same model, a batch of `--batch_size` rows of one document each, with gists at each ratio
and with full attention (cuDNN's on GPUs): forward, backward, clipping and AdamW; parameters and moments in bfloat16. A
step's time is the median of `--steps` steps after one that warms up. MFU counts useful operations alone
(`unigist_jax/training/flops.py`) against the vendor's dense bf16 peak; memory is what the compiled program takes of one
device. Every case begins with the same weights and tokens, whatever the mesh, so losses and gradient norms compare.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from launch.flags import output_folder, run_main, whole_numbers
from unigist_jax.config import DataConfig, MeshConfig, OptimConfig, RunConfig, TrainConfig
from unigist_jax.layout import GistLayout
from unigist_jax.model import LlamaConfig
from unigist_jax.model.shapes import SHAPES, named_shape
from unigist_jax.sharding import MESH_AXES, batch_sharding, make_mesh
from unigist_jax.training.ahead_of_time import (
    GIB,
    Target,
    abstract_batch,
    compile_step,
    describe,
    find_target,
    program_bytes,
)
from unigist_jax.training.flops import peak_flops
from unigist_jax.training.step import Batch, abstract_state, make_state, make_train_step

SHAPE = flags.DEFINE_string("shape", "llama3.2-3b", f"model: tiny, {', '.join(SHAPES)}")
LENGTHS = flags.DEFINE_list("lengths", ["32768", "131072"], "raw tokens of a row")
RATIOS = flags.DEFINE_list("ratios", ["4", "8"], "raw tokens per gist; empty: full attention alone")
FULL = flags.DEFINE_bool("full", True, "time full attention too")
REMAT = flags.DEFINE_list(
    "remat", ["attention", "full"], "model.remat of each length (docs/training.md); A+B+C: of full attention and ratios"
)
BATCH = flags.DEFINE_integer("batch_size", 1, "rows of a step", lower_bound=1)
MESH = flags.DEFINE_list("mesh", [], f"devices along mesh axes, as fsdp=2,context=2 (of {', '.join(MESH_AXES)})")
LAYERS = flags.DEFINE_integer("layers", None, "another number of layers than the shape's", lower_bound=1)
SINKS = flags.DEFINE_integer("sinks", 128, "sinks", lower_bound=0)
WINDOW = flags.DEFINE_integer("window", 128, "local window in raw tokens", lower_bound=0)
CHUNK = flags.DEFINE_integer("loss_chunk", 2048, "raws whose logits exist at a time", lower_bound=1)
BACKEND = flags.DEFINE_string("backend", None, "attention backend (default: the best one here)")
STEPS = flags.DEFINE_list("steps", ["5", "2"], "timed steps at each length")
TOPOLOGY = flags.DEFINE_string("topology", None, "compile for these devices instead of running: h100:1, h200:2")
OUT = flags.DEFINE_string("out", None, "directory for the raw JSON and the table")


LOWERING = threading.Lock()
COLUMNS = ("raws", "attention", "remat", "step ms", "tokens/s", "over full", "MFU", "memory GiB")


def shape() -> LlamaConfig:
    """The model of the flags, in bfloat16 throughout."""
    config = named_shape(SHAPE.value)
    layers = LAYERS.value or config.num_layers
    return dataclasses.replace(config, num_layers=layers, param_dtype="bfloat16", dtype="bfloat16")


def mesh_config() -> MeshConfig:
    """The mesh of the flags: one device, but for the axes that are named."""
    sizes = dict.fromkeys(MESH_AXES, 1)
    for entry in MESH.value:
        axis, _, size = entry.partition("=")
        if axis not in sizes or not size.isdecimal() or not int(size):
            raise ValueError(f"--mesh={entry}: write AXIS=DEVICES, AXIS one of {', '.join(MESH_AXES)}")
        sizes[axis] = int(size)
    return MeshConfig(**sizes)


def make_run(length: int, ratio: int | None, remat: str) -> RunConfig:
    """The run of a case; `ratio` None: full attention."""
    attention = {"attention": "full"} if ratio is None else {"attention_backend": BACKEND.value}
    return RunConfig(
        model=dataclasses.replace(shape(), remat=remat, **attention),
        gist=GistLayout(ratio or 4, SINKS.value, WINDOW.value),
        data=DataConfig(row_length=length),
        optim=OptimConfig(peak_lr=1e-5, state_dtype="bfloat16"),
        train=TrainConfig(batch_size=BATCH.value, loss_chunk=CHUNK.value),
        mesh=mesh_config(),
    )


def compile_case(run: RunConfig) -> tuple[jax.sharding.Mesh, Any, float]:
    """The mesh of a run on this machine's first devices, its step for rows of one document, the compiler's seconds."""
    sizes = dataclasses.asdict(run.mesh)
    mesh = make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])
    with LOWERING, jax.set_mesh(mesh):
        batch = abstract_batch(run, mesh, packed=False)
        lowered = make_train_step(run, mesh).lower(abstract_state(run, mesh), batch)
    begin = time.perf_counter()
    return mesh, lowered.compile(), time.perf_counter() - begin


def measure(run: RunConfig, mesh: jax.sharding.Mesh, step: Any, steps: int) -> dict:
    """Times a run's compiled step on random tokens."""
    devices = mesh.devices.ravel()
    with jax.set_mesh(mesh):
        state = make_state(run, mesh)
        size = run.train.batch_size, run.data.row_length
        tokens = jax.random.randint(jax.random.key(0), size, 0, run.model.vocab_size, jnp.int32)
        batch = Batch(tokens, None, jnp.ones(size, bool).at[:, -1].set(False))
        batch = jax.device_put(batch, batch_sharding(mesh))
        times, losses, norms = [], [], []
        for _ in range(1 + steps):
            begin = time.perf_counter()
            state, metrics = step(state, batch)
            metrics = {name: float(value) for name, value in metrics.items()}  # waits for the step
            times.append(time.perf_counter() - begin)
            losses.append(metrics["loss"])
            norms.append(metrics["grad_norm"])
    seconds = statistics.median(times[1:])
    peak = peak_flops(devices[0])
    return {
        "seconds": seconds,
        "all_seconds": times,
        "tokens_per_second": tokens.size / seconds,
        "useful_flops": metrics["flops"],
        "mfu": metrics["flops"] / seconds / peak / len(devices) if peak else None,
        "losses": losses,
        "grad_norms": norms,
        "bytes": program_bytes(step),
        "allocator_peak_bytes": (devices[0].memory_stats() or {}).get("peak_bytes_in_use"),  # of the process so far
    }


def table(rows: list[dict]) -> str:
    """A Markdown table of the cases, each beside full attention at its length."""
    full = {row["length"]: row.get("seconds") for row in rows if row["ratio"] is None}
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        name = "full" if row["ratio"] is None else f"gist r={row['ratio']}"
        cells = [f"{row['length']:,}", name, row["remat"]]
        if "reason" in row:
            cells += [row["reason"], *[""] * 4]
        else:
            beside = full.get(row["length"])
            cells += [f"{1e3 * row['seconds']:,.0f}", f"{row['tokens_per_second']:,.0f}"]
            cells.append(f"{beside / row['seconds']:.2f}x" if beside else "")
            cells.append(f"{row['mfu']:.1%}" if row["mfu"] else "")
            cells.append(f"{row['bytes']['total'] / GIB:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is timed: rows of `length` raws at a `ratio` (None: full attention), under a policy, in so many steps."""

    length: int
    ratio: int | None
    remat: str
    steps: int

    @property
    def run(self) -> RunConfig:
        return make_run(self.length, self.ratio, self.remat)


def find_cases() -> list[Case]:
    """The cases of the flags. Raises ValueError if the lists do not belong together."""
    lengths, all_steps = whole_numbers(LENGTHS), whole_numbers(STEPS)
    ratios = [*([None] if FULL.value else []), *whole_numbers(RATIOS)]
    if not lengths or not ratios:
        raise ValueError("nothing to time: give --lengths, and --ratios or --full")
    for name, values in (("remat", REMAT.value), ("steps", STEPS.value)):
        if len(values) != len(lengths):
            raise ValueError(f"--{name}={','.join(values)}: give one for each of --lengths={','.join(LENGTHS.value)}")
    cases = []
    for length, entry, steps in zip(lengths, REMAT.value, all_steps, strict=True):
        policies = entry.split("+")
        if len(policies) not in (1, len(ratios)):
            raise ValueError(f"--remat={entry}: give one policy, or {len(ratios)} joined by +, as there are cases")
        policies = policies * len(ratios) if len(policies) == 1 else policies
        cases += [Case(length, ratio, remat, steps) for ratio, remat in zip(ratios, policies, strict=True)]
    return cases


def results(cases: list[Case], target: Target | None) -> Iterator[tuple[Case, dict]]:
    """Each case's result, all compiled side by side before the first is timed; one that fails leaves the others be."""
    runs = [case.run for case in cases]
    if target:
        for case, run in zip(cases, runs, strict=True):
            yield case, attempt(compile_step, run, target, packed=False)
        return
    with ThreadPoolExecutor(len(cases)) as pool:
        programs = [pool.submit(compile_case, run) for run in runs]
    for case, run in zip(cases, runs, strict=True):
        yield case, attempt(timed, run, programs.pop(0), case.steps)
        gc.collect()


def timed(run: RunConfig, program: Future, steps: int) -> dict:
    """`measure` of a program that has been compiled beside the others."""
    mesh, step, seconds = program.result()
    return measure(run, mesh, step, steps) | {"compile_seconds": seconds}


def attempt(function: Callable[..., dict], *arguments: Any, **options: Any) -> dict:
    """What the function returns, or the `reason` why it failed."""
    try:
        return function(*arguments, **options)
    except Exception as error:
        return {"reason": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def main(_: list[str]) -> None:
    cases = find_cases()
    folder = output_folder(OUT.value) if OUT.value else None
    target = find_target(TOPOLOGY.value) if TOPOLOGY.value else None
    result = {
        "command": " ".join(["python -m launch.bench_training", *sys.argv[1:]]),
        "jax": jax.__version__,
        "device": (target.devices[0] if target else jax.devices()[0]).device_kind,
        "shape": dataclasses.asdict(shape()),
        "batch_size": BATCH.value,
        "mesh": {axis: size for axis, size in dataclasses.asdict(mesh_config()).items() if size > 1},
        "rows": [],
    }
    print(f"{result['device']}, jax {result['jax']}", flush=True)
    for case, row in results(cases, target):
        result["rows"].append({"length": case.length, "ratio": case.ratio, "remat": case.remat, **row})
        print(describe(row) if "target" in row else table(result["rows"]).splitlines()[-1], flush=True)
        if folder:
            (folder / "bench_training.json").write_text(json.dumps(result, indent=1) + "\n")
            if not target:
                (folder / "bench_training.md").write_text(table(result["rows"]) + "\n")
    if not target:
        print(table(result["rows"]))


if __name__ == "__main__":
    run_main(main)
