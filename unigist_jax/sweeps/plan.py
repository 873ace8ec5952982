"""What a sweep has to do: the runs of its file against those of its directory."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unigist_jax.sweeps import slurm
from unigist_jax.sweeps.spec import SweptRun, override_flag, resolve
from unigist_jax.sweeps.state import RunRecord, SweepDirectory
from unigist_jax.training.checkpoint import CONFIG_FILE, check_workdir, read_run

UNFINISHED = ("pending", "stopped", "failed")


def train_command(
    config_file: str, directory: SweepDirectory, run: SweptRun, common: dict[str, Any], train_flags: Sequence[str]
) -> str:
    """The shell command of a run. `common`: overrides that all runs share; `train_flags`: more of its flags."""
    options = [f"--config={config_file}", f"--workdir={directory.workdir(run.name)}", "--noprogress", *train_flags]
    options += [override_flag(*item) for item in {**common, **run.overrides}.items()]
    return shlex.join(["python", "-m", "launch.train", *options])


def plan(
    directory: SweepDirectory,
    known: dict[str, RunRecord],
    runs: Sequence[SweptRun],
    base: Any,
    commands: Sequence[str],
) -> dict[str, RunRecord]:
    """Every record of the sweep, those of the file brought up to date; all is checked, nothing written.

    Args:
      directory: of the sweep.
      known: its records so far.
      runs: of the sweep file.
      base: the `ml_collections.ConfigDict` that all runs begin with.
      commands: one for each run.

    Raises:
      ValueError: for a run that the config refuses, or that was begun with another config.
    """
    records = dict(known)
    for run, command in zip(runs, commands, strict=True):
        config = resolve(base, run)
        workdir = directory.workdir(run.name)
        if (workdir / CONFIG_FILE).exists():
            _check_begun(workdir, run.name, config)
        record = records.get(run.name, RunRecord(run.name, {}, "", 0))
        records[run.name] = dataclasses.replace(
            record, overrides=run.overrides, command=command, steps=config.train.steps
        )
    return records


def refreshed(directory: SweepDirectory, records: Mapping[str, RunRecord], local_at_work: bool) -> dict[str, RunRecord]:
    """The records as things stand: those with Slurm by its queue, the others by whether anyone is at work.

    Args:
      directory: of the sweep.
      records: as last written.
      local_at_work: whether a sweep on this machine holds the directory.

    Raises:
      ValueError: if Slurm has runs of the sweep, but cannot be asked.
    """
    at_work = ("queued", "running")
    with_slurm = [name for name, record in records.items() if record.job and record.state in at_work]
    queue = slurm.queue() if with_slurm else {}
    current = dict(records)
    for name, record in records.items():
        if name in with_slurm:
            current[name] = slurm.after_slurm(directory, record, queue.get(record.job))
        elif record.state == "running" and not local_at_work:
            current[name] = record.moved("stopped", "launch.sweep ended before it")
    return current


def unfinished(records: dict[str, RunRecord], runs: Sequence[SweptRun]) -> list[RunRecord]:
    """Records of the sweep file's runs that are neither done nor in other hands, in its order."""
    return [records[run.name] for run in runs if records[run.name].state in UNFINISHED]


def _check_begun(workdir: Path, name: str, config: Any) -> None:
    try:
        check_workdir(workdir, config.with_vocab_size(read_run(workdir).model.vocab_size))
    except ValueError as error:
        raise ValueError(
            f"run {name!r} was begun with another config; give the sweep another --output, or the run another name: "
            f"{error}"
        ) from error
