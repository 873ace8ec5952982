"""Preemption: a run that is told to end saves its checkpoint and asks to be started again.

The notice is SIGTERM, as Slurm sends it (when it preempts or requeues a job, and with `--signal=TERM@120` before the
time limit), as clouds and Kubernetes send it, and as `launch.sweep` sends it on Ctrl-C.

  one process    the signal sets a flag; the run ends after the step in progress
  several        any of them may be told; jax spreads the word, and all agree on one later step to save and end at
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

REQUEUE_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not finished, start the same command again


class Preempted(Exception):
    """A run was told to end before its last step, and has saved what it needs to go on."""


@contextlib.contextmanager
def preemption_notice() -> Iterator[Callable[[int], bool]]:
    """Listens for SIGTERM while a run is in its loop.

    Yields:
      `told_to_end(step) -> bool`, to be asked by every process once a step with the number of steps done: whether to
      save and end now. It says so at the same step in all processes.
    """
    if jax.distributed.is_initialized():  # jax took over the signal then
        yield multihost_utils.reached_preemption_sync_point
        return
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # Python lets only that one listen
        yield lambda step: False
        return
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield lambda step: told.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
