"""The table of a sweep's runs, as --status prints it and the local executor redraws it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from unigist_jax.sweeps.state import STATES, RunRecord, SweepDirectory

_AT_WORK_FIRST = ("running", "failed", "stopped", "queued", "pending", "done")
_STYLES = {"running": "cyan", "done": "green", "failed": "bold red", "stopped": "yellow", "queued": "blue"}


def status_table(directory: SweepDirectory, records: Mapping[str, RunRecord], at_work_first: bool = False) -> Table:
    """One row a run: state, steps done, last losses, speed, why it failed; those at work first, if asked."""
    table = Table(box=None, pad_edge=False, header_style="bold", caption=summary(records), caption_justify="left")
    for heading in ("run", "state"):
        table.add_column(heading, overflow="fold")
    for heading in ("step", "loss", "held-out", "tokens/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    shown = list(records.values())
    if at_work_first:  # a terminal may be too low for all
        shown.sort(key=lambda record: _AT_WORK_FIRST.index(record.state))
    for record in shown:
        progress = directory.progress(record.name)
        table.add_row(
            record.name,
            Text(record.state, _STYLES.get(record.state, "")),
            f"{progress.step}/{record.steps}",
            _number(progress.loss, ".4f"),
            _number(progress.heldout_loss, ".4f"),
            _number(progress.tokens_per_second, ",.0f"),
            record.note,
        )
    return table


def summary(records: Mapping[str, RunRecord]) -> str:
    """How many runs are in which state: `8 runs: 2 running, 6 done`."""
    counts = Counter(record.state for record in records.values())
    return f"{len(records)} runs: " + ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
