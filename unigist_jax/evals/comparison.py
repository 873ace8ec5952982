"""The comparison's table and plots, from what the runs' trainings and evaluations wrote.

Each run of the sweep has been trained for one method. The training-free methods are evaluated on the run that was
trained with full attention. All rows share the records, documents and tokens. Runs called NAME,seed=N repeat the run
NAME from another seed: the table has their mean and how far they lie apart.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from unigist_jax.evals import plots
from unigist_jax.training.metrics import read_metrics

SEED = re.compile(r",seed=\d+")
FULL = "full"


def without_seed(name: str) -> str:
    """The name that runs of several seeds share."""
    return SEED.sub("", name)


def named(workdirs: Sequence[str]) -> dict[str, Path]:
    """Work directories by their last name, the run's. Raises ValueError if two are called alike."""
    names = [Path(workdir).name for workdir in workdirs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"two work directories are called {twice[0]!r}, which would be one row of the table; rename one"
        )
    return dict(zip(names, map(Path, workdirs), strict=True))


def rows_of_run(name: str, workdir: Path, evaluation: Path) -> list[dict[str, Any]]:
    """One row a method that was evaluated in a run.

    Args:
      name: of the run, which its own method's row takes; rows of training-free methods take the method's, and its seed.
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
    seed = "".join(SEED.findall(name))
    for summary in recall["results"].values():
        method = summary["method"]
        row = rows.setdefault(
            method,
            {
                "method": name if method == own else method + seed,
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


def by_method(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of each method, one a seed; trained methods first, else in the order in which they come."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: not row["trained"]):
        groups.setdefault(without_seed(row["method"]), []).append(row)
    return groups


def mean_row(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One method's rows as one: the mean over its seeds of every number."""
    numbers = [{key: value for key, value in row.items() if key not in ("method", "trained")} for row in rows]
    first = {"method": without_seed(rows[0]["method"]), "trained": rows[0]["trained"]}
    return first | jax.tree.map(lambda *values: statistics.fmean(values), *numbers)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table: a row a method; recall of whole answers, and in round brackets of answer tokens. Of several seeds the
    mean, with the least and the greatest in square brackets."""
    tasks = list(rows[0]["recall"])
    longest = max(rows[0]["cache_bytes"], key=int)
    heads = ["method", "trained", *(f"recall {task}" for task in tasks), "perplexity", "after borders, nats"]
    heads += [f"KV bytes at {longest}", "training tokens/s"]
    lines = [heads, ["---"] * len(heads)]
    for name, group in by_method(rows).items():
        mean = mean_row(group)
        cells = [f"{name}, {len(group)} seeds" if len(group) > 1 else name, "yes" if mean["trained"] else "no"]
        for task in tasks:
            whole = _shown([row["recall"][task]["accuracy"] for row in group], ".2f")
            cells.append(f"{whole} ({mean['recall'][task]['token_accuracy']:.2f})")
        for key, form in (("perplexity", ".2f"), ("border_jump", "+.3f")):
            cells.append(_shown([row.get(key) for row in group], form))
        cells.append(f"{mean['cache_bytes'][longest]:,.0f}")
        cells.append(_shown([mean.get("tokens_per_second")], ",.0f"))
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def place_table(rows: Sequence[Mapping[str, Any]], chunk_size: int) -> str:
    """How far each method's held-out loss lies above full attention's, by place in a chunk: a table in nats a token.

    Places are counted from the chunk's first raw, which predicts place 1, over all chunks but the first, of which
    nothing was dropped. Of several seeds the mean. Empty without a row of full attention, and where the curves' buckets
    are no parts of a chunk.
    """
    curves = {name: mean_row(group)["curve"] for name, group in by_method(rows).items() if "curve" in group[0]}
    if FULL not in curves:
        return ""
    step = int(curves[FULL]["position"][1] - curves[FULL]["position"][0])
    if chunk_size % step:
        return ""
    losses = {name: _loss_by_place(curve, step, chunk_size) for name, curve in curves.items()}
    edges = [0, *(step << i for i in range((chunk_size // step).bit_length() - 1)), chunk_size]
    spans = [(begin, end) for begin, end in itertools.pairwise(edges) if begin < end]
    lines = [["nats above full attention", *(f"places {begin + 1} to {end}" for begin, end in spans)]]
    lines.append(["---"] * len(lines[0]))
    for name, of in losses.items():
        if name != FULL:
            above = [[of[place] - losses[FULL][place] for place in of if begin < place <= end] for begin, end in spans]
            lines.append([name, *(f"{statistics.fmean(values):+.3f}" for values in above)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def tables(rows: Sequence[Mapping[str, Any]], chunk_size: int) -> str:
    """`markdown`, and behind it `place_table` where there is one."""
    return "\n".join(filter(None, (markdown(rows), place_table(rows, chunk_size))))


def _loss_by_place(curve: Mapping[str, Sequence[float]], step: int, chunk_size: int) -> dict[int, float]:
    """Mean loss (nats) of the buckets of `step` positions by the last place in the chunk that they cover."""
    losses: dict[int, list[float]] = {}
    for first, perplexity in zip(curve["position"], curve["perplexity"], strict=True):
        if first > chunk_size:
            losses.setdefault(int(first - 1) % chunk_size + step, []).append(math.log(perplexity))
    return {place: statistics.fmean(values) for place, values in losses.items()}


def _shown(values: Sequence[float | None], form: str) -> str:
    if None in values:
        return ""
    mean = format(statistics.fmean(values), form)
    return f"{mean} [{min(values):{form}}, {max(values):{form}}]" if len(values) > 1 else mean


def write(rows: Sequence[Mapping[str, Any]], chunk_size: int, directory: Path) -> str:
    """Writes comparison.json, comparison.md and the plots; returns the tables."""
    table = tables(rows, chunk_size)
    (directory / "comparison.json").write_text(json.dumps(list(rows), indent=1) + "\n")
    (directory / "comparison.md").write_text(table)
    means = {name: mean_row(group) for name, group in by_method(rows).items()}
    curves = {name: row["curve"] for name, row in means.items() if "curve" in row}
    plots.plot_by_position(curves, chunk_size, directory / "perplexity_by_position.png")
    tasks = list(rows[0]["by_depth"])
    by_depth = {name: {task: row["by_depth"][task] for task in tasks} for name, row in means.items()}
    trained = {name for name, row in means.items() if row["trained"]}
    plots.plot_recall_by_distance(by_depth, trained, directory / "recall_by_distance.png")
    return table
