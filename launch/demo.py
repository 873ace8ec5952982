"""The whole way on a CPU in about five minutes: train, evaluate, generate, report. `make demo` runs it.

  python -m launch.demo --output=demo

Runs the project's own commands, each as a user would type it, and writes OUTPUT/report.md with what they printed.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from absl import flags

from launch.flags import run_main
from unigist_jax.config import RunConfig
from unigist_jax.data.corpus import load_documents
from unigist_jax.evals import plots
from unigist_jax.inference import GistCache, full_cache_bytes
from unigist_jax.layout import GistLayout
from unigist_jax.training.checkpoint import load_trained
from unigist_jax.training.metrics import read_metrics

_OUTPUT = flags.DEFINE_string("output", "demo", "directory of the run, its evaluation and the report")
_STEPS = flags.DEFINE_integer("steps", None, "train.steps in place of the config's", lower_bound=2)

LENGTH, CHUNK = 512, 128
PROMPT_CHARACTERS = 6000
CACHE_TOKENS = (1024, 4096, 16384, 65536, 131072)


class Ran(NamedTuple):
    """A command of the demo: how it is typed, how long it took, what it printed."""

    command: str
    seconds: float
    output: str


def run_command(module: str, *options: str) -> Ran:
    """Runs `python -m launch.module` in this interpreter's environment, its output shown as it comes."""
    command = [sys.executable, "-m", f"launch.{module}", *options]
    shown = shlex.join(["python", *command[1:]])
    print(f"\n$ {shown}", flush=True)
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise ValueError(f"`{shown}` failed with exit code {process.returncode}; its message stands above")
    return Ran(shown, time.perf_counter() - began, "".join(lines))


def long_prompt(run: RunConfig, path: Path) -> None:
    """Writes the beginning of the first held-out document that is long enough."""
    data = run.data
    texts = load_documents(data.source, split="heldout", heldout_fraction=data.heldout_fraction)["text"]
    text = next((text for text in texts if len(text) > 2 * PROMPT_CHARACTERS), max(texts, key=len))
    cut = text[:PROMPT_CHARACTERS]
    path.write_text(cut[: cut.rfind("\n") + 1])


def cache_curves(model, layout: GistLayout) -> dict[str, tuple[list[int], list[int]]]:
    """Bytes of caches as allocated, by tokens: full attention, and gists at ratios 4 and 8."""
    tokens = list(CACHE_TOKENS)
    curves = {"full attention": (tokens, [full_cache_bytes(model.config, n) for n in tokens])}
    for ratio in (4, 8):
        at_ratio = layout.with_ratio(ratio)
        curves[f"gists, r = {ratio}"] = (tokens, [GistCache.create(model, 1, n, at_ratio).nbytes for n in tokens])
    return curves


def main(_: list[str]) -> None:
    began = time.perf_counter()
    output = Path(_OUTPUT.value)
    workdir = output / "run"
    steps = [f"--config.train.steps={_STEPS.value}"] if _STEPS.value else []
    commands = [run_command("train", "--config=configs/tiny.py", f"--workdir={workdir}", *steps)]
    sizes = [f"--lengths={LENGTH}", f"--chunk_size={CHUNK}", "--records=16", "--documents=24", "--rows=32"]
    evaluate = "evaluate", f"--workdir={workdir}", "--method=unigist,full", *sizes, f"--output={output / 'eval'}"
    commands.append(run_command(*evaluate))

    run, model, step = load_trained(workdir)
    prompt = output / "prompt.py"
    long_prompt(run, prompt)
    generate = "generate", f"--workdir={workdir}", f"--prompt_file={prompt}", "--max_new_tokens=96"
    commands.append(run_command(*generate, "--temperature=0.7", "--top_p=0.9", f"--chunk_size={CHUNK}"))
    cache = output / "prompt.cache"
    compress = "compress", f"--workdir={workdir}", f"--document={prompt}", f"--output={cache}"
    commands.append(run_command(*compress, f"--chunk_size={CHUNK}"))
    ask = "generate", f"--workdir={workdir}", f"--cache={cache}", "--max_new_tokens=24", "--temperature=0.7"
    commands.append(run_command(*ask, "--prompt=def ", "--prompt=class "))

    curves = cache_curves(model, run.gist)
    plots.plot_loss(read_metrics(workdir), output / "loss.png")
    plots.plot_cache_bytes(curves, output / "cache_bytes.png")
    report = write_report(output, run, step, commands, curves, time.perf_counter() - began)
    (output / "report.md").write_text(report)
    print(f"\nreport: {output / 'report.md'}")


REPORT = """\
# UniGist on a CPU: train, compress, evaluate, generate

Python {python}, {versions}; CPU cores: {cores}; {seconds:.0f} s in all.

A Llama of {model.num_layers} layers of {model.hidden_size}, ratio {gist.ratio}, {gist.num_sinks} sinks, window
{gist.window}, trained from random weights for {step} steps of {train.batch_size} rows of {data.row_length} tokens
(seed {train.seed}) on this interpreter's standard library; {data.recall_weight:.0%} of the rows are synthetic recall
records.

## Training

Loss {first_loss:.3f} at the first step, {last_loss:.3f} at the last.

![loss](loss.png)

## Held-out perplexity

| attention | perplexity | targets |
|---|---|---|
{perplexity_rows}

The same weights under both. They were trained with gists, so full attention is foreign to them.

## Perplexity by position: the boundary test

{boundary[documents]} held-out documents of {boundary[length]} tokens, read through the compressed cache in chunks of
{boundary[chunk_size]} (full attention in one pass). Read in one pass instead, no position's loss differs by more than
{unigist[largest_difference_to_one_pass]:.1e} nats: chunk borders do not exist for the method. (The 16 tokens after a
border cost {unigist[border_jump]:+.3f} nats more than the 16 before; that is the text's doing.)

![perplexity by position](eval/boundary.png)

## Recall

| records | whole answers | answer tokens |
|---|---|---|
{recall_rows}

![recall by depth](eval/recall.png)

## KV cache

Bytes as allocated for one sequence of this model.

| tokens | {cache_names} |
|---|{cache_rules}
{cache_rows}

![cache bytes](cache_bytes.png)

## Text generated from a compressed prompt

```
{generated}
```

## A document compressed once, asked twice

```
{compressed}
{asked}
```

## What a model this small can and cannot do

It has seen about {tokens_seen:,} tokens. It writes strings that look like Python and does not understand them. Nor has
it learned to recall: whole answers are out of its reach, and a digit guessed at random is right one time in ten. What
is shown is that the machinery is whole: the cache really drops raws, memory really shrinks, and chunking changes
nothing. How well gists carry content is a question for longer training of larger models.

## Commands

{commands}
"""


def write_report(output: Path, run: RunConfig, step: int, commands: list[Ran], curves, seconds: float) -> str:
    """The report, in Markdown."""

    def result(suite):
        return json.loads((output / "eval" / f"{suite}.json").read_text())

    losses = [line["loss"] for line in read_metrics(output / "run") if "loss" in line]
    perplexities, recalls, boundary = result("perplexity")["methods"], result("recall")["results"], result("boundary")
    *_, generated, compressed, asked = commands
    sizes = zip(*(curve for _, curve in curves.values()), strict=True)
    return REPORT.format(
        python=platform.python_version(),
        versions=", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "optax")),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        seconds=seconds,
        model=run.model,
        gist=run.gist,
        train=run.train,
        data=run.data,
        step=step,
        first_loss=losses[0],
        last_loss=losses[-1],
        perplexity_rows="\n".join(
            f"| {name} | {r['perplexity']:.2f} | {r['targets']:,.0f} |" for name, r in perplexities.items()
        ),
        boundary=boundary,
        unigist=boundary["methods"]["unigist"],
        recall_rows="\n".join(
            f"| {name} | {r['accuracy']:.2f} of {r['samples']} | {r['token_accuracy']:.2f} |"
            for name, r in recalls.items()
        ),
        cache_names=" | ".join(curves),
        cache_rules="---|" * len(curves),
        cache_rows="\n".join(
            f"| {tokens:,} | " + " | ".join(f"{size:,}" for size in row) + " |"
            for tokens, row in zip(CACHE_TOKENS, sizes, strict=True)
        ),
        generated=generated.output.rstrip(),
        compressed=compressed.output.rstrip(),
        asked=asked.output.rstrip(),
        tokens_seen=step * run.train.batch_size * run.data.row_length,
        commands="\n".join(f"- `{ran.command}` ({ran.seconds:.0f} s)" for ran in commands),
    )


if __name__ == "__main__":
    run_main(main)
