"""What launch.bench_attention makes of its raw figures, without a GPU."""

import json

import pytest

from launch import attention_report

BASE, WIDE = ({"query": 8, "kv": kv, "dim": 128} for kv in (2, 8))
RESULT = {
    "command": "python -m launch.bench_attention",
    "device": "a device",
    "versions": {"jax": "0.0"},
    "repeats": 10,
    "backends": ["hopper"],
    "shape": BASE | {"sinks": 4, "window": 8},
    "ceilings": {"copy_tb_s": 3.0, "matmul_tflop_s": 700.0},
    "decode": [{"what": "hopper", "batch": 1, "us": 50.0, "tb_s": 2.7, "share_of_copy": 0.9}],
    "attention": [
        {"what": "cudnn", "length": 32768, "forward": 12.0, "both": 45.0} | BASE,
        {"what": "hopper", "length": 32768, "ratio": 4, "forward": 4.0, "both": 15.0} | BASE
        | {"share_forward": 0.8, "share_both": 0.6},
        {"what": "flex", "length": 32768, "ratio": 4, "reason": "RuntimeError: torch is not installed"} | BASE,
        {"what": "hopper", "length": 32768, "ratio": 4, "forward": 5.0, "both": 16.0} | WIDE
        | {"share_forward": 0.7, "share_both": 0.5},
    ],
    "documents": [
        {"what": "hopper", "length": 131072, "ratio": 4, "documents": 1, "forward": 60.0, "both": 300.0},
        {"what": "hopper", "length": 131072, "ratio": 4, "documents": 16, "forward": 10.0, "both": 60.0},
    ],
}  # fmt: skip


def test_tables_pair_each_time_with_its_peers():
    text = attention_report.tables(RESULT)
    assert "| raws | r | hopper ms | cuDNN causal | over cuDNN causal | share of the matrix rate |" in text
    assert "| 32K | 4 | 4 / 15 | 12 / 45 | 3.00 / 3.00 | 80% / 60% |" in text
    assert "8 query heads, 8 KV heads" in text and "| 32K | 4 | 5 / 16 | 70% / 50% |" in text  # no peer of that shape
    assert "| hopper | 1 | 50.0 | 2.70 | 90% |" in text
    assert "16 in a row of 128K" in text and "6.00 / 5.00 times as fast" in text
    assert "- RuntimeError: torch is not installed: flex (length 32768, ratio 4, heads 8x2x128)" in text


def test_tables_go_between_the_marks_and_the_plot_beside_the_figures(tmp_path):
    pytest.importorskip("matplotlib")
    raw, page = tmp_path / "data" / "figures.json", tmp_path / "page.md"
    raw.parent.mkdir()
    raw.write_text(json.dumps(RESULT))
    page.write_text("before\n")
    with pytest.raises(ValueError, match=r"page.md needs the lines <!-- attention tables: begin -->"):
        attention_report.REPORT.write(raw, page)
    begin, end = attention_report.REPORT.marks
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    for _ in range(2):
        attention_report.REPORT.write(raw, page)
        text = page.read_text()
        assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
        assert text.count("3.00 / 3.00") == 1 and "](data/figures.png)" in text
    assert raw.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
