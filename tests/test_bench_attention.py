"""launch.bench_attention without a GPU: a backend that runs anywhere is timed, what fails is recorded."""

import math
import time

import jax
import pytest
from absl import flags
from absl.testing import flagsaver

from launch import attention_report
from launch import bench_attention as bench


@pytest.fixture
def small():
    """Flags of sizes that a CPU times in a second."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["bench_attention"])
    sizes = {"heads": 2, "kv_heads": 1, "dim": 16, "sinks": 4, "window": 8, "decode_context": 64, "documents": 0}
    cases = {"lengths": ["64"], "ratios": ["4"], "decode_batches": ["1"], "shapes": ["2x2x16"], "shape_lengths": ["32"]}
    with flagsaver.flagsaver(repeats=2, peers=["cudnn"], **sizes, **cases):
        yield


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="cuDNN would run")
def test_every_case_is_timed_and_what_fails_is_recorded_with_its_reason(small, monkeypatch):
    monkeypatch.setattr("launch.timing.WINDOW_SECONDS", 1e-3)
    limits = {"copy_tb_s": 1.0, "matmul_tflop_s": 1.0}
    jobs = bench.all_jobs(["blocked"], limits)
    result = {"backends": ["blocked"], "shape": {"sinks": 4, "window": 8}}
    for kind, row in bench.measured(jobs, bench.compiled(jobs, threads=2), math.inf):
        result.setdefault(kind, []).append(row)
    assert result["decode"][0]["us"] > 0
    cudnn, blocked = result["attention"][:2]
    assert cudnn["what"] == "cudnn" and "forward" not in cudnn and "cudnn" in cudnn["reason"].lower()
    assert 0 < blocked["forward"] < blocked["both"] and blocked["share_forward"] > 0
    text = "\n".join(attention_report.attention_tables(result))
    assert "2 query heads, 1 KV heads" in text and "2 query heads, 2 KV heads" in text


def test_no_measurement_begins_after_the_budget():
    taken = []
    jobs = [bench.Job("attention", {"what": str(i)}, lambda i=i: lambda: taken.append(i) or {}) for i in range(2)]
    rows = [row for _, row in bench.measured(jobs, bench.compiled(jobs, threads=1), time.perf_counter() - 1)]
    assert not taken and [row["reason"] for row in rows] == ["not begun within the budget"] * 2
