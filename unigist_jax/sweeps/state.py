"""The directory of a sweep, and the state of its runs.

  sweep.jsonl       one line a run: name, overrides, command, state (`RunRecord`)
  runs/NAME/        work directory of launch.train, and what it printed in log.txt
  slurm/            scripts that were submitted, and what they printed
  results.csv, results.png    what --collect wrote

States: `pending` (not begun), `queued` (with Slurm), `running`, `stopped` (told to end before its last step; goes on
when the sweep is run again), `failed`, `done`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from unigist_jax.training.metrics import METRICS_FILE

STATES = ("pending", "queued", "running", "stopped", "failed", "done")
SWEEP_FILE = "sweep.jsonl"
LOG_FILE = "log.txt"
COMMAND_MARK = "$ "  # before the command of each attempt, in its log
_TAIL_BYTES = 65536  # read from the end of a file that may be long


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A line of sweep.jsonl.

    Attributes:
      name: of the run and its directory.
      overrides: values by dotted config field.
      command: the run's `launch.train`, as typed in a shell.
      steps: last step of the run.
      state: one of `STATES`.
      job: its task in Slurm, `ARRAY_INDEX`; "" if none was submitted.
      note: why it failed or stopped; "" if it did not.
    """

    name: str
    overrides: Mapping[str, Any]
    command: str
    steps: int
    state: str = "pending"
    job: str = ""
    note: str = ""

    def moved(self, state: str, note: str = "", job: str | None = None) -> RunRecord:
        """The record in another state; `job` as it was unless given."""
        return dataclasses.replace(self, state=state, note=note, job=self.job if job is None else job)


class Progress(NamedTuple):
    """How far a run is: steps done, and the last losses it told of (None: none yet)."""

    step: int
    loss: float | None
    heldout_loss: float | None
    tokens_per_second: float | None


class SweepDirectory:
    """Where a sweep lies. Making one touches no file."""

    def __init__(self, path: Path):
        self.path = Path(path)

    def workdir(self, name: str) -> Path:
        """The work directory of a run."""
        return self.path / "runs" / name

    def log(self, name: str) -> Path:
        """The file of what a run printed."""
        return self.workdir(name) / LOG_FILE

    def read(self) -> dict[str, RunRecord]:
        """Records by name, {} where no sweep was begun. Raises ValueError naming a damaged line."""
        file = self.path / SWEEP_FILE
        if not file.exists():
            return {}
        records = {}
        for number, line in enumerate(file.read_text().splitlines(), 1):
            try:
                record = RunRecord(**json.loads(line))
                records[record.name] = record
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{file}, line {number} is damaged ({error}); repair it, or delete the file: runs that are "
                    "done are then found done again by their checkpoints"
                ) from error
        return records

    def read_existing(self) -> dict[str, RunRecord]:
        """Records by name. Raises ValueError where no sweep was begun."""
        records = self.read()
        if not records:
            raise ValueError(
                f"{self.path} holds no sweep ({SWEEP_FILE} is missing); begin one with --config and --sweep"
            )
        return records

    def write(self, records: Mapping[str, RunRecord]) -> None:
        """Replaces sweep.jsonl at once: a reader finds the old lines or the new ones, a crash leaves one of them."""
        self.path.mkdir(parents=True, exist_ok=True)
        partial = self.path / f"{SWEEP_FILE}.partial"
        partial.write_text("".join(json.dumps(dataclasses.asdict(record)) + "\n" for record in records.values()))
        os.replace(partial, self.path / SWEEP_FILE)

    @contextlib.contextmanager
    def locked(self) -> Iterator[int]:
        """Keeps other sweeps out. Yields a file descriptor: processes that inherit it hold the lock while they live.

        Raises:
          ValueError: if a sweep, or a run that one has left behind, is at work in the directory.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"another launch.sweep, or a run that one left behind, is at work in {self.path}; wait for it, "
                    f"watch it with --status, or end it (`fuser {self.path}/lock` tells the processes)"
                ) from None
            yield file.fileno()

    def is_locked(self) -> bool:
        """Whether a sweep, or a run that one left behind, is at work in the directory."""
        if not (self.path / "lock").exists():
            return False
        with (self.path / "lock").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def progress(self, name: str) -> Progress:
        """How far a run is, from the end of its metrics."""
        newest: dict[str, Any] = {"step": 0}
        for line in _tail(self.workdir(name) / METRICS_FILE).split("\n")[:-1]:
            if line.startswith("{"):  # the first may begin in its middle
                newest |= json.loads(line)
        return Progress(*(newest.get(field) for field in Progress._fields))

    def last_lines(self, name: str, count: int = 12) -> list[str]:
        """The last lines of what a run's latest attempt printed."""
        lines = _tail(self.log(name)).rstrip().splitlines()
        begins = max((i + 1 for i, line in enumerate(lines) if line.startswith(COMMAND_MARK)), default=0)
        return lines[begins:][-count:]


def _tail(path: Path) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        return file.read().decode(errors="replace")
