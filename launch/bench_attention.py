"""Benchmark of the attention kernels on a GPU against their peers, in one process, on random data.

    export XLA_PYTHON_CLIENT_PREALLOCATE=false     # PyTorch, which runs one of the peers, needs memory too
    python -m launch.bench_attention --out=DIR                                # DIR/bench_attention.{json,md,png}
    python -m launch.bench_attention --backends=triton --lengths=32768,131072 --peers=flex --out=DIR

Peers, all with the same heads, sinks and window: jax's cuDNN causal attention on the T raws, folded cuDNN (sinks and
gists alone) and PyTorch's FlexAttention with the gist-shifted block mask (launch/peers.py). Ceilings: a device copy,
counting bytes read and written, and a bf16 matrix product. What a machine lacks is recorded with its reason. Times are
medians of `--repeats` samples after warm-up (launch/timing.py). Correctness is the business of tests/test_kernels.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags

from launch import peers
from launch.flags import run_main
from launch.timing import ceilings, milliseconds, normal, with_backward
from pallas_kernels.backends import BACKENDS, choose, usable_backends
from pallas_kernels.gist_attention import GistKV
from unigist_jax.layout import GistLayout, unit_starts

LENGTHS = flags.DEFINE_list("lengths", ["16384", "32768", "65536", "131072", "262144"], "raw tokens")
RATIOS = flags.DEFINE_list("ratios", ["4", "8"], "raw tokens per gist")
BACKEND = flags.DEFINE_list("backends", None, "backends to time (default: the best one here)")
HEADS = flags.DEFINE_integer("heads", 32, "query heads")
KV_HEADS = flags.DEFINE_integer("kv_heads", 8, "KV heads")
DIM = flags.DEFINE_integer("dim", 128, "head dim")
SINKS = flags.DEFINE_integer("sinks", 128, "sinks")
WINDOW = flags.DEFINE_integer("window", 128, "local window in raw tokens")
REPEATS = flags.DEFINE_integer("repeats", 10, "timed samples of each case", lower_bound=1)
PEERS = flags.DEFINE_list("peers", ["cudnn", "folded", "flex"], "which peers to time")
DECODE = flags.DEFINE_list("decode_batches", ["1", "16"], "batch sizes of the decoding step; empty for none")
DECODE_CONTEXT = flags.DEFINE_integer("decode_context", 131072, "raws of context of the decoding step")
DOCUMENTS = flags.DEFINE_integer("documents", 16, "packed documents in a 128K row at the first ratio; 0 for none")
OUT = flags.DEFINE_string("out", "", "directory for the raw JSON, the tables and the plot")

PARTS = ("forward", "both")  # both: forward + backward


def heads() -> peers.Heads:
    """Those of the flags."""
    return peers.Heads(HEADS.value, KV_HEADS.value, DIM.value)


def layout_of(ratio: int) -> GistLayout:
    """The flags' layout at a ratio."""
    return GistLayout(ratio, SINKS.value, WINDOW.value)


def inputs(layout: GistLayout, num_units: int) -> tuple[jax.Array, GistKV, jax.Array]:
    """Queries, keys and values of a segment of one sequence, and a cotangent."""
    kv_shape, raws = (KV_HEADS.value, DIM.value), num_units * layout.ratio
    q_shape = (1, num_units + raws, HEADS.value, DIM.value)
    lengths = ((layout.num_sinks,), (1, num_units), (1, raws))
    kv = GistKV(*(normal(2 * i + j, *length, *kv_shape) for i, length in enumerate(lengths) for j in (0, 1)))
    return normal(7, *q_shape), kv, normal(8, *q_shape)


def attend(backend: str, layout: GistLayout, num_units: int, doc_start=None) -> Callable:
    """A backend as a function of q and kv."""
    starts = unit_starts(layout, num_units, jnp.int32(0), doc_start)
    return lambda q, kv: choose(backend, q, kv, layout)[1].attend(q, kv, layout, 0, 0, starts)


def exact_flops(layout: GistLayout, num_units: int) -> float:
    """Floating-point operations of the forward pass that no implementation can avoid."""
    r, u = layout.ratio, num_units
    gists = r * u * (u - 1) / 2 + u * (u + 1) / 2
    raws = u * (r * layout.window + r * (r + 1) / 2) + u * (layout.window + r)
    return 4 * DIM.value * HEADS.value * (gists + raws + (r + 1) * u * layout.num_sinks)


def first_line(error: Exception) -> str:
    """An error in a table's cell."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]


def attempt(name: str, measure: Callable[[], tuple[float, float]]) -> dict:
    """`NAME_forward` and `NAME_both`; or `NAME_reason`, since a peer that breaks must not take the others with it."""
    try:
        forward, both = measure()
    except Exception as error:
        return {f"{name}_reason": first_line(error)}
    return {f"{name}_forward": forward, f"{name}_both": both}


def flex(layout: GistLayout, num_units: int) -> tuple[float, float]:
    """FlexAttention's times. Raises RuntimeError where it cannot run."""
    times = peers.flex_times(layout, num_units, heads(), REPEATS.value)
    if times.reason:
        raise RuntimeError(times.reason)
    return times.forward, times.both


def bench_length(length: int, ratio: int, backends: list[str], causal: dict, matmul: float) -> dict:
    """One row: ms of each backend and peer; each backend's speed-ups over cuDNN and share of the matrix rate."""
    layout, units = layout_of(ratio), length // ratio
    row = {"length": length, "ratio": ratio} | causal
    flops = exact_flops(layout, units)
    for backend in backends:
        q, kv, cotangent = inputs(layout, units)
        forward, both = with_backward(attend(backend, layout, units))
        row[f"{backend}_forward"] = milliseconds(forward, q, kv, repeats=REPEATS.value)
        row[f"{backend}_both"] = milliseconds(both, q, kv, cotangent, repeats=REPEATS.value)
        row[f"{backend}_share_forward"] = flops / row[f"{backend}_forward"] / 1e9 / matmul
        row[f"{backend}_share_both"] = 3.5 * flops / row[f"{backend}_both"] / 1e9 / matmul
        del q, kv, cotangent
    if "folded" in PEERS.value:
        row |= attempt("folded", lambda: peers.folded_times(layout, units, heads(), REPEATS.value))
    if "flex" in PEERS.value:
        row |= attempt("flex", lambda: flex(layout, units))
    return row


def bench_documents(ratio: int, backend: str) -> dict:
    """A 128K row packed with equal documents against one document of the same length."""
    length = 131072
    layout, units = layout_of(ratio), length // ratio
    q, kv, cotangent = inputs(layout, units)
    size = units // DOCUMENTS.value
    doc_start = (jnp.arange(units, dtype=jnp.int32) // size * size)[None]
    row = {"length": length, "ratio": ratio, "backend": backend, "documents": DOCUMENTS.value}
    for name, starts in (("one", None), ("packed", doc_start)):
        forward, both = with_backward(attend(backend, layout, units, starts))
        row[f"{name}_forward"] = milliseconds(forward, q, kv, repeats=REPEATS.value)
        row[f"{name}_both"] = milliseconds(both, q, kv, cotangent, repeats=REPEATS.value)
    return row


def bench_decode(batch: int, backend: str, copy_tb_s: float) -> dict:
    """One decoding step: microseconds, and the share of the copy bandwidth on the cache's bytes."""
    layout = layout_of(4)
    gists, ring = DECODE_CONTEXT.value // layout.ratio, layout.window + layout.ratio
    sets = 6 if batch == 1 else 1  # enough that no cache stays in L2
    caches = []
    for i in range(sets):
        lengths = ((layout.num_sinks,), (batch, gists), (batch, ring))
        kv = (normal(10 * i + j, *shape, KV_HEADS.value, DIM.value) for j, shape in enumerate(lengths) for _ in (0, 1))
        caches.append((normal(10 * i + 9, batch, 2, HEADS.value, DIM.value), GistKV(*kv)))
    raw_index = jnp.full((batch,), gists * layout.ratio - 1, jnp.int32)
    module = choose(backend, *caches[0], layout, decode=True)[1]
    step = jax.jit(lambda caches: [module.decode(q, kv, layout, raw_index) for q, kv in caches])
    ms = milliseconds(step, caches, repeats=REPEATS.value) / sets
    tb_s = sum(x.nbytes for x in caches[0][1]) / ms / 1e9
    return {"batch": batch, "backend": backend, "us": ms * 1e3, "tb_s": tb_s, "share_of_copy": tb_s / copy_tb_s}


def tables(result: dict) -> str:
    """The measurements as Markdown."""
    lines = [f"{result['device']}, jax {result['jax']}, `{result['command']}`", ""]

    def times(row, name):
        both = [row.get(f"{name}_{part}") for part in PARTS]
        return " / ".join(f"{x:.3g}" for x in both) if all(both) else row.get(f"{name}_reason", "")

    shown = [name for name in ("cudnn", "folded", "flex") if name in result["peers"]]
    for backend in result["backends"]:
        lines += [
            f"| raws | r | {backend} ms | {' | '.join(shown)} | over cuDNN | share of the matrix rate |",
            "|---" * (5 + len(shown)) + "|",
        ]
        for row in result.get("lengths", []):
            cells = [
                f"{row['length'] // 1024}K",
                str(row["ratio"]),
                times(row, backend),
                *(times(row, x) for x in shown),
            ]
            if "cudnn_both" in row:
                cells.append(
                    " / ".join(f"{row[f'cudnn_{x}'] / row[f'{backend}_{x}']:.2f}" for x in ("forward", "both"))
                )
            else:
                cells.append("")
            cells.append(" / ".join(f"{row[f'{backend}_share_{x}']:.0%}" for x in ("forward", "both")))
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    if "decode" in result:
        lines += ["| decode | batch | us | TB/s | of the copy |", "|---|---|---|---|---|"]
        for row in result["decode"]:
            cells = (
                row["backend"],
                row["batch"],
                f"{row['us']:.1f}",
                f"{row['tb_s']:.2f}",
                f"{row['share_of_copy']:.0%}",
            )
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines.append("")
    for row in result.get("documents", []):
        gains = (row[f"one_{x}"] / row[f"packed_{x}"] for x in PARTS)
        lines.append(
            f"{row['documents']} documents in {row['length'] // 1024}K, r={row['ratio']}, {row['backend']}: "
            f"{' / '.join(f'{x:.1f}' for x in gains)} times as fast as one (forward / forward + backward)"
        )
    return "\n".join(lines) + "\n"


def plot(result: dict, path: Path) -> None:
    """Speed-up over cuDNN causal attention, and share of the matrix rate, against length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for backend in result["backends"]:
        for ratio in sorted({row["ratio"] for row in result["lengths"]}):
            rows = [row for row in result["lengths"] if row["ratio"] == ratio]
            lengths = [row["length"] // 1024 for row in rows]
            for part, style in (("forward", "o-"), ("both", "s--")):
                label = f"{backend} r={ratio} {'forward' if part == 'forward' else 'forward + backward'}"
                if "cudnn_both" in rows[0]:
                    left.plot(lengths, [r[f"cudnn_{part}"] / r[f"{backend}_{part}"] for r in rows], style, label=label)
                right.plot(lengths, [r[f"{backend}_share_{part}"] for r in rows], style, label=label)
    left.set(ylabel="speed-up over cuDNN causal")
    right.set(ylabel="useful work over the measured matrix rate")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set(xlabel="raw tokens (K)")
    right.legend(fontsize="small")
    figure.savefig(path, bbox_inches="tight", dpi=120)
    pyplot.close(figure)


def main(_: list[str]) -> None:
    if jax.default_backend() != "gpu":
        raise ValueError(f"this benchmark times GPU kernels; this is {jax.devices()[0].device_kind}")
    backends = BACKEND.value or usable_backends()[:1]
    for name in backends:
        if name not in usable_backends():
            reason = BACKENDS[name].obstacle(jax.devices()[0]) if name in BACKENDS else "is no backend"
            raise ValueError(f"--backends={name}: {reason}; usable here: {', '.join(usable_backends())}")
    lengths, ratios = ([int(x) for x in flag.value] for flag in (LENGTHS, RATIOS))
    if unknown := set(PEERS.value) - {"cudnn", "folded", "flex"}:
        raise ValueError(f"--peers={','.join(sorted(unknown))}: choose among cudnn, folded, flex")
    result = {
        "command": " ".join(["python -m launch.bench_attention", *sys.argv[1:]]),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "repeats": REPEATS.value,
        "backends": backends,
        "peers": PEERS.value,
        "shape": heads()._asdict() | {"sinks": SINKS.value, "window": WINDOW.value},
    }
    out = Path(OUT.value) if OUT.value else None
    if out:
        out.mkdir(parents=True, exist_ok=True)

    def record(key, row):
        result.setdefault(key, []).append(row)
        print(key, " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
        if out:
            (out / "bench_attention.json").write_text(json.dumps(result, indent=1))

    record("ceilings", ceilings(REPEATS.value))
    for batch in DECODE.value:
        for backend in backends:
            record("decode", bench_decode(int(batch), backend, result["ceilings"][0]["copy_tb_s"]))
    for length in lengths:
        causal = {}
        if "cudnn" in PEERS.value:
            causal = attempt("cudnn", lambda length=length: peers.cudnn_times(length, heads(), REPEATS.value))
        for ratio in ratios:
            record("lengths", bench_length(length, ratio, backends, causal, result["ceilings"][0]["matmul_tflop_s"]))
    if DOCUMENTS.value:
        record("documents", bench_documents(ratios[0], backends[0]))
    print(tables(result))
    if out:
        (out / "bench_attention.md").write_text(tables(result))
        plot(result, out / "bench_attention.png")


if __name__ == "__main__":
    run_main(main)
