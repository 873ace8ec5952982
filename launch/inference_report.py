"""Tables and plot of what launch.bench_inference measured, from its raw JSON."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from launch.markdown import Report, command_block, table

GIB = 2**30
Record = dict


def system(record: Record) -> str:
    """A system's name in a table."""
    names = {"full": "full attention (cuDNN)", "transformers": "transformers (sdpa)", "unigist": "UniGist"}
    name = names.get(record["system"], record["system"]) + (f" r={record['ratio']}" if record["ratio"] else "")
    devices = record.get("tensor", 1)
    return f"{name}, {devices} devices" if devices > 1 else name


def tokens(count: int) -> str:
    """A number of tokens: in K where it is whole."""
    return f"{count // 1024}K" if count % 1024 == 0 else f"{count:,}"


def floor_ratio(record: Record) -> float | None:
    """Time a token over that of reading weights and cache once at the measured rate of a copy."""
    if "copy_bytes_s" not in record or "tpot_s" not in record:
        return None
    return record["tpot_s"] * record["copy_bytes_s"] / record["step_bytes"]


def line(record: Record) -> str:
    """One case in one line, as soon as it is measured."""
    if "error" in record:
        return f"{record['name']}: {record['error']}"
    shown = [f"{name} {record[name]:.4g}" for name in ("ttft_s", "tpot_s", "total_s", "tokens_s") if name in record]
    shown += [f"{name} {record[name] / GIB:.2f} GiB" for name in ("cache_bytes", "peak_bytes") if name in record]
    shown += [f"{size}: {s:.2f} s" for size, s in record.get("seconds_by_chunk", {}).items()]
    ratio = floor_ratio(record)
    shown += [f"over the copy's time {ratio:.2f}"] if ratio else []
    shown += [f"{name} {record[name]:.1f}" for name in ("last_chunk_s", "first_call_s", "process_s") if name in record]
    return f"{record['name']} on {record['device']}: {', '.join(shown)}"


def _number(record: Record, name: str, form: str, scale: float = 1.0) -> str:
    return form.format(record[name] * scale) if name in record else ""


def _memory(record: Record) -> list[str]:
    names = "weights_bytes", "cache_bytes", "temporary_bytes", "peak_bytes"
    return [_number(record, name, "{:.2f}", 1 / GIB) for name in names]


MEMORY = ["weights GiB", "cache GiB", "temporary GiB", "peak GiB"]


def _setting(record: Record) -> tuple[int, int, int]:
    """What systems have in common that a table compares."""
    return record["batch"], record["context"], record.get("tensor", 1)


def latency_table(records: list[Record]) -> Iterator[str]:
    """Time to the first token and between tokens."""
    rows = []
    for r in sorted((r for r in records if r["kind"] == "latency"), key=lambda r: (r["batch"], r["context"])):
        same = (x for x in records if x["kind"] == "latency" and _setting(x) == _setting(r))
        by_system = {x["system"]: x for x in same if x["system"] != "unigist"}
        cells = [tokens(r["context"]), str(r["batch"]), system(r), _number(r, "ttft_s", "{:,.0f}", 1e3)]
        cells += [_number(r, "tpot_s", "{:.2f}", 1e3), _number(r, "total_s", "{:,.0f}", 1e3)]
        cells.append(f"{r['batch'] / r['tpot_s']:,.1f}")
        for peer in ("full", "transformers"):
            other = by_system.get(peer)
            gains = (
                [f"{other[name] / r[name]:.2f}" for name in ("ttft_s", "tpot_s")] if other and other is not r else []
            )
            cells.append(" · ".join(gains))
        ratio = floor_ratio(r)
        rows.append([*cells, f"{ratio:.2f}" if ratio else "", *_memory(r), _number(r, "first_call_s", "{:.0f}")])
    if rows:
        head = ["context", "batch", "system", "TTFT ms", "TPOT ms", "total ms", "tokens/s", "over full (TTFT · TPOT)"]
        head += ["over transformers", "TPOT / copy's time", *MEMORY, "first call s"]
        yield f"Reading a prompt and generating {records[0]['new_tokens']} tokens:"
        yield table(head, rows)


def batch_table(records: list[Record]) -> Iterator[str]:
    """Decoding of the largest batches."""
    found = [r for r in records if r["kind"] == "decode"]
    full = next((r for r in found if r["system"] == "full"), None)
    rows = [
        [
            tokens(r["context"]), system(r), str(r["batch"]), f"{r['tpot_s'] * 1e3:.2f}", f"{r['tokens_s']:,.0f}",
            f"{r['tokens_s'] / full['tokens_s']:.2f}" if full and r is not full else "",
            f"{floor_ratio(r):.2f}", *_memory(r),
        ]
        for r in found
    ]  # fmt: skip
    if rows:
        yield "Decoding up to that length, from random keys and values, with the largest batch that fits the device:"
        head = ["context", "system", "batch", "step ms", "tokens/s", "over full", "step / copy's time", *MEMORY]
        yield table(head, rows)


def limit_table(records: list[Record]) -> Iterator[str]:
    """The longest contexts under a limit of memory."""
    rows = [
        [
            system(r), f"{r['context']:,} ({r['context'] / 1024:,.0f}K)", f"{r['memory_gib']:g}",
            _number(r, "used_bytes", "{:.2f}", 1 / GIB), _number(r, "limit_bytes", "{:.2f}", 1 / GIB),
            f"{r['tpot_s'] * 1e3:.2f}", f"{r['last_chunk_s'] * 1e3:,.0f}", *_memory(r),
        ]
        for r in records
        if r["kind"] == "limit"
    ]  # fmt: skip
    if rows:
        chunk = next(r["chunk_size"] for r in records if r["kind"] == "limit")
        yield (
            f"The longest context that a process limited in memory read a chunk of {chunk:,} at the end of, and then "
            "decoded from; what comes before that chunk is random keys and values:"
        )
        head = [
            "system",
            "context",
            "limit GiB",
            "used of the device GiB",
            "jax's pool GiB",
            "TPOT ms",
            "last chunk ms",
        ]
        yield table([*head, *MEMORY], rows)


def chunk_table(records: list[Record]) -> Iterator[str]:
    """Prefill by the size of its chunks."""
    found = [r for r in records if r["kind"] == "chunks"]
    if found:
        sizes = list(found[0]["seconds_by_chunk"])
        rows = [
            [tokens(r["context"]), system(r), *(f"{r['seconds_by_chunk'].get(size, 0):.3f}" for size in sizes)]
            for r in found
        ]
        yield "Seconds to read a prompt, by the raws of a chunk:"
        yield table(["context", "system", *(f"{int(size):,}" for size in sizes)], rows)


def tables(result: dict) -> str:
    """The measurements as Markdown: the commands, then device by device."""
    parts = [command_block(result["commands"])]
    measured = [record for record in result["records"] if "error" not in record]
    for device in dict.fromkeys(record["device"] for record in measured):
        records = [record for record in measured if record["device"] == device]
        releases = {k: r[k] for r in records for k in ("jax", "torch", "transformers") if k in r}
        rates = [r["copy_bytes_s"] for r in records if "copy_bytes_s" in r]
        copies = f" It copies {min(rates) / 1e12:.2f} to {max(rates) / 1e12:.2f} TB/s." if rates else ""
        versions = ", ".join(f"{k} {v}" for k, v in releases.items())
        parts.append(f"{device}, {versions}, {records[0]['shape']}.{copies}")
        for part in (latency_table, batch_table, limit_table, chunk_table):
            parts.extend(part(records))
    fitting = {(record["system"], record["ratio"]) for record in measured if record["kind"] == "limit"}
    failed = [
        record
        for record in result["records"]
        if "error" in record and not (record["kind"] == "limit" and (record["system"], record["ratio"]) in fitting)
    ]
    if failed:
        parts.append("Not measured:")
        parts.append("\n".join(f"- {record['name']}: {record['error']}" for record in failed))
    return "\n\n".join(parts) + "\n"


def plot(result: dict, path: Path) -> None:
    """Time to the first token, time a token and peak memory against the context, at the batch of most cases."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [r for r in result["records"] if r["kind"] == "latency" and "error" not in r]
    if not records:
        return
    batches = [r["batch"] for r in records]
    records = [r for r in records if r["batch"] == max(batches, key=batches.count)]
    figure, panels = pyplot.subplots(1, 3, figsize=(14, 4))
    for name in dict.fromkeys(map(system, records)):
        own = sorted((r for r in records if system(r) == name), key=lambda r: r["context"])
        for axes, (key, scale) in zip(panels, (("ttft_s", 1), ("tpot_s", 1e3), ("peak_bytes", 1 / GIB)), strict=True):
            points = [(r["context"] // 1024 or r["context"] / 1024, r[key] * scale) for r in own if key in r]
            axes.plot(*zip(*points, strict=True), "o-", label=name) if points else None
    for axes, label in zip(
        panels, ("time to the first token (s)", "time a token (ms)", "peak memory (GiB)"), strict=True
    ):
        axes.set(xlabel="context (K tokens)", ylabel=label, ylim=(0, None))
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize="small")
    figure.savefig(path, bbox_inches="tight", dpi=120)
    pyplot.close(figure)


REPORT = Report(tables, plot, "times and memory")
