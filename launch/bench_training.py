"""Benchmark of the training step on one accelerator: UniGist against full attention in the same code, random tokens.

    python -m launch.bench_training --out=DIR                                   # DIR/bench_training.{json,md}
    python -m launch.bench_training --lengths=32768 --ratios=4 --remat=attention --steps=5
    python -m launch.bench_training --topology=h100:1                           # only compiles, on any machine

For each length it trains the same model, a batch of `--batch_size` rows of one document each, with gists at each ratio
and with full attention (cuDNN's on GPUs): forward, backward, clipping and AdamW; parameters and moments in bfloat16. A
step's time is the median of `--steps` steps after one that warms up. MFU counts useful operations alone
(`unigist_jax/training/flops.py`) against the vendor's dense bf16 peak; memory is what the compiled program takes.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags

from launch.flags import run_main
from unigist_jax.config import DataConfig, MeshConfig, OptimConfig, RunConfig, TrainConfig
from unigist_jax.layout import GistLayout
from unigist_jax.model import LlamaConfig
from unigist_jax.model.shapes import SHAPES
from unigist_jax.sharding import make_mesh
from unigist_jax.training.ahead_of_time import GIB, compile_step, describe, find_target, program_bytes
from unigist_jax.training.flops import peak_flops
from unigist_jax.training.step import Batch, make_state, make_train_step

TINY = LlamaConfig(512, 64, 128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, tie_embeddings=True)

SHAPE = flags.DEFINE_string("shape", "llama3.2-3b", f"model: tiny, {', '.join(SHAPES)}")
LENGTHS = flags.DEFINE_list("lengths", ["32768", "131072"], "raw tokens of a row")
RATIOS = flags.DEFINE_list("ratios", ["4", "8"], "raw tokens per gist; empty: full attention alone")
FULL = flags.DEFINE_bool("full", True, "time full attention too")
REMAT = flags.DEFINE_list("remat", ["attention", "full"], "model.remat of each length (docs/training.md)")
BATCH = flags.DEFINE_integer("batch_size", 1, "rows of a step", lower_bound=1)
LAYERS = flags.DEFINE_integer("layers", None, "another number of layers than the shape's", lower_bound=1)
SINKS = flags.DEFINE_integer("sinks", 128, "sinks", lower_bound=0)
WINDOW = flags.DEFINE_integer("window", 128, "local window in raw tokens", lower_bound=0)
CHUNK = flags.DEFINE_integer("loss_chunk", 2048, "raws whose logits exist at a time", lower_bound=1)
BACKEND = flags.DEFINE_string("backend", None, "attention backend (default: the best one here)")
STEPS = flags.DEFINE_list("steps", ["5", "2"], "timed steps at each length")
TOPOLOGY = flags.DEFINE_string("topology", None, "compile for these devices instead of running: h100:1, h200:1")
OUT = flags.DEFINE_string("out", None, "directory for the raw JSON and the table")


COLUMNS = ("raws", "attention", "remat", "step ms", "tokens/s", "over full", "MFU", "memory GiB")


def shape() -> LlamaConfig:
    """The model of the flags, in bfloat16 throughout."""
    if SHAPE.value != "tiny" and SHAPE.value not in SHAPES:
        raise ValueError(f"--shape={SHAPE.value} is unknown; choose among tiny, {', '.join(SHAPES)}")
    config = TINY if SHAPE.value == "tiny" else SHAPES[SHAPE.value]
    layers = LAYERS.value or config.num_layers
    return dataclasses.replace(config, num_layers=layers, param_dtype="bfloat16", dtype="bfloat16")


def make_run(length: int, ratio: int | None, remat: str) -> RunConfig:
    """The run of a case; `ratio` None: full attention."""
    attention = {"attention": "full"} if ratio is None else {"attention_backend": BACKEND.value}
    return RunConfig(
        model=dataclasses.replace(shape(), remat=remat, **attention),
        gist=GistLayout(ratio or 4, SINKS.value, WINDOW.value),
        data=DataConfig(row_length=length),
        optim=OptimConfig(peak_lr=1e-5, state_dtype="bfloat16"),
        train=TrainConfig(batch_size=BATCH.value, loss_chunk=CHUNK.value),
        mesh=MeshConfig(),
    )


def measure(run: RunConfig, steps: int) -> dict:
    """Times a run's step on random tokens on the first device."""
    device = jax.devices()[0]
    mesh = make_mesh(devices=[device])
    with jax.set_mesh(mesh):
        state = make_state(run, mesh)
        size = run.train.batch_size, run.data.row_length
        tokens = jax.random.randint(jax.random.key(0), size, 0, run.model.vocab_size, jnp.int32)
        batch = Batch(tokens, None, jnp.ones(size, bool).at[:, -1].set(False))
        begin = time.perf_counter()
        step = make_train_step(run, mesh).lower(state, batch).compile()
        compiled = time.perf_counter() - begin
        times = []
        for _ in range(1 + steps):
            begin = time.perf_counter()
            state, metrics = step(state, batch)
            metrics = {name: float(value) for name, value in metrics.items()}  # waits for the step
            times.append(time.perf_counter() - begin)
    seconds = statistics.median(times[1:])
    peak = peak_flops(device)
    return {
        "seconds": seconds,
        "all_seconds": times,
        "tokens_per_second": tokens.size / seconds,
        "useful_flops": metrics["flops"],
        "mfu": metrics["flops"] / seconds / peak if peak else None,
        "loss": metrics["loss"],
        "bytes": program_bytes(step),
        "allocator_peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),  # of the process so far
        "compile_seconds": compiled,
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


def main(_: list[str]) -> None:
    lengths = [int(x) for x in LENGTHS.value]
    for name, values in (("remat", REMAT.value), ("steps", STEPS.value)):
        if len(values) != len(lengths):
            raise ValueError(f"--{name}={','.join(values)}: give one for each of --lengths={','.join(LENGTHS.value)}")
    ratios = [*([None] if FULL.value else []), *map(int, RATIOS.value)]
    target = find_target(TOPOLOGY.value) if TOPOLOGY.value else None
    result = {
        "command": " ".join(["python -m launch.bench_training", *sys.argv[1:]]),
        "jax": jax.__version__,
        "device": (target.devices[0] if target else jax.devices()[0]).device_kind,
        "shape": dataclasses.asdict(shape()),
        "batch_size": BATCH.value,
        "rows": [],
    }
    print(f"{result['device']}, jax {result['jax']}", flush=True)
    for length, remat, steps in zip(lengths, REMAT.value, STEPS.value, strict=True):
        for ratio in ratios:
            run = make_run(length, ratio, remat)
            row = {"length": length, "ratio": ratio, "remat": remat}
            try:
                row |= compile_step(run, target, packed=False) if target else measure(run, int(steps))
            except Exception as error:  # a case that does not fit or does not compile must not take the others along
                row["reason"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            result["rows"].append(row)
            print(describe(row) if target and "bytes" in row else table([row]).splitlines()[-1], flush=True)
            gc.collect()
            if OUT.value:
                folder = Path(OUT.value)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "bench_training.json").write_text(json.dumps(result, indent=1) + "\n")
                if not target:
                    (folder / "bench_training.md").write_text(table(result["rows"]) + "\n")
    if not target:
        print(table(result["rows"]))


if __name__ == "__main__":
    run_main(main)
