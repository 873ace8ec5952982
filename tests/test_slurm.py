"""A sweep on a real Slurm, started here: an array of two runs of two processes each, one of them preempted twice."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_cluster import running_cluster, wait_until, why_not
from tiny_runs import quick_environment, without_speed, write_quick_config

from unigist_jax.sweeps.state import SweepDirectory
from unigist_jax.training.metrics import read_metrics

ROOT = Path(__file__).parent.parent
STEPS = 400

SWEEP = """
def sweep(add):
    for name in ("uninterrupted", "preempted"):
        add(name=name, **{"optim.peak_lr": 3e-3})
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    with running_cluster(folder) as environment:
        yield environment | quick_environment(folder) | {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    write_quick_config(folder, STEPS)
    (folder / "sweep.py").write_text(SWEEP)
    return folder


def sweep(environment, files, output, *flags):
    """Runs `launch.sweep` and returns what it printed, and its exit code."""
    command = [sys.executable, "-m", "launch.sweep", f"--config={files}/config.py", f"--sweep={files}/sweep.py"]
    command += [f"--output={output}", "--executor=slurm", "--slurm_tasks_per_node=2", "--platform=cpu", *flags]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    return done.stdout + done.stderr, done.returncode


def test_a_preempted_run_is_requeued_and_ends_with_the_losses_of_an_uninterrupted_one(cluster, files, tmp_path):
    directory = SweepDirectory(tmp_path / "sweep")
    said, code = sweep(cluster, files, directory.path)
    assert code == 0 and "submitted 2 runs as array" in said, said
    records = directory.read()
    assert {record.state for record in records.values()} == {"queued"}
    task = records["preempted"].job

    def slurm(*command):
        done = subprocess.run(command, env=cluster, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def reached(name, step):
        """Waits until a run has done a step."""
        wait_until(lambda: directory.progress(name).step >= step, 120, f"{name} does not reach step {step}", tmp_path)

    reached("preempted", 2)
    slurm("scancel", "--signal=TERM", task)  # as Slurm does some time before the time limit
    exit_code = directory.workdir("preempted") / "exit_code"
    wait_until(exit_code.exists, 60, "the run does not end on SIGTERM", tmp_path)
    first = directory.progress("preempted").step
    assert 2 <= first < STEPS and exit_code.read_text() == "75\n"
    assert [path.name for path in (directory.workdir("preempted") / "checkpoints").iterdir()] == [str(first)]

    reached("preempted", first + 2)  # it has put itself back into the queue, and goes on
    slurm("scontrol", "requeue", task)  # as Slurm does for a job of higher priority
    wait_until(
        lambda: "PENDING" in slurm("squeue", "--array", f"--jobs={task}", "--noheader", "--format=%T"),
        60, "the task is not requeued", tmp_path,
    )  # fmt: skip
    second = directory.progress("preempted").step
    assert first + 2 <= second < STEPS
    said, code = sweep(cluster, files, directory.path)
    assert code == 0 and "submitted" not in said and re.search(r"preempted +(queued|running)", said), said

    for name in records:
        wait_until((directory.workdir(name) / "exit_code").exists, 120, f"{name} does not end", tmp_path)
        reached(name, STEPS)
    wait_until(lambda: not slurm("squeue", "--noheader"), 30, "the queue does not empty", tmp_path)
    said, code = sweep(cluster, files, directory.path, "--status", "--collect")
    assert code == 0 and "2 runs: 2 done" in said, said
    assert {record.state for record in directory.read().values()} == {"done"}
    log = directory.log("preempted").read_text()
    assert f"ended at step {first} of {STEPS} on SIGTERM" in log and f"ended at step {second} of" in log
    alone, interrupted = (
        without_speed(read_metrics(directory.workdir(name))) for name in ("uninterrupted", "preempted")
    )
    assert [line["step"] for line in alone if "loss" in line] == list(range(1, STEPS + 1))
    assert interrupted == alone

    said, code = sweep(cluster, files, directory.path)  # nothing is left to do
    assert code == 0 and "submitted" not in said and "2 runs: 2 done" in said, said


def test_a_queue_that_refuses_leaves_the_runs_pending(cluster, files, tmp_path):
    said, code = sweep(cluster, files, tmp_path / "sweep", "--slurm_partition=absent")
    assert code == 2 and re.search(r"error: Slurm refused the sweep: .*invalid partition.*--slurm_ flags", said), said
    assert {record.state for record in SweepDirectory(tmp_path / "sweep").read().values()} == {"pending"}


def test_a_run_that_fails_shows_it(cluster, files, tmp_path):
    (files / "failing.py").write_text('def sweep(add):\n    add(name="absent", **{"data.source": "/absent"})\n')
    said, code = sweep(cluster, files, tmp_path / "sweep", f"--sweep={files}/failing.py", "--slurm_tasks_per_node=1")
    directory = SweepDirectory(tmp_path / "sweep")
    assert code == 0, said
    wait_until((directory.workdir("absent") / "exit_code").exists, 60, "the run does not end", tmp_path)

    def failed():
        said, code = sweep(cluster, files, directory.path, "--status")
        shown = r"absent +failed +0/\d+ +exit code 2.*error: '/absent' is neither a file nor a folder"
        return code == 0 and re.search(shown, said, re.DOTALL)

    wait_until(failed, 30, "the run is not seen to fail", tmp_path)


def test_without_slurm_the_remedy_is_said(files, tmp_path):
    environment = os.environ | {"PATH": str(tmp_path)}
    said, code = sweep(environment, files, tmp_path / "sweep")
    assert code == 2 and re.search(r"error: sbatch is not on the PATH.*--executor=local", said), said
