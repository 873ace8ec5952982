"""Sweep files, their checks, states, Slurm's script and the collected results; nothing is trained here."""

import csv
import dataclasses
import itertools
import json
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tiny_runs import tiny_config

from configs import micro
from unigist_jax.config import RunConfig
from unigist_jax.sweeps import collect, slurm
from unigist_jax.sweeps.local import LocalExecutor, slots, visible_gpus
from unigist_jax.sweeps.plan import plan, refreshed, train_command, unfinished
from unigist_jax.sweeps.slurm import SlurmResources, array_script
from unigist_jax.sweeps.spec import SweptRun, read_sweep, resolve
from unigist_jax.sweeps.state import RunRecord, SweepDirectory
from unigist_jax.training.checkpoint import claim_workdir

ROOT = Path(__file__).parent.parent


@pytest.fixture
def sweep_file(tmp_path):
    def write(*lines):
        path = tmp_path / "sweep.py"
        path.write_text("def sweep(add):\n" + "".join(f"    {line}\n" for line in lines))
        return path

    return write


@pytest.fixture
def directory(tmp_path):
    return SweepDirectory(tmp_path / "out")


# --- sweep files --------------------------------------------------------------------------------------------------


def test_runs_are_named_after_what_differs(sweep_file):
    runs = read_sweep(
        sweep_file(
            'add(**{"gist.ratio": 8, "optim.peak_lr": 1e-5})',
            'add(**{"data.source": "corpus/*.txt, other"})',
            'add(**{"a.size": 1, "b.size": 2})',
            'add(name="baseline", **{"train.seed": 1})',
            "add()",
        )
    )
    assert [run.name for run in runs] == [
        "ratio=8,peak_lr=1e-05", "source=corpus_.txt,_other", "a.size=1,b.size=2", "baseline", "base",
    ]  # fmt: skip
    assert runs[0].overrides == {"gist.ratio": 8, "optim.peak_lr": 1e-5} and runs[4].overrides == {}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["pass"], r"sweep.py: sweep\(add\) added no run"),
        (['add(**{"gist.ratio": 8})', 'add(**{"gist.ratio": 8})'], r"sweep.py, line 3: two runs are called 'ratio=8'"),
        (['add(name="../x")'], r"line 2: '../x' cannot name a run"),
        (['add(**{"gist.ratio": [2, 4]})'], r"line 2: gist.ratio=\[2, 4\] in run .* is no bool, number or string"),
        (["for ratio in 4:", "    add()"], r"line 2: TypeError: 'int' object is not iterable"),
        (["def"], r"SyntaxError"),
    ],
)
def test_bad_sweep_files_are_refused(lines, message, sweep_file):
    with pytest.raises(ValueError, match=message):
        read_sweep(sweep_file(*lines))


def test_a_file_that_is_no_sweep_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no sweep file"):
        read_sweep(tmp_path / "absent.py")
    (tmp_path / "config.py").write_text("sweep = 3\n")
    with pytest.raises(ValueError, match=r"it does not define sweep\(add\)"):
        read_sweep(tmp_path / "config.py")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optim.lr": 1e-5}, r"run 'r': there is no config field 'optim.lr'; did you mean 'optim.peak_lr'\?"),
        ({"ratio": 8}, r"no config field 'ratio'; did you mean 'gist.ratio'\?"),
        ({"gist": 8}, r"no config field 'gist'"),
        ({"gist.window": 6}, r"run 'r': .*window=6.*ratio=4"),
        ({"train.steps": 1e3}, r"run 'r': train.steps=1000.0 must be of type int"),
        ({"model.gist_init": "nothing"}, r"gist_init='nothing' is unknown.*'mean'"),
    ],
)
def test_overrides_that_the_config_does_not_take_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        resolve(tiny_config(), SweptRun("r", overrides))


def test_overrides_change_the_run_and_not_the_base():
    base = tiny_config()
    run = resolve(base, SweptRun("r", {"gist.ratio": 8, "optim.peak_lr": 1, "model.attention_backend": "blocked"}))
    assert (run.gist.ratio, run.optim.peak_lr, run.model.attention_backend) == (8, 1.0, "blocked")
    assert base.gist.ratio == 4 and base.model.attention_backend is None


@pytest.mark.parametrize(
    ("name", "field", "values"),
    [
        ("ratio", "gist.ratio", [2, 4, 8, 16]),
        ("sinks", "gist.num_sinks", [0, 4, 32, 128]),
        ("window", "gist.window", [0, 32, 64, 128, 256, 512]),
        ("learning_rate", "optim.peak_lr", [3e-4, 1e-3, 3e-3, 1e-2]),
        ("gist_init", "model.gist_init", ["normal", "normal", "mean", "tokens"]),
    ],
)
def test_the_ready_sweeps_fit_the_small_configs(name, field, values):
    runs = read_sweep(ROOT / "configs" / "sweeps" / f"{name}.py")
    assert [run.overrides[field] for run in runs] == values
    for run in runs:
        resolve(micro.get_config(), run)


# --- planning ------------------------------------------------------------------------------------------------------


def record(name, state="pending", job="", **overrides):
    return RunRecord(name, overrides, f"python -m launch.train --workdir={name}", 10, state, job)


def planned(directory, runs, known=(), base=None):
    commands = [train_command("c.py", directory, run, {"train.seed": 3}, ["--init_from=a b"]) for run in runs]
    return plan(directory, {r.name: r for r in known}, runs, base or tiny_config(), commands)


def test_commands_hold_what_is_common_and_what_is_the_runs_own(directory):
    runs = [SweptRun("a", {"gist.ratio": 8}), SweptRun("b", {"train.seed": 4})]
    records = planned(directory, runs)
    shared = ["python", "-m", "launch.train", "--config=c.py"]
    for name, own in (("a", ["--config.train.seed=3", "--config.gist.ratio=8"]), ("b", ["--config.train.seed=4"])):
        expected = [*shared, f"--workdir={directory.path}/runs/{name}", "--noprogress", "--init_from=a b", *own]
        assert shlex.split(records[name].command) == expected
        assert (records[name].state, records[name].steps) == ("pending", 7)
    assert not directory.path.exists()


def test_what_is_done_or_at_work_is_left_alone_and_what_left_the_file_is_kept(directory):
    states = {"done": "done", "failed": "failed", "stopped": "stopped", "queued": "queued", "gone": "done"}
    known = [record(name, state) for name, state in states.items()]
    runs = [SweptRun(name, {}) for name in ("new", "done", "failed", "stopped", "queued")]
    records = planned(directory, runs, known)
    assert [r.name for r in unfinished(records, runs)] == ["new", "failed", "stopped"]
    assert records["gone"] == known[-1]


def test_a_run_that_was_begun_with_another_config_is_refused(directory):
    config = RunConfig.from_dict(tiny_config().to_dict()).with_vocab_size(320)
    claim_workdir(directory.workdir("a"), config)
    planned(directory, [SweptRun("a", {})])
    planned(directory, [SweptRun("a", {"train.log_every": 3})])  # which changes nothing that is computed
    message = r"run 'a' was begun with another config; give the sweep another --output.*gist.ratio: 4 -> 8"
    with pytest.raises(ValueError, match=message):
        planned(directory, [SweptRun("a", {"gist.ratio": 8})])


def test_records_survive_writing_and_a_damaged_line_is_named(directory):
    records = {"a": record("a", "done", **{"gist.ratio": 8}), "b": record("b", job="12_3")}
    directory.write(records)
    assert directory.read() == records
    lines = [json.loads(line) for line in (directory.path / "sweep.jsonl").read_text().splitlines()]
    assert [(line["name"], line["state"]) for line in lines] == [("a", "done"), ("b", "pending")]
    with (directory.path / "sweep.jsonl").open("a") as file:
        file.write('{"name": "c"\n')
    with pytest.raises(ValueError, match=r"sweep.jsonl, line 3 is damaged.*delete the file"):
        directory.read()
    with pytest.raises(ValueError, match="holds no sweep"):
        SweepDirectory(directory.path / "elsewhere").read_existing()


def test_a_directory_has_one_sweep_at_work(directory):
    assert not directory.is_locked()
    with directory.locked():
        assert directory.is_locked()
        with pytest.raises(ValueError, match=r"another launch.sweep.*at work in"), directory.locked():
            pass
    assert not directory.is_locked()


def test_a_run_left_behind_keeps_the_lock(directory):
    with directory.locked() as lock:
        child = subprocess.Popen(["sleep", "60"], pass_fds=[lock])
    assert directory.is_locked()
    child.kill()
    child.wait()
    assert not directory.is_locked()


@pytest.mark.parametrize(("at_work", "state"), [(True, "running"), (False, "stopped")])
def test_a_run_whose_sweep_is_gone_is_stopped(at_work, state, directory):
    records = {"a": record("a", "running"), "b": record("b", "done")}
    current = refreshed(directory, records, at_work)
    assert (current["a"].state, current["b"]) == (state, records["b"])


# --- GPUs ----------------------------------------------------------------------------------------------------------


def test_each_run_gets_a_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5")
    assert visible_gpus() == ["2", "3", "5"]
    assert slots(visible_gpus(), None) == ["2", "3", "5"] and slots(visible_gpus(), 2) == ["2", "3"]
    assert slots(["0", "0", "1"], None) == ["0", "0", "1"]
    with pytest.raises(ValueError, match=r"--jobs=4, but there are 3 GPUs \(2,3,5\).*--gpus=2,2,3,5"):
        slots(visible_gpus(), 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []
    assert slots([], None) == [None] and slots([], 3) == [None] * 3


def test_so_many_runs_at_a_time_and_each_on_its_gpu(directory):
    """Five runs on two GPUs; each tells its GPU, and when it began and ended. The fourth is told to end by someone."""
    work = """
        import os, sys, time
        begin = time.time()
        time.sleep(0.3)
        print(os.environ["CUDA_VISIBLE_DEVICES"], begin, time.time())
        first = not os.path.exists(sys.argv[1] + ".again")
        open(sys.argv[1] + ".again", "w").close()
        sys.exit(75 if first and sys.argv[2] == "3" else 0)
    """
    records = {}
    for index in range(5):
        command = ["python", "-c", textwrap.dedent(work), str(directory.log(str(index))), str(index)]
        records[str(index)] = dataclasses.replace(record(str(index)), command=shlex.join(command))
    told = []
    with directory.locked() as lock:
        LocalExecutor(directory, records, ["3", "5"], lock, told.append).run(list(records), lambda: None)
    assert {r.state for r in records.values()} == {"done"} and directory.read() == records
    lines = [line.split() for name in records for line in directory.log(name).read_text().splitlines() if line]
    spans = [(gpu, float(begin), float(end)) for gpu, begin, end in (line for line in lines if line[0] in "35")]
    assert len(spans) == 6 and {gpu for gpu, _, _ in spans} == {"3", "5"}
    for gpu in "35":
        mine = sorted(span[1:] for span in spans if span[0] == gpu)
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(mine))
    assert told.count("3: begins on GPU 3") + told.count("3: begins on GPU 5") == 2
    assert "3: was told to end, and will go on" in told and "3: done" in told


# --- Slurm ---------------------------------------------------------------------------------------------------------


def test_the_array_script_is_bash_and_asks_for_what_was_asked(directory, tmp_path):
    resources = SlurmResources(
        nodes=2, gpus_per_node=8, cpus_per_task=12, mem="200G", time="4:00:00", partition="gpu", account="me",
        qos="high", notice=300, options=("--exclusive",), setup="module load cuda", at_a_time=4,
    )  # fmt: skip
    records = [dataclasses.replace(record("a"), command="python -m launch.train --x='b c'"), record("b")]
    script = array_script(directory, records, resources)
    for option in (
        "array=0-1%4", "nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=12", "mem=200G",
        "time=4:00:00", "partition=gpu", "account=me", "qos=high", "signal=TERM@300", "exclusive", "requeue",
    ):  # fmt: skip
        assert re.search(rf"^#SBATCH --{re.escape(option)}$", script, re.MULTILINE), option
    assert "\nmodule load cuda\n" in script
    (tmp_path / "script.sh").write_text(script)
    assert subprocess.run(["bash", "-n", tmp_path / "script.sh"], capture_output=True, check=False).returncode == 0
    for absent in ("partition", "mem", "gpus-per-node", "signal"):
        assert f"--{absent}" not in array_script(directory, records, SlurmResources(notice=0))


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (75, True), (3, False)])
def test_the_script_runs_its_task_and_requeues_that_one_alone(code, requeued, directory, tmp_path):
    """With stand-ins for srun and scontrol."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "srun").write_text(f'#!/bin/bash\necho "ran $@"\nexit {code}\n')
    (programs / "scontrol").write_text('#!/bin/bash\necho "scontrol $@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    script = array_script(directory, [record("a"), record("b c")], SlurmResources())
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert directory.log("b c").read_text() == f"ran {sys.executable} -m launch.train --workdir=b c\n"
    assert (directory.workdir("b c") / "exit_code").read_text() == f"{code}\n"
    assert done.stdout == ("scontrol requeue 7_1\n" if requeued else "")


@pytest.mark.parametrize(
    ("in_queue", "exit_code", "state"),
    [
        ("PENDING", None, "queued"),
        ("PENDING", "75", "queued"),
        ("RUNNING", None, "running"),
        ("COMPLETING", "0", "running"),
        ("COMPLETED", "0", "done"),
        (None, "0", "done"),
        (None, "75", "stopped"),
        (None, "2", "failed"),
        (None, None, "failed"),
        ("CANCELLED", None, "failed"),
    ],
)
def test_states_of_runs_that_slurm_has(in_queue, exit_code, state, directory, monkeypatch):
    monkeypatch.setattr(slurm, "queue", lambda: {} if in_queue is None else {"9_0": in_queue})
    if exit_code is not None:
        directory.workdir("a").mkdir(parents=True)
        (directory.workdir("a") / "exit_code").write_text(f"{exit_code}\n")
    current = refreshed(directory, {"a": record("a", "queued", job="9_0")}, local_at_work=False)["a"]
    assert current.state == state
    if state == "failed":
        assert current.note == ("exit code 2" if exit_code else f"left the queue without an exit code: "
                                f"{directory.path}/slurm/9_0.log")  # fmt: skip


def test_processes_and_gpus_must_agree():
    assert SlurmResources(gpus_per_node=4).tasks == 4 and SlurmResources().tasks == 1
    SlurmResources(gpus_per_node=8, tasks_per_node=1)  # one process with all of them
    with pytest.raises(ValueError, match=r"tasks_per_node=1 with --slurm_gpus_per_node=8: .*must be equal"):
        SlurmResources(nodes=2, gpus_per_node=8, tasks_per_node=1)
    with pytest.raises(ValueError, match="--slurm_option=exclusive is no option"):
        SlurmResources(options=("exclusive",))


@pytest.mark.parametrize("name", ["train_8gpus.sh", "train_slurm.sh", "train_tpu_pod.sh"])
def test_launch_scripts_are_bash_and_tell_their_usage(name):
    script = ROOT / "scripts" / name
    assert subprocess.run(["bash", "-n", script], capture_output=True, check=False).returncode == 0
    done = subprocess.run([script], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and re.match(r"usage: .*CONFIG WORKDIR", done.stderr)


# --- results -------------------------------------------------------------------------------------------------------


def test_results_are_those_of_the_metrics(directory):
    records = {"a": record("a", "done", **{"gist.ratio": 2}), "b": record("b", "failed", **{"gist.ratio": 8})}
    directory.workdir("a").mkdir(parents=True)
    lines = [
        {"step": i, "loss": float(i), "grad_norm": 5.0 if i == 3 else 1.0, "tokens_per_second": 100 * i}
        for i in range(1, 21)
    ]
    lines += [{"step": 10, "heldout_loss": 9.0, "heldout_perplexity": 90.0}]
    lines += [{"step": 20, "heldout_loss": 2.5, "heldout_perplexity": 12.5}]
    (directory.workdir("a") / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = collect.collect(directory, records)
    assert rows[0] == {
        "run": "a", "state": "done", "step": 20, "gist.ratio": 2, "loss": 15.5, "heldout_loss": 2.5,
        "heldout_perplexity": 12.5, "max_grad_norm": 5.0, "tokens_per_second": 1050.0,
    }  # fmt: skip
    assert (rows[1]["gist.ratio"], rows[1]["loss"], rows[1]["step"]) == (8, None, 0)
    assert collect.markdown(rows).splitlines()[2:] == [
        "| a | done | 20 | 2 | 15.5000 | 2.5000 | 12.50 | 5 | 1,050 |",
        "| b | failed | 0 | 8 |  |  |  |  |  |",
    ]
    collect.write_csv(rows, directory.path / "r.csv")
    with (directory.path / "r.csv").open() as file:
        read = list(csv.DictReader(file))
    assert read[0]["heldout_loss"] == "2.5" and read[1]["loss"] == "" and list(read[0]) == list(rows[0])
    collect.plot(directory, records, rows, directory.path / "r.png")
    assert (directory.path / "r.png").read_bytes().startswith(b"\x89PNG")
