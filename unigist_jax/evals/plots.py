"""Plots of runs and evaluations, PNG files through matplotlib."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any


def _figure(title: str, xlabel: str, ylabel: str):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plot_loss(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Training and held-out loss by step, from the lines of metrics.jsonl."""
    figure, axes = _figure("Loss", "step", "nats per token")
    for key, label, style in (("loss", "training", "-"), ("heldout_loss", "held-out", "o-")):
        points = [(line["step"], line[key]) for line in metrics if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1)
    axes.legend()
    figure.savefig(path)


def plot_training(metrics: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Runs beside each other by step, from the lines of their metrics.jsonl: training loss (mean of 10 lines), held-out
    loss, and where it was evaluated recall of whole answers (solid) and of answer tokens (dashed)."""
    from matplotlib.figure import Figure

    panels = [("loss", "training loss, nats"), ("heldout_loss", "held-out loss, nats"), ("recall_answers", "recall")]
    panels = [panel for panel in panels if any(panel[0] in line for lines in metrics.values() for line in lines)]
    figure = Figure(figsize=(4.5 * len(panels), 4), dpi=110, layout="constrained")
    for axes, (field, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for index, (name, lines) in enumerate(metrics.items()):
            fields = [(field, "-", 10 if field == "loss" else 1)]
            fields += [("recall_tokens", "--", 1)] if field == "recall_answers" else []
            for key, style, span in fields:
                points = [(line["step"], line[key]) for line in lines if key in line]
                means = [
                    (points[end - 1][0], sum(value for _, value in points[max(0, end - span) : end]) / min(span, end))
                    for end in range(1, len(points) + 1)
                ]
                if means:
                    axes.plot(*zip(*means, strict=True), style, color=f"C{index}", label=name, linewidth=1.2)
        axes.set(xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path)


def plot_by_position(curves: Mapping[str, Mapping[str, Any]], chunk_size: int | None, path: Path) -> None:
    """Perplexity by position, one curve a name (`perplexity.bucketed`), with chunk borders marked.

    The scale is that of all but the first twentieth of the positions: a document begins far above the rest.
    """
    figure, axes = _figure("Held-out perplexity by position", "position in the document (tokens)", "perplexity")
    last = max(max(curve["position"]) for curve in curves.values())
    top = 0.0
    for name, curve in curves.items():
        axes.plot(curve["position"], curve["perplexity"], label=name, linewidth=1.2)
        points = zip(curve["position"], curve["perplexity"], strict=True)
        top = max(top, *(value for position, value in points if position >= last / 20))
    if chunk_size:
        for index, border in enumerate(range(chunk_size, int(last) + 1, chunk_size)):
            axes.axvline(border, color="gray", linestyle=":", linewidth=0.8, label="" if index else "chunk border")
    axes.set_yscale("log")
    axes.set_ylim(top=1.2 * top)
    axes.legend()
    figure.savefig(path)


def plot_recall(summaries: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Recall by depth: share of whole answers found (solid) and of answer tokens right (dashed), one colour a name."""
    figure, axes = _figure("Recall by depth of the fact", "depth (0: beginning of the context)", "share right")
    for index, (name, summary) in enumerate(summaries.items()):
        buckets = [bucket for bucket in summary["by_depth"] if bucket["samples"]]
        depths = [bucket["depth"] for bucket in buckets]
        axes.plot(depths, [b["accuracy"] for b in buckets], f"C{index}o-", label=f"{name}, whole answers")
        axes.plot(depths, [b["token_accuracy"] for b in buckets], f"C{index}x--", label=f"{name}, answer tokens")
    axes.set_ylim(-0.03, 1.03)
    axes.legend()
    figure.savefig(path)


def plot_recall_by_distance(
    curves: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], trained: Collection[str], path: Path
) -> None:
    """Share of answer tokens right by distance from the fact to the question: a panel a task, a curve a method, solid
    for those in `trained`."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(task for by_task in curves.values() for task in by_task))
    figure = Figure(figsize=(5 * len(tasks), 4.5), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    for axes, task in zip(panels, tasks, strict=True):
        for index, (name, by_task) in enumerate(curves.items()):
            buckets = [bucket for bucket in by_task[task] if bucket["samples"]]
            points = sorted((bucket["distance"], bucket["token_accuracy"]) for bucket in buckets)
            style = "o-" if name in trained else "x--"
            axes.plot(*zip(*points, strict=True), style, color=f"C{index % 10}", label=name, linewidth=1.2)
        axes.set(title=task, xlabel="tokens from the fact to the answer", ylim=(-0.03, 1.03))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share of answer tokens right")
    panels[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path)


def plot_cache_bytes(curves: Mapping[str, tuple[Sequence[int], Sequence[int]]], path: Path) -> None:
    """KV cache bytes against tokens, one curve a name."""
    figure, axes = _figure("KV cache of one sequence", "tokens", "MiB")
    for name, (tokens, sizes) in curves.items():
        axes.plot(tokens, [size / 2**20 for size in sizes], label=name)
    axes.legend()
    figure.savefig(path)
