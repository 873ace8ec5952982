"""What the runs of a sweep came to: a table, a CSV file and a plot."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unigist_jax.sweeps.state import RunRecord, SweepDirectory
from unigist_jax.training.checkpoint import CONFIG_FILE, read_run
from unigist_jax.training.metrics import read_metrics

RESULTS_CSV, RESULTS_PLOT = "results.csv", "results.png"
LAST_STEPS = 10  # over which the training loss is averaged
_LEGEND_RUNS = 16  # more would hide the curves; the colours go from the first run to the last
_FORMS = {"tokens_per_second": ",.0f", "loss": ".4f", "heldout_loss": ".4f", "heldout_perplexity": ".2f"}


def collect(directory: SweepDirectory, records: Mapping[str, RunRecord]) -> list[dict[str, Any]]:
    """One row a run, in order: name, state, step, its value of every field that any run overrides, and the results.

    The results are `loss` (mean of the last `LAST_STEPS` logged steps), the last `heldout_loss` and
    `heldout_perplexity`, `max_grad_norm` (before clipping, over all logged steps), and `tokens_per_second` (median).
    None: there is none yet.
    """
    fields = list(dict.fromkeys(field for record in records.values() for field in record.overrides))
    rows = []
    for record in records.values():
        lines = read_metrics(directory.workdir(record.name))
        series = {name: [line[name] for line in lines if name in line] for name in ("loss", "grad_norm")}
        speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
        heldout = [line for line in lines if "heldout_loss" in line][-1:]
        rows.append(
            {
                "run": record.name,
                "state": record.state,
                "step": lines[-1]["step"] if lines else 0,
                **{field: _value(directory, record, field) for field in fields},
                "loss": statistics.fmean(series["loss"][-LAST_STEPS:]) if series["loss"] else None,
                "heldout_loss": heldout[0]["heldout_loss"] if heldout else None,
                "heldout_perplexity": heldout[0]["heldout_perplexity"] if heldout else None,
                "max_grad_norm": max(series["grad_norm"], default=None),
                "tokens_per_second": statistics.median(speeds) if speeds else None,
            }
        )
    return rows


def _value(directory: SweepDirectory, record: RunRecord, field: str) -> Any:
    """A run's value of a config field: what it overrides, else what it was begun with, else None."""
    if field in record.overrides:
        return record.overrides[field]
    workdir = directory.workdir(record.name)
    section, _, name = field.partition(".")
    return read_run(workdir).to_dict()[section][name] if (workdir / CONFIG_FILE).exists() else None


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The rows with all their digits; what is None stays empty."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table, rounded."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[_shown(name, value) for name, value in row.items()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(directory: SweepDirectory, records: Mapping[str, RunRecord], rows: Sequence[Mapping[str, Any]], path: Path):
    """Training loss by step, smoothed, and the last held-out loss of each run, in one colour each."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, max(4.0, 1.5 + 0.25 * len(rows))), dpi=110, layout="constrained")
    losses, heldout = figure.subplots(1, 2, width_ratios=(3, 2))
    colours = matplotlib.colormaps["viridis"]
    for index, (name, row) in enumerate(zip(records, rows, strict=True)):
        colour = colours(index / max(1, len(rows) - 1) * 0.9)
        points = [(line["step"], line["loss"]) for line in read_metrics(directory.workdir(name)) if "loss" in line]
        if points:
            steps, values = zip(*points, strict=True)
            losses.plot(steps, _smoothed(values), color=colour, label=name, linewidth=1.2)
        if row["heldout_loss"] is not None:
            heldout.plot(row["heldout_loss"], index, "o", color=colour)
    losses.set(title=f"Training loss (mean of {LAST_STEPS} steps)", xlabel="step", ylabel="nats per token")
    heldout.set(title="Last held-out loss", xlabel="nats per token", yticks=range(len(rows)), yticklabels=list(records))
    heldout.invert_yaxis()
    for axes in (losses, heldout):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if 0 < len(losses.lines) <= _LEGEND_RUNS:
        losses.legend(fontsize="small")
    figure.savefig(path)


def _smoothed(values: Sequence[float]) -> list[float]:
    return [statistics.fmean(values[max(0, i - LAST_STEPS + 1) : i + 1]) for i in range(len(values))]


def _shown(name: str, value: Any) -> str:
    if value is None:
        return ""
    return format(value, _FORMS.get(name, ".4g")) if isinstance(value, float) else str(value)
