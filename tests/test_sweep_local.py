"""`launch.sweep` on this machine, as a user types it: real runs of launch.train, failures, Ctrl-C, going on."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import quick_environment, without_speed, write_quick_config

from unigist_jax.sweeps.state import SweepDirectory
from unigist_jax.training.metrics import read_metrics

ROOT = Path(__file__).parent.parent
LONG = 600  # steps of a run that is interrupted

MIXED = """
def sweep(add):
    add(**{"gist.num_sinks": 0})
    add(name="absent", **{"data.source": SOURCE})
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a corpus and a config of 4 steps."""
    folder = tmp_path_factory.mktemp("files")
    write_quick_config(folder, 4)
    return folder


def start(files, sweep, output, *flags):
    command = [sys.executable, "-m", "launch.sweep", f"--config={files}/config.py", f"--sweep={sweep}"]
    command += [f"--output={output}", "--platform=cpu", "--train_flag=--notensorboard", *flags]
    environment = os.environ | quick_environment(files) | {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process):
    """Exit code and output."""
    try:
        return process.communicate(timeout=200)[0], process.returncode
    finally:
        process.kill()


def states(directory):
    return {name: record.state for name, record in directory.read().items()}


def test_a_failed_run_is_shown_and_tried_again_alone(files, tmp_path):
    """One run fails, the other is done; with the cause away, only the failed one runs again."""
    sweep, directory = tmp_path / "sweep.py", SweepDirectory(tmp_path / "out")
    sweep.write_text(MIXED.replace("SOURCE", "'/absent'"))
    said, code = finish(start(files, sweep, directory.path, "--jobs=2"))
    assert code == 1, said
    assert re.search(
        r"absent: failed with exit code 2; .*absent/log.txt ends:\n +error: '/absent' is neither a file nor", said
    ), said
    assert "num_sinks=0: done" in said and "2 runs: 1 failed, 1 done" in said, said
    assert states(directory) == {"num_sinks=0": "done", "absent": "failed"}
    done = (directory.workdir("num_sinks=0") / "metrics.jsonl").stat()

    sweep.write_text(MIXED.replace("SOURCE", repr(str(files / "corpus"))))
    said, code = finish(start(files, sweep, directory.path))
    assert code == 0 and "num_sinks=0: begins" not in said and "absent: done" in said, said
    assert states(directory) == {"num_sinks=0": "done", "absent": "done"}
    assert (directory.workdir("num_sinks=0") / "metrics.jsonl").stat() == done

    said, code = finish(start(files, sweep, directory.path, "--status", "--collect"))
    assert code == 0 and re.search(r"num_sinks=0 +done +4/4 +\d\.\d{4} +\d\.\d{4}", said), said
    assert re.search(r"\| absent \| done \| 4 \| 2 \| /.*corpus \| \d", said), said
    lines = (directory.path / "results.csv").read_text().splitlines()
    assert lines[0].startswith("run,state,step,gist.num_sinks,data.source,loss,heldout_loss") and len(lines) == 3
    assert (directory.path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_ends_the_runs_which_then_go_on_where_they_were(files, tmp_path):
    """The same run twice, one of them interrupted: the losses are the same."""
    sweep = tmp_path / "sweep.py"
    sweep.write_text('def sweep(add):\n    add(name="one")\n    add(name="other")\n')
    directory = SweepDirectory(tmp_path / "out")
    flags = f"--config.train.steps={LONG}", f"--config.train.eval_every={LONG}", "--jobs=1"
    process = start(files, sweep, directory.path, *flags)
    deadline = time.monotonic() + 120
    while directory.progress("one").step < 20:
        assert process.poll() is None and time.monotonic() < deadline, finish(process)
        time.sleep(0.02)

    process.send_signal(signal.SIGINT)
    said, code = finish(process)
    assert code == 130 and "run the same command again to go on" in said and "Traceback" not in said, said
    assert not directory.is_locked()  # and so no run is left
    reached = directory.progress("one").step
    if reached < LONG:  # it may have ended by itself meanwhile
        assert states(directory) == {"one": "stopped", "other": "pending"}
        assert f"ended at step {reached} of {LONG} on SIGTERM" in directory.log("one").read_text()
        assert [path.name for path in (directory.workdir("one") / "checkpoints").iterdir()] == [str(reached)]

    said, code = finish(start(files, sweep, directory.path, *flags, "--jobs=2"))
    assert code == 0 and "2 runs: 2 done" in said, said
    one, other = (without_speed(read_metrics(directory.workdir(name))) for name in ("one", "other"))
    assert [line["step"] for line in one] == [*range(1, LONG + 1), LONG]
    assert one == other
