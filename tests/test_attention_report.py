"""What launch.bench_attention makes of its raw figures, without a GPU."""

import json

import pytest

from launch import attention_report
from launch.markdown import marks

BASE, WIDE = ({"query": 8, "kv": kv, "dim": 128} for kv in (2, 8))


def row(what, length, forward, both, **rest):
    """A row of three rounds; in the last one the device was slower."""
    samples = {"forward": [forward] * 2 + [2 * forward], "both": [both] * 2 + [2 * both]}
    return {"what": what, "length": length, "forward": forward, "both": both, "samples": samples} | rest


SHARES = {"share_forward": 0.8, "share_both": 0.6}
RESULT = {
    "commands": ["python -m launch.bench_attention"],
    "device": "a device",
    "versions": {"jax": "0.0"},
    "repeats": 3,
    "backends": ["hopper"],
    "shape": BASE | {"sinks": 4, "window": 8},
    "groups": [
        {"kind": "attention", "matmul_tflop_s": 700.0, "sm_mhz": [1200, 1410, 1980], "watts": [600, 690, 700]},
        {"kind": "flex", "matmul_tflop_s": 650.0},
        {"kind": "decode", "copy_tb_s": 3.0, "sm_mhz": [1900, 1980, 1980], "watts": [300, 400, 500]},
    ],
    "decode": [{"what": "hopper", "batch": 1, "us": 50.0, "tb_s": 2.7, "share_of_copy": 0.9}],
    "attention": [
        row("cudnn", 32768, 12.0, 45.0, **BASE),
        row("hopper", 32768, 4.0, 15.0, ratio=4, **BASE, **SHARES),
        row("hopper", 32768, 5.0, 16.0, ratio=4, **WIDE, **SHARES),
        *({"what": "folded", "length": 32768, "ratio": r, "reason": "RuntimeError: no plan"} | BASE for r in (4, 8)),
    ],
    "flex": [
        row("hopper", 32768, 4.5, 20.0, ratio=4, **BASE, **SHARES),
        row("flex", 32768, 9.0, 50.0, ratio=4, **BASE),
    ],
    "documents": [
        row("hopper", 131072, 60.0, 300.0, ratio=4, documents=1),
        row("hopper", 131072, 10.0, 60.0, ratio=4, documents=16),
    ],
}


def test_tables_pair_each_time_with_its_peers_of_the_same_group():
    text = attention_report.tables(RESULT)
    head = (
        "| raws | r | hopper ms | cuDNN causal | FlexAttention | over cuDNN causal | over FlexAttention | share of the"
    )
    assert head in text
    assert "| 32K | 4 | 4 / 15 | 12 / 45 | 9 / 50 | 3.00 / 3.00 | 2.00 / 2.50 | 80% / 60% |" in text
    assert "8 query heads, 8 KV heads" in text and "| 32K | 4 | 5 / 16 | 80% / 60% |" in text  # no peer of that shape
    assert "| hopper | 1 | 50.0 | 2.70 | 90% |" in text
    assert "16 in a row of 128K" in text and "6.00 / 5.00 times as fast" in text
    assert "- RuntimeError: no plan: folded r=4, folded r=8 (length 32768, heads 8x2x128)" in text
    assert "copy 3.00 TB/s, matrix product 650 to 700 TFLOP/s, clock 1410 MHz, power 690 W." in text


def test_a_speed_up_is_the_median_of_the_ratios_within_a_round():
    """Not the ratio of medians: here the clock halves after the first round, and a sample of the peer is an outlier."""
    own = {"forward": 2.0, "samples": {"forward": [1.0, 2.0, 2.0]}}
    peer = {"forward": 8.0, "samples": {"forward": [3.0, 6.0, 9.0]}}
    assert attention_report.times_as_fast(own, peer, "forward") == 3.0


def test_runs_that_measured_different_groups_become_one():
    kinds = ("attention", "flex", "decode", "documents")
    first, second = ({k: v for k, v in RESULT.items() if k not in kinds} for _ in range(2))
    first |= {k: RESULT[k] for k in kinds[1:]}
    first["decode"] = [{"what": "hopper", "batch": 1, "reason": "no time"}]
    second |= {"attention": RESULT["attention"], "decode": RESULT["decode"], "commands": ["another"], "groups": []}
    both = attention_report.merged([first, second])
    assert {k: both[k] for k in (*kinds, "groups")} == {k: RESULT[k] for k in (*kinds, "groups")}
    assert "    python -m launch.bench_attention\n    another\n" in attention_report.tables(both)
    with pytest.raises(ValueError, match="different device cannot be merged: a device and b"):
        attention_report.merged([first, second | {"device": "b"}])
    with pytest.raises(ValueError, match=r"two runs measured the same case: \('cudnn', 32768"):
        attention_report.merged([RESULT, second])


def test_tables_go_between_the_marks_and_the_plot_beside_the_figures(tmp_path):
    pytest.importorskip("matplotlib")
    raw, page = tmp_path / "data" / "figures.json", tmp_path / "page.md"
    raw.parent.mkdir()
    raw.write_text(json.dumps(RESULT))
    page.write_text("before\n")
    with pytest.raises(ValueError, match=r"page.md needs the lines <!-- data/figures.json: begin -->"):
        attention_report.REPORT.write(raw, page)
    begin, end = marks(raw, page)
    page.write_text(f"before\n{begin}\nstale\n{end}\nafter\n")
    for _ in range(2):
        attention_report.REPORT.write(raw, page)
        text = page.read_text()
        assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text
        assert text.count("3.00 / 3.00") == 1 and "](data/figures.png)" in text
    assert raw.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
