"""Tables and plot of what launch.bench_attention measured, from its raw JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

from launch.markdown import Report, command_block, table

PARTS = ("forward", "both")  # both: forward + backward
KINDS = ("attention", "flex", "decode", "documents")
NAMES = {"cudnn": "cuDNN causal", "folded": "folded cuDNN", "flex": "FlexAttention"}
SHAPE = ("query", "kv", "dim")
NO_CASE = {"what", "reason", "ratio", *SHAPE}  # what does not tell cases apart


def pair(row: dict | None, form: str, names: tuple[str, str] = PARTS) -> str:
    """Two figures of a row in a cell: forward / forward + backward."""
    return " / ".join(form.format(row[name]) for name in names) if row and names[0] in row else ""


def times_as_fast(row: dict, peer: dict, part: str) -> float:
    """How many times as fast as a peer of the same group: the median of the rounds' ratios."""
    rounds = zip(peer["samples"][part], row["samples"][part], strict=True)
    return statistics.median(theirs / own for theirs, own in rounds)


def gain(row: dict | None, peer: dict | None) -> str:
    """How many times as fast as a peer, in a cell."""
    if not (row and peer and "forward" in row and "forward" in peer):
        return ""
    return " / ".join(f"{times_as_fast(row, peer, part):.2f}" for part in PARTS)


def milliseconds(row: dict | None) -> str:
    """The times of a contender in a cell."""
    return pair(row, "{:.3g}")


def merged(results: list[dict]) -> dict:
    """The figures of several runs as one; what one run lacks another may have.

    Args:
      results: raw figures of runs that measured different groups, on one kind of device with the same releases.

    Raises:
      ValueError: if devices, releases, rounds, backends or heads differ, or two runs measured the same case.
    """
    first = results[0]
    for name in ("device", "versions", "repeats", "backends", "shape"):
        if other := next((result for result in results if result[name] != first[name]), None):
            raise ValueError(f"runs with different {name} cannot be merged: {first[name]} and {other[name]}")
    together = first | {"commands": [command for result in results for command in result["commands"]]}
    together["groups"] = [group for result in results for group in result["groups"]]
    for kind in KINDS:
        rows: dict[tuple, dict] = {}
        for row in (row for result in results for row in result.get(kind, [])):
            key = tuple(row.get(name) for name in ("what", "length", "ratio", "batch", "documents", *SHAPE))
            if key in rows and "reason" not in row and "reason" not in rows[key]:
                raise ValueError(f"two runs measured the same case: {key}")
            if key not in rows or "reason" in rows[key]:
                rows[key] = row
        together[kind] = list(rows.values())
    return together


class Attention:
    """The measurements of whole sequences, by contender, length, ratio and heads.

    Args:
      kind: "attention", or "flex" for the groups that FlexAttention was timed in.
    """

    def __init__(self, result: dict, kind: str = "attention"):
        self._rows = {}
        for row in result.get(kind, []):
            self._rows[row["what"], row["length"], row.get("ratio"), *(row[x] for x in SHAPE)] = row

    def get(self, what: str, length: int, ratio: int, shape: tuple) -> dict | None:
        """A contender's row, or None; cuDNN's does not depend on the ratio."""
        return self._rows.get((what, length, None if what == "cudnn" else ratio, *shape))

    def cases(self, backend: str, shape: tuple) -> list[tuple[int, int]]:
        """Lengths and ratios at which a backend was timed."""
        return sorted(
            key[1:3] for key, row in self._rows.items() if key[0] == backend and key[3:] == shape and "forward" in row
        )

    def shapes(self, backend: str) -> list[tuple]:
        """Heads with which a backend was timed, in the order of the measurements."""
        return list(dict.fromkeys(key[3:] for key in self._rows if key[0] == backend))


def attention_tables(result: dict) -> Iterator[str]:
    """A table for each backend and each shape of the heads."""
    attention, flex, default = Attention(result), Attention(result, "flex"), result["shape"]
    for backend in result["backends"]:
        for shape in attention.shapes(backend):
            query, kv, dim = shape
            rows = []
            for length, ratio in attention.cases(backend, shape):
                own, causal, folded = (attention.get(x, length, ratio, shape) for x in (backend, "cudnn", "folded"))
                beside_flex, rival = (flex.get(x, length, ratio, shape) for x in (backend, "flex"))
                cells = [f"{length // 1024}K", str(ratio), *map(milliseconds, (own, causal, folded, rival))]
                cells += gain(own, causal), gain(own, folded), gain(beside_flex, rival)
                rows.append([*cells, pair(own, "{:.0%}", ("share_forward", "share_both"))])
            head = ["raws", "r", f"{backend} ms", *NAMES.values(), *(f"over {x}" for x in NAMES.values())]
            if not rows:
                continue
            yield (
                f"Backend `{backend}`, {query} query heads, {kv} KV heads, dim {dim}, {default['sinks']} sinks, window "
                f"{default['window']}; forward / forward + backward:"
            )
            yield table([*head, "share of the matrix rate"], rows)


def decode_table(result: dict) -> Iterator[str]:
    """The decoding steps."""
    rows = [row for row in result.get("decode", []) if "us" in row]
    if rows:
        yield "Decoding step:"
        cells = [
            [row["what"], str(row["batch"]), f"{row['us']:.1f}", f"{row['tb_s']:.2f}", f"{row['share_of_copy']:.0%}"]
            for row in rows
        ]
        yield table(["backend", "batch", "us", "TB/s on the cache's bytes", "of the copy"], cells)


def document_lines(result: dict) -> Iterator[str]:
    """The packed documents against one."""
    rows = [row for row in result.get("documents", []) if "forward" in row]
    for one, packed in zip(rows[::2], rows[1::2], strict=False):
        yield (
            f"Packed documents, {packed['documents']} in a row of {packed['length'] // 1024}K at r={packed['ratio']}, "
            f"`{packed['what']}`: {milliseconds(packed)} ms against {milliseconds(one)} ms as one document, "
            f"{gain(packed, one)} times as fast."
        )


def missing_lines(result: dict) -> Iterator[str]:
    """What was not measured, and why; cases of one reason together."""
    reasons: dict[str, dict[str, dict]] = {}  # of each, the cases, and of each case the contenders, in order
    for kind in KINDS:
        for row in result.get(kind, []):
            if "reason" in row:
                case = [f"{k} {v}" for k, v in row.items() if k not in NO_CASE]
                if "query" in row:
                    case.append("heads " + "x".join(str(row[x]) for x in SHAPE))
                contenders = reasons.setdefault(row["reason"], {}).setdefault(", ".join(case), {})
                contenders[f"{row['what']} r={row['ratio']}" if "ratio" in row else row["what"]] = None
    if reasons:
        yield "Not measured:"
        for reason, cases in reasons.items():
            told = "; ".join(f"{', '.join(contenders)} ({case})" for case, contenders in cases.items())
            yield f"- {reason}: {told}"


def device_said(groups: list[dict]) -> str:
    """Rates of the device, clock and power under attention, as far as measured: from the least to the largest group."""
    told = []
    for kinds, name, what, form, unit in (
        (KINDS, "copy_tb_s", "copy", ".2f", "TB/s"),
        (KINDS, "matmul_tflop_s", "matrix product", ".0f", "TFLOP/s"),
        (KINDS[:1], "sm_mhz", "clock", ".0f", "MHz"),
        (KINDS[:1], "watts", "power", ".0f", "W"),
    ):
        found = [group[name] for group in groups if name in group and group["kind"] in kinds]
        if found := [x[1] if isinstance(x, list) else x for x in found]:  # of least, median and largest the median
            ends = dict.fromkeys(format(x, form) for x in (min(found), max(found)))
            told.append(f"{what} {' to '.join(ends)} {unit}")
    return f" By group: {', '.join(told)}." if told else ""


def tables(result: dict) -> str:
    """The measurements as Markdown."""
    releases = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    intro = (
        f"{result['device']}, {releases}; batch 1, bf16, medians of {result['repeats']} rounds."
        f"{device_said(result['groups'])}"
    )
    parts = [command_block(result["commands"]), intro, *attention_tables(result), *decode_table(result)]
    parts += [*document_lines(result), *missing_lines(result)]
    return "\n\n".join(parts) + "\n"


def plot(result: dict, path: Path) -> None:
    """Speed-up over cuDNN causal attention, and share of the matrix rate, against length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    attention, shape = Attention(result), tuple(result["shape"][x] for x in SHAPE)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for backend in result["backends"]:
        cases = attention.cases(backend, shape)
        for ratio in sorted({ratio for _, ratio in cases}):
            lengths = [length for length, r in cases if r == ratio]
            own = {length: attention.get(backend, length, ratio, shape) for length in lengths}
            causal = {length: attention.get("cudnn", length, ratio, shape) for length in lengths}
            compared = [length for length in lengths if causal[length] and "forward" in causal[length]]
            for part, style in (("forward", "o-"), ("both", "s--")):
                label = f"{backend} r={ratio} {'forward' if part == 'forward' else 'forward + backward'}"
                left.plot(
                    [x // 1024 for x in compared], [times_as_fast(own[x], causal[x], part) for x in compared], style
                )
                right.plot([x // 1024 for x in lengths], [own[x][f"share_{part}"] for x in lengths], style, label=label)
    left.set(ylabel="speed-up over cuDNN causal", ylim=(0, None))
    right.set(ylabel="useful work over the measured matrix rate", ylim=(0, 1))
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set(xlabel="raw tokens (K)")
        axes.grid(alpha=0.3)
    right.legend(fontsize="small")
    figure.savefig(path, bbox_inches="tight", dpi=120)
    pyplot.close(figure)


REPORT = Report(tables, plot, "speed-up and share of the matrix rate")
