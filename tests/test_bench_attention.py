"""launch.bench_attention without a GPU: a backend that runs anywhere is timed, what fails is recorded."""

import math
import time

import jax
import pytest
from absl import flags
from absl.testing import flagsaver

from launch import attention_report, by_turns, device_state
from launch import bench_attention as bench
from launch.timing import Program


@pytest.fixture
def small():
    """Flags of sizes that a CPU times in a second."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["bench_attention"])
    sizes = {"heads": 2, "kv_heads": 1, "dim": 16, "sinks": 4, "window": 8, "decode_context": 64, "documents": 0}
    lengths = {"lengths": ["64"], "more_lengths": [], "flex_lengths": ["64"], "shape_lengths": ["32"]}
    cases = {"ratios": ["4"], "decode_batches": ["1"], "shapes": ["2x2x16"], "peers": ["cudnn", "flex"]}
    with flagsaver.flagsaver(repeats=2, **sizes, **lengths, **cases):
        yield


@pytest.fixture
def quick(monkeypatch):
    """Samples of a millisecond, and yardsticks of a size for them."""
    monkeypatch.setattr("launch.timing.WINDOW_SECONDS", 1e-3)
    rate = dict.fromkeys(("matmul", "copy"), (lambda: Program(lambda: jax.numpy.ones(8)), "rate", lambda ms: 1 / ms))
    monkeypatch.setattr(by_turns, "YARDSTICKS", rate)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="cuDNN would run")
def test_every_case_is_timed_and_what_fails_is_recorded_with_its_reason(small, quick):
    groups = bench.all_groups(["blocked"])
    result = {"backends": ["blocked"], "shape": {"sinks": 4, "window": 8}, "groups": []}
    for group, rows, state in by_turns.measured(groups, by_turns.compiled(groups, threads=2), 2, math.inf):
        result.setdefault(group.kind, []).extend(rows)
        assert state["rounds"] == 2 and state["rate"] > 0
    assert result["decode"][0]["us"] > 0
    cudnn, blocked = result["attention"][:2]
    assert cudnn["what"] == "cudnn" and "forward" not in cudnn and "cudnn" in cudnn["reason"].lower()
    assert 0 < blocked["forward"] < blocked["both"] and blocked["share_forward"] > 0
    assert [len(times) for times in blocked["samples"].values()] == [2, 2]
    beside, flex = result["flex"]
    assert beside["forward"] > 0 and flex["reason"].startswith("RuntimeError: torch ")
    text = "\n".join(attention_report.attention_tables(result))
    assert "2 query heads, 1 KV heads" in text and "2 query heads, 2 KV heads" in text


def test_no_round_begins_after_the_budget(quick):
    taken = []
    program = Program(lambda: taken.append(1), lambda _: None)
    case = by_turns.Case({"what": "any"}, lambda: lambda: {"forward": program}, bench.medians)
    groups = [by_turns.Group("attention", "matmul", [case])]
    prepared = by_turns.compiled(groups, threads=1)
    [(_, [row], _)] = by_turns.measured(groups, prepared, 2, time.perf_counter() - 1)
    assert not taken and row == {"what": "any", "reason": "not begun within the budget"}
    found, _ = by_turns.by_turns({"any": program}, 2, time.perf_counter() - 1)
    assert found == {"any": []} and taken  # it warmed up


def test_each_round_takes_a_sample_of_each_and_what_breaks_leaves_the_others():
    order, limit = [], {"broken": 8}

    def run(name):
        order.append(name)
        time.sleep(1e-3)
        if order.count(name) > limit.get(name, math.inf):
            raise RuntimeError("out of memory")

    programs = {name: Program(lambda name=name: run(name), lambda _: None) for name in ("first", "second", "broken")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launch.timing.WINDOW_SECONDS", 1e-4)  # a call a sample
        found, _ = by_turns.by_turns(programs, 20)
    assert str(found["broken"]) == "out of memory"
    assert len(found["first"]) == len(found["second"]) == 20 and min(found["first"]) >= 1
    tail = order[-20:]  # by then two are left: ten rounds of both, not always in the same order
    rounds = list(zip(tail[::2], tail[1::2], strict=True))
    assert all(set(pair) == {"first", "second"} for pair in rounds) and len(set(rounds)) == 2


def test_clock_and_power_are_summed_up_and_broken_readings_left_out():
    said = "1980, 690.5\n1410, [N/A]\n1200, 700.5\n12"
    assert device_state.summary(said) == {"sm_mhz": [12, 1305, 1980], "watts": [690.5, 695.5, 700.5]}
    with device_state.watched() as state:
        pass
    assert state == {} or all(len(x) == 3 for x in state.values())
