"""Evaluates every run of a sweep over methods, the training-free methods on its run `full`, and collects one table.
Runs called NAME,seed=N are averaged with the run NAME.

  python -m launch.compare --sweep=runs/llama_8m-methods_8m --tasks=needle,mk2 --lengths=512,1024 --chunk_size=256
  python -m launch.compare --workdirs=runs/full,runs/unigist --output=runs/compared --training_free=

Writes DIR/comparison.md (what each method recalls and holds, and its loss by place in a chunk), comparison.json and
three plots, DIR = --output or SWEEP/comparison. The evaluations lie below it, and samples that are there are not
computed again.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from absl import flags

from launch.flags import run_main, whole_numbers
from unigist_jax.evals import comparison, plots, recall
from unigist_jax.evals.comparison import FULL
from unigist_jax.inference.methods import TRAINING_FREE
from unigist_jax.sweeps.state import SweepDirectory
from unigist_jax.training.metrics import read_metrics

_SWEEP = flags.DEFINE_string("sweep", None, "directory of launch.sweep")
_WORKDIRS = flags.DEFINE_list("workdirs", None, "work directories of launch.train, instead of a sweep's")
_OUTPUT = flags.DEFINE_string("output", None, "directory of the results (default: SWEEP/comparison)")
_METHODS = flags.DEFINE_list("training_free", list(TRAINING_FREE), "training-free methods for the run `full`")
_TASKS = flags.DEFINE_list("tasks", ["needle", "mk2"], "recall tasks")
_LENGTHS = flags.DEFINE_list("lengths", ["1024", "2048"], "recall: tokens of records; the longest also of documents")
_RECORDS = flags.DEFINE_integer("records", 64, "recall: records of each task and length", lower_bound=1)
_DOCUMENTS = flags.DEFINE_integer("documents", 32, "perplexity by position: held-out documents", lower_bound=1)
_CHUNK_SIZE = flags.DEFINE_integer("chunk_size", 512, "raws of a prefill chunk; its borders are marked", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", 16, "sequences at a time", lower_bound=1)


@flags.multi_flags_validator(
    ["sweep", "workdirs", "output"], "give either --sweep, or --workdirs and where to write: --output"
)
def _one_source(values: dict) -> bool:
    return bool(values["sweep"]) != bool(values["workdirs"]) and bool(values["sweep"] or values["output"])


def main(_: list[str]) -> None:
    for flag, known in ((_TASKS, recall.TASKS), (_METHODS, TRAINING_FREE)):
        if unknown := sorted(set(flag.value) - set(known)):
            raise ValueError(f"--{flag.name}: unknown {unknown}; choose among {sorted(known)}")
    whole_numbers(_LENGTHS)
    workdirs = runs_of_sweep(Path(_SWEEP.value)) if _SWEEP.value else comparison.named(_WORKDIRS.value)
    output = Path(_OUTPUT.value) if _OUTPUT.value else Path(_SWEEP.value) / "comparison"
    if _METHODS.value and FULL not in map(comparison.without_seed, workdirs):
        print(f"no run is called {FULL!r}: without a model of full attention the training-free methods are left out")
    rows = []
    for name, workdir in workdirs.items():
        evaluate(workdir, output / name, [FULL, *_METHODS.value] if comparison.without_seed(name) == FULL else None)
        rows += comparison.rows_of_run(name, workdir, output / name)
    print(comparison.write(rows, _CHUNK_SIZE.value, output))
    plots.plot_training({name: read_metrics(workdir) for name, workdir in workdirs.items()}, output / "training.png")
    print(f"wrote {output}/comparison.md, comparison.json and plots")


def runs_of_sweep(path: Path) -> dict[str, Path]:
    """The sweep's runs and their work directories. Raises ValueError if any is not done."""
    directory = SweepDirectory(path)
    records = directory.read_existing()
    done = [name for name, record in records.items() if record.state == "done"]
    if len(done) < len(records):
        missing = sorted(set(records) - set(done))
        raise ValueError(f"{directory.path}: {', '.join(missing)} are not done; run launch.sweep again first")
    return {name: directory.workdir(name) for name in done}


def evaluate(workdir: Path, output: Path, methods: list[str] | None) -> None:
    """Runs launch.evaluate: perplexities of the run's own method, and recall of `methods` (None: its own)."""
    common = [f"--workdir={workdir}", f"--output={output}", f"--batch_size={_BATCH.value}"]
    common += [f"--chunk_size={_CHUNK_SIZE.value}", f"--lengths={','.join(_LENGTHS.value)}"]
    if flags.FLAGS.platform:
        common.append(f"--platform={flags.FLAGS.platform}")
    own = ["--suite=perplexity,boundary", f"--documents={_DOCUMENTS.value}"]
    recall = ["--suite=recall", f"--tasks={','.join(_TASKS.value)}", f"--records={_RECORDS.value}"]
    if methods is not None:
        recall.append(f"--method={','.join(methods)}")
    for options in (own, recall):
        command = [sys.executable, "-m", "launch.evaluate", *common, *options]
        if subprocess.run(command, check=False).returncode:
            raise ValueError(f"the evaluation of {workdir} failed; its message stands above")


if __name__ == "__main__":
    run_main(main)
