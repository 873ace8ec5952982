"""Evaluates every run of a sweep over methods, the training-free methods on its run `full`, and collects one table.

  python -m launch.compare --sweep=runs/llama_8m-methods_8m --tasks=needle,mk2 --lengths=512,1024 --chunk_size=256

Writes DIR/comparison.md, comparison.json and two plots, DIR = --output or SWEEP/comparison. The evaluations lie
below it, and samples that are there are not computed again.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from absl import flags

from launch.flags import run_main
from unigist_jax.evals import comparison
from unigist_jax.inference.methods import TRAINING_FREE
from unigist_jax.sweeps.state import SweepDirectory

FULL = "full"

_SWEEP = flags.DEFINE_string("sweep", None, "directory of launch.sweep", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "directory of the results (default: SWEEP/comparison)")
_METHODS = flags.DEFINE_list("training_free", list(TRAINING_FREE), "training-free methods for the run `full`")
_TASKS = flags.DEFINE_list("tasks", ["needle", "mk2"], "recall tasks")
_LENGTHS = flags.DEFINE_list("lengths", ["1024", "2048"], "recall: tokens of records; the longest also of documents")
_RECORDS = flags.DEFINE_integer("records", 64, "recall: records of each task and length", lower_bound=1)
_DOCUMENTS = flags.DEFINE_integer("documents", 32, "perplexity by position: held-out documents", lower_bound=1)
_CHUNK_SIZE = flags.DEFINE_integer("chunk_size", 512, "raws of a prefill chunk; its borders are marked", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", 16, "sequences at a time", lower_bound=1)


def main(_: list[str]) -> None:
    directory = SweepDirectory(Path(_SWEEP.value))
    records = directory.read_existing()
    done = [name for name, record in records.items() if record.state == "done"]
    if len(done) < len(records):
        missing = sorted(set(records) - set(done))
        raise ValueError(f"{directory.path}: {', '.join(missing)} are not done; run launch.sweep again first")
    output = Path(_OUTPUT.value) if _OUTPUT.value else directory.path / "comparison"
    rows = []
    for name in done:
        evaluate(directory.workdir(name), output / name, [FULL, *_METHODS.value] if name == FULL else None)
        rows += comparison.rows_of_run(name, directory.workdir(name), output / name)
    print(comparison.write(rows, _CHUNK_SIZE.value, output))
    print(f"wrote {output}/comparison.md, comparison.json and plots")


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
