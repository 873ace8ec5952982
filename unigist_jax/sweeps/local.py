"""The executor on this machine: so many runs at a time, one GPU each, each a process of its own."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from unigist_jax.sweeps.state import COMMAND_MARK, RunRecord, SweepDirectory
from unigist_jax.training.preemption import REQUEUE_EXIT_CODE

GRACE_SECONDS = 60.0  # for a run that is told to end to save its checkpoint
_POLL_SECONDS, _REDRAW_SECONDS = 0.2, 1.0


class _Child(NamedTuple):
    process: subprocess.Popen
    slot: str | None


def visible_gpus() -> list[str]:
    """GPUs that a run may be given: those of CUDA_VISIBLE_DEVICES, else all that nvidia-smi lists, else none."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu for gpu in chosen.split(",") if gpu not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], check=False, capture_output=True, text=True)
    return [str(index) for index, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU ")]


def slots(gpus: Sequence[str], jobs: int | None) -> list[str | None]:
    """What each run at work holds: a GPU, or None where there are none.

    Args:
      gpus: a GPU listed twice is shared by two runs.
      jobs: runs at a time; None: one a GPU, or one.

    Raises:
      ValueError: if there are fewer GPUs than jobs.
    """
    if not gpus:
        return [None] * (jobs or 1)
    if jobs is not None and jobs > len(gpus):
        there = f"there is 1 GPU ({gpus[0]})" if len(gpus) == 1 else f"there are {len(gpus)} GPUs ({','.join(gpus)})"
        raise ValueError(
            f"--jobs={jobs}, but {there}; "
            f"lower it, or list a GPU twice to share it: --gpus={','.join([gpus[0], *gpus])}"
        )
    return list(gpus[:jobs])


class LocalExecutor:
    """Runs what it is given to the end, so many at a time.

    On Ctrl-C or SIGTERM every run is told to end, saves its checkpoint, and is `stopped`.
    """

    def __init__(
        self,
        directory: SweepDirectory,
        records: dict[str, RunRecord],
        slots: Sequence[str | None],
        lock: int,
        tell: Callable[[str], None],
    ):
        """Prepares; nothing runs yet.

        Args:
          directory: of the sweep.
          records: all of them; kept up to date here and in sweep.jsonl.
          slots: what each run at work holds (`slots`).
          lock: descriptor of the directory's lock, which the runs inherit.
          tell: gets a line for every run that begins or ends.
        """
        self._directory, self._records, self._lock, self._tell = directory, records, lock, tell
        self._free = list(slots)
        self._children: dict[str, _Child] = {}

    def run(self, names: Sequence[str], redraw: Callable[[], None]) -> None:
        """Runs all of them. Raises KeyboardInterrupt after Ctrl-C or SIGTERM, when every run has ended."""
        waiting = deque(names)
        drawn = 0.0
        told = threading.Event()  # looked at between steps: an exception from a handler could be lost in a callback
        before = {number: signal.signal(number, lambda *_: told.set()) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while waiting or self._children:
                if told.is_set():
                    raise KeyboardInterrupt
                while waiting and self._free:
                    self._start(waiting.popleft())
                if time.monotonic() - drawn > _REDRAW_SECONDS:
                    redraw()
                    drawn = time.monotonic()
                time.sleep(_POLL_SECONDS)
                waiting.extend(self._reap())
        except BaseException:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C is not to wait
            self._end_all()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _start(self, name: str) -> None:
        slot = self._free.pop(0)
        command = [sys.executable, *shlex.split(self._records[name].command)[1:]]
        environment = os.environ if slot is None else os.environ | {"CUDA_VISIBLE_DEVICES": slot}
        self._directory.workdir(name).mkdir(parents=True, exist_ok=True)
        with self._directory.log(name).open("a") as log:
            print(f"{COMMAND_MARK}{self._records[name].command}", file=log, flush=True)
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[self._lock],
                start_new_session=True,  # or Ctrl-C would reach it past us
            )
        self._children[name] = _Child(process, slot)
        self._move(name, "running")
        self._tell(f"{name}: begins" if slot is None else f"{name}: begins on GPU {slot}")

    def _reap(self) -> list[str]:
        """Takes in runs that have ended. Returns those told to end by someone else, which are to go on."""
        again = []
        for name, child in list(self._children.items()):
            code = child.process.poll()
            if code is None:
                continue
            del self._children[name]
            self._free.append(child.slot)
            if code == 0:
                self._move(name, "done")
                self._tell(f"{name}: done")
            elif code == REQUEUE_EXIT_CODE:
                self._move(name, "stopped")
                self._tell(f"{name}: was told to end, and will go on")
                again.append(name)
            else:
                self._move(name, "failed", f"exit code {code}")
                last = "\n".join(f"    {line}" for line in self._directory.last_lines(name))
                self._tell(f"{name}: failed with exit code {code}; {self._directory.log(name)} ends:\n{last}")
        return again

    def _end_all(self) -> None:
        self._tell(f"telling {len(self._children)} runs to end; Ctrl-C again kills them")
        try:
            for child in self._children.values():
                child.process.terminate()
            deadline = time.monotonic() + GRACE_SECONDS
            for child in self._children.values():
                child.process.wait(max(0.0, deadline - time.monotonic()))
        except (KeyboardInterrupt, subprocess.TimeoutExpired):
            pass
        finally:
            for name, child in self._children.items():
                child.process.kill()
                done = child.process.wait() == 0
                self._move(name, "done" if done else "stopped")
            self._children.clear()

    def _move(self, name: str, state: str, note: str = "") -> None:
        self._records[name] = self._records[name].moved(state, note, job="")
        self._directory.write(self._records)
