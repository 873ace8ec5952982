"""Metrics of a run: JSON lines always, TensorBoard where tensorboardX is installed, Weights & Biases if asked for."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unigist_jax.disk import writing

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Writes one JSON line a call to `workdir/metrics.jsonl`, flushed, and the same scalars elsewhere."""

    def __init__(self, workdir: Path, resume_step: int, tensorboard: bool = True, wandb_project: str | None = None):
        """Opens the file for appending.

        Args:
          workdir: of the run.
          resume_step: lines after this step belong to steps that will be run again, and are dropped.
          tensorboard: also write event files to `workdir/tensorboard`, if tensorboardX is installed.
          wandb_project: also log to this project of Weights & Biases; the work directory's name is the run's.
        """
        self._wandb = _wandb_run(workdir, wandb_project) if wandb_project else None
        self._path = workdir / METRICS_FILE
        kept = [line for line in read_metrics(workdir) if line["step"] <= resume_step]
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(partial, self._path)
        self._file = self._path.open("a")
        self._tensorboard = _tensorboard_writer(workdir, resume_step) if tensorboard else None

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the scalars of a step everywhere. Raises OSError if the file cannot be written."""
        with writing(self._path):
            self._file.write(json.dumps({"step": step, **scalars}) + "\n")
            self._file.flush()
        if self._tensorboard is not None:
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(scalars), step=step)

    def close(self) -> None:
        """Closes everything that was opened."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics file, [] if there is none. A last line cut off by a crash is left out.

    Raises ValueError naming a damaged line.
    """
    path = Path(workdir) / METRICS_FILE
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_text().split("\n")[:-1], start=1):
        try:
            found += [json.loads(line)] if line else []
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is damaged ({error}); delete that line to go on") from error
    return found


def _tensorboard_writer(workdir: Path, resume_step: int):
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)


def check_wandb(project: str) -> None:
    """Raises ValueError if Weights & Biases, asked for, is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(f"--wandb={project} needs the package wandb: pip install wandb")


def _wandb_run(workdir: Path, project: str):
    import wandb

    name = Path(workdir).absolute().name
    return wandb.init(project=project, name=name, id=name, dir=str(workdir), resume="allow")
