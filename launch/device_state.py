"""What a GPU does while a benchmark runs on it: clock and power, as nvidia-smi reads them."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator

FIELDS = {"clocks.sm": "sm_mhz", "power.draw": "watts"}


@contextlib.contextmanager
def watched(interval_ms: int = 100) -> Iterator[dict[str, list[float]]]:
    """Watches the first visible GPU. The dict is filled at the end: least, median and largest of each reading.

    Keys are "sm_mhz" and "watts"; a reading that this machine does not give is left out.
    """
    state: dict[str, list[float]] = {}
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    command = ["nvidia-smi", "-i", device, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    with tempfile.TemporaryFile("w+") as said:
        try:
            process = subprocess.Popen([*command, "-lms", str(interval_ms)], stdout=said, stderr=subprocess.DEVNULL)
        except OSError:
            process = None
        try:
            yield state
        finally:
            if process:
                process.kill()
                process.wait()
            said.seek(0)
            state.update(summary(said.read()))


def summary(text: str) -> dict[str, list[float]]:
    """Least, median and largest of each column of nvidia-smi's lines; broken lines and columns are left out."""
    columns: dict[str, list[float]] = {}
    for line in text.splitlines():
        values = line.split(",")
        for name, value in zip(FIELDS.values(), values, strict=False):
            with contextlib.suppress(ValueError):
                columns.setdefault(name, []).append(float(value))
    return {name: [min(found), statistics.median(found), max(found)] for name, found in columns.items()}
