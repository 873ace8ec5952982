"""The comparison's table and plots, from what the runs' trainings and evaluations wrote.

Each run of the sweep has been trained for one method. The training-free methods are evaluated on the run that was
trained with full attention. All rows share the records, documents and tokens.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unigist_jax.evals import plots
from unigist_jax.training.metrics import read_metrics


def rows_of_run(name: str, workdir: Path, evaluation: Path) -> list[dict[str, Any]]:
    """One row a method that was evaluated in a run.

    Args:
      name: of the run, which its own method's row takes; rows of training-free methods take the method's.
      workdir: the run's, for its metrics.
      evaluation: directory of `launch.evaluate`'s JSON files.

    Returns:
      Dicts of `method`, `trained` (whether the run was trained for it), `recall` (by "TASK, LENGTH"), `by_depth` (the
      same), `cache_bytes` (by length; of the task that was given least room), and, where there are, `perplexity`,
      `curve`, `border_jump`, `tokens_per_second`.
    """

    def result(suite: str) -> dict[str, Any]:
        return json.loads((evaluation / f"{suite}.json").read_text())

    recall, perplexity, boundary = result("recall"), result("perplexity"), result("boundary")
    (own,) = perplexity["methods"]
    speeds = [line["tokens_per_second"] for line in read_metrics(workdir) if "tokens_per_second" in line]
    rows: dict[str, dict[str, Any]] = {}
    for summary in recall["results"].values():
        method = summary["method"]
        row = rows.setdefault(
            method,
            {
                "method": name if method == own else method,
                "trained": method == own,
                "recall": {},
                "by_depth": {},
                "cache_bytes": {},
            },
        )
        task = f"{summary['task']}, {summary['length']}"
        row["recall"][task] = {key: summary[key] for key in ("accuracy", "token_accuracy", "samples")}
        row["by_depth"][task] = summary["by_depth"]
        length, held = str(summary["length"]), row["cache_bytes"]
        held[length] = min(held.get(length, summary["cache_bytes"]), summary["cache_bytes"])
    rows[own] |= {
        "perplexity": perplexity["methods"][own]["perplexity"],
        "curve": {key: boundary["methods"][own][key] for key in ("position", "perplexity")},
        "border_jump": boundary["methods"][own]["border_jump"],
        "tokens_per_second": statistics.median(speeds) if speeds else None,
    }
    return list(rows.values())


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table: a row a method; recall of whole answers, and in brackets of answer tokens."""
    tasks = list(rows[0]["recall"])
    longest = max(rows[0]["cache_bytes"], key=int)
    heads = ["method", "trained", *(f"recall {task}" for task in tasks), "perplexity", "after borders, nats"]
    heads += [f"KV bytes at {longest}", "training tokens/s"]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        cells = [row["method"], "yes" if row["trained"] else "no"]
        cells += [
            f"{row['recall'][task]['accuracy']:.2f} ({row['recall'][task]['token_accuracy']:.2f})" for task in tasks
        ]
        cells.append(_shown(row.get("perplexity"), ".2f"))
        cells.append(_shown(row.get("border_jump"), "+.3f"))
        cells.append(f"{row['cache_bytes'][longest]:,.0f}")
        cells.append(_shown(row.get("tokens_per_second"), ",.0f"))
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def write(rows: Sequence[Mapping[str, Any]], chunk_size: int, directory: Path) -> str:
    """Writes comparison.json, comparison.md and the plots; returns the table."""
    table = markdown(rows)
    (directory / "comparison.json").write_text(json.dumps(list(rows), indent=1) + "\n")
    (directory / "comparison.md").write_text(table)
    curves = {row["method"]: row["curve"] for row in rows if "curve" in row}
    plots.plot_by_position(curves, chunk_size, directory / "perplexity_by_position.png")
    plots.plot_recall_by_distance(
        {row["method"]: row["by_depth"] for row in rows}, directory / "recall_by_distance.png"
    )
    return table
