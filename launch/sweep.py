"""Trains many runs of one config, each with overrides of its own, here or on a Slurm cluster.

  python -m launch.sweep --config=configs/tiny.py --sweep=configs/sweeps/ratio.py             one GPU a run, all at once
  python -m launch.sweep --config=… --sweep=… --executor=slurm --slurm_gpus_per_node=8        one sbatch array
  python -m launch.sweep --config=… --sweep=… --status                                        or --collect, or --dry_run

Run the same command again to go on with what is not finished. docs/sweeps.md says how to write a sweep.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.live import Live

from launch.flags import run_main
from unigist_jax.sweeps import collect, slurm
from unigist_jax.sweeps.local import LocalExecutor, slots, visible_gpus
from unigist_jax.sweeps.plan import plan, refreshed, train_command, unfinished
from unigist_jax.sweeps.spec import read_sweep
from unigist_jax.sweeps.state import RunRecord, SweepDirectory
from unigist_jax.sweeps.table import status_table, summary

_CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config()", lock_config=True)
_SWEEP = flags.DEFINE_string("sweep", None, "Python file with sweep(add)")
_OUTPUT = flags.DEFINE_string(
    "output", None, "directory of the sweep (default: runs/CONFIG-SWEEP, of those file names)"
)
_EXECUTOR = flags.DEFINE_enum("executor", "local", ["local", "slurm"], "where the runs run")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "print what would run, and touch nothing")
_STATUS = flags.DEFINE_bool("status", False, "print the state of every run")
_COLLECT = flags.DEFINE_bool("collect", False, "print a table of results; write it as CSV, and a plot")
_JOBS = flags.DEFINE_integer("jobs", None, "local runs at a time (default: one a GPU, or one)", lower_bound=1)
_GPUS = flags.DEFINE_list("gpus", None, "GPUs for local runs, such as 0,1 (default: all that are visible)")
_TRAIN_FLAGS = flags.DEFINE_multi_string(
    "train_flag", [], "a further flag for each launch.train, such as --train_flag=--init_from=DIR"
)
_NODES = flags.DEFINE_integer("slurm_nodes", 1, "nodes of a run", lower_bound=1)
_TASKS = flags.DEFINE_integer("slurm_tasks_per_node", None, "processes a node (default: one a GPU)", lower_bound=1)
_GPUS_PER_NODE = flags.DEFINE_integer("slurm_gpus_per_node", 0, "GPUs of each node", lower_bound=0)
_CPUS = flags.DEFINE_integer("slurm_cpus_per_task", None, "CPU cores of each process", lower_bound=1)
_MEM = flags.DEFINE_string("slurm_mem", "", "memory of each node, such as 200G")
_TIME = flags.DEFINE_string("slurm_time", "", "time limit, such as 24:00:00; a run that is longer is requeued")
_PARTITION = flags.DEFINE_string("slurm_partition", "", "partition")
_ACCOUNT = flags.DEFINE_string("slurm_account", "", "account")
_QOS = flags.DEFINE_string("slurm_qos", "", "quality of service")
_NOTICE = flags.DEFINE_integer(
    "slurm_notice", 120, "seconds before the limit at which to save and requeue", lower_bound=0
)
_OPTIONS = flags.DEFINE_multi_string(
    "slurm_option", [], "a further option of sbatch, such as --slurm_option=--exclusive"
)
_SETUP = flags.DEFINE_string("slurm_setup", "", "shell commands before the run, such as 'module load cuda'")


def sweep_directory() -> SweepDirectory:
    """That of --output, or one named after the config and the sweep."""
    if _OUTPUT.value:
        return SweepDirectory(Path(_OUTPUT.value))
    if _CONFIG.value is None or not _SWEEP.value:
        raise ValueError("say which sweep: --config and --sweep, or the --output of one that was begun")
    config_file = config_flags.get_config_filename(flags.FLAGS["config"])
    return SweepDirectory(Path("runs") / f"{Path(config_file).stem}-{Path(_SWEEP.value).stem}")


def resources() -> slurm.SlurmResources:
    return slurm.SlurmResources(
        nodes=_NODES.value,
        tasks_per_node=_TASKS.value,
        gpus_per_node=_GPUS_PER_NODE.value,
        cpus_per_task=_CPUS.value,
        mem=_MEM.value,
        time=_TIME.value,
        partition=_PARTITION.value,
        account=_ACCOUNT.value,
        qos=_QOS.value,
        notice=_NOTICE.value,
        options=tuple(_OPTIONS.value),
        setup=_SETUP.value,
        at_a_time=_JOBS.value,
    )


def planned(directory: SweepDirectory, at_work: bool) -> tuple[dict[str, RunRecord], list[RunRecord]]:
    """All records, and those of them that are to run."""
    if _CONFIG.value is None or not _SWEEP.value:
        raise ValueError("--config and --sweep are needed to run a sweep")
    runs = read_sweep(Path(_SWEEP.value))
    common = config_flags.get_override_values(flags.FLAGS["config"])
    config_file = config_flags.get_config_filename(flags.FLAGS["config"])
    train_flags = list(_TRAIN_FLAGS.value)
    if wrong := [flag for flag in train_flags if not flag.startswith("--")]:
        raise ValueError(f"--train_flag={wrong[0]} is no flag; write it as --train_flag=--{wrong[0]}")
    if flags.FLAGS.platform:
        train_flags.append(f"--platform={flags.FLAGS.platform}")
    commands = [train_command(config_file, directory, run, common, train_flags) for run in runs]
    known = refreshed(directory, directory.read(), at_work)
    records = plan(directory, known, runs, _CONFIG.value, commands)
    return records, unfinished(records, runs)


def show_status(directory: SweepDirectory, console: Console) -> None:
    """Prints the table and the last lines of what failed; writes down what changed, unless a sweep at work does."""
    at_work = directory.is_locked()
    records = refreshed(directory, directory.read_existing(), at_work)
    if not at_work:
        directory.write(records)
    console.print(status_table(directory, records))
    for record in records.values():
        if record.state == "failed":
            print("\n".join([f"{directory.log(record.name)} ends:", *directory.last_lines(record.name)]))


def collect_results(directory: SweepDirectory) -> None:
    records = refreshed(directory, directory.read_existing(), directory.is_locked())
    rows = collect.collect(directory, records)
    print(collect.markdown(rows))
    collect.write_csv(rows, directory.path / collect.RESULTS_CSV)
    collect.plot(directory, records, rows, directory.path / collect.RESULTS_PLOT)
    print(f"\n{directory.path / collect.RESULTS_CSV}, {directory.path / collect.RESULTS_PLOT}")


def dry_run(directory: SweepDirectory) -> None:
    records, waiting = planned(directory, directory.is_locked())
    print(f"# {directory.path}: {summary(records)}; {len(waiting)} to run")
    if _EXECUTOR.value == "slurm" and waiting:
        print(slurm.array_script(directory, waiting, resources()), end="")
        return
    for record in waiting:
        print(record.command)


def run_local(directory: SweepDirectory, console: Console) -> None:
    if wrong := [gpu for gpu in _GPUS.value or () if not re.fullmatch(r"\d+|(GPU|MIG)-.+", gpu)]:
        raise ValueError(f"--gpus={','.join(_GPUS.value)}: {wrong[0]!r} is no GPU; give numbers or UUIDs, such as 0,1")
    places = slots(visible_gpus() if _GPUS.value is None else _GPUS.value, _JOBS.value)
    with directory.locked() as lock:
        records, waiting = planned(directory, at_work=False)
        directory.write(records)
        with Live(console=console, auto_refresh=False, transient=True) as live:

            def draw() -> None:
                if console.is_terminal:
                    live.update(status_table(directory, records, at_work_first=True), refresh=True)

            def tell(line: str) -> None:
                console.print(line, highlight=False, markup=False, soft_wrap=True)

            executor = LocalExecutor(directory, records, places, lock, tell)
            try:
                executor.run([record.name for record in waiting], draw)
            except KeyboardInterrupt:
                tell("ended; run the same command again to go on")
                sys.exit(130)
    console.print(status_table(directory, records))
    if any(record.state == "failed" for record in records.values()):
        console.print("runs failed; the same command tries those again, and no others", soft_wrap=True)
        sys.exit(1)


def run_slurm(directory: SweepDirectory, console: Console) -> None:
    asked = resources()
    with directory.locked():
        records, waiting = planned(directory, at_work=False)
        directory.write(records)
        if waiting:
            records |= {record.name: record for record in slurm.submit(directory, waiting, asked)}
            directory.write(records)
            array = records[waiting[0].name].job.partition("_")[0]
            console.print(f"submitted {len(waiting)} runs as array {array}; watch them with --status", highlight=False)
    console.print(status_table(directory, records))


def main(_: list[str]) -> None:
    console = Console()
    directory = sweep_directory()
    if _STATUS.value:
        show_status(directory, console)
    if _COLLECT.value:
        collect_results(directory)
    if _STATUS.value or _COLLECT.value:
        return
    if _DRY_RUN.value:
        dry_run(directory)
        return
    planned(directory, directory.is_locked())  # bad input is refused before there is a directory
    if _EXECUTOR.value == "slurm":
        run_slurm(directory, console)
    else:
        run_local(directory, console)


if __name__ == "__main__":
    run_main(main)
