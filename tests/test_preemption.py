"""SIGTERM to a run of two processes: both save the same step and ask to be started again, and then go on from it."""

import os
import signal
import time

import pytest
from test_multiprocess import TIMEOUT, free_port, start_training
from tiny_runs import quick_environment, write_quick_config

from unigist_jax.training.metrics import read_metrics
from unigist_jax.training.preemption import REQUEUE_EXIT_CODE

STEPS = 2000  # so many that the run is still at work when it hears of the signal, up to a second later


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    return write_quick_config(tmp_path_factory.mktemp("run"), STEPS)


@pytest.fixture(autouse=True)
def quick(config_file, monkeypatch):
    for name, value in quick_environment(config_file.parent).items():
        monkeypatch.setenv(name, value)


def two_processes(config_file, workdir, *flags):
    address = f"--coordinator_address=127.0.0.1:{free_port()}"
    return [
        start_training(config_file, workdir, 1, address, "--num_processes=2", f"--process_id={index}", *flags)
        for index in range(2)
    ]


def finish(processes):
    """Exit codes, and all that was printed."""
    try:
        logs = [process.communicate(timeout=TIMEOUT)[0] for process in processes]
        return [process.returncode for process in processes], "\n".join(logs)
    finally:
        for process in processes:
            process.kill()


def test_one_process_is_told_and_both_end_at_the_same_step(config_file, tmp_path):
    processes = two_processes(config_file, tmp_path / "preempted")
    deadline = time.monotonic() + TIMEOUT
    while len(read_metrics(tmp_path / "preempted")) < 2:
        assert all(process.poll() is None for process in processes), finish(processes)
        assert time.monotonic() < deadline, finish(processes)
        time.sleep(0.02)
    os.kill(processes[1].pid, signal.SIGTERM)
    codes, log = finish(processes)
    assert codes == [REQUEUE_EXIT_CODE] * 2, log
    step = read_metrics(tmp_path / "preempted")[-1]["step"]
    assert 2 <= step < STEPS
    assert log.count(f"ended at step {step} of {STEPS} on SIGTERM; run the same command again") == 2
    assert [path.name for path in (tmp_path / "preempted" / "checkpoints").iterdir()] == [str(step)]

    codes, log = finish(two_processes(config_file, tmp_path / "preempted", f"--stop_at_step={step + 5}"))
    assert codes == [0, 0], log
    steps = [line["step"] for line in read_metrics(tmp_path / "preempted") if "loss" in line]
    assert steps == list(range(1, step + 6))
