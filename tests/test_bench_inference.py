"""The benchmark of inference: what a case measures, what the parent does with those that fail, and the report."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from launch import inference_report
from launch.inference_case import Case, measure, noise, parse_system, random_model
from launch.markdown import marks
from unigist_jax.layout import GistLayout
from unigist_jax.model import init_llama

TINY = {"shape": "tiny", "context": 320, "new_tokens": 9, "rounds": 1}
CASES = [
    Case("unigist", "latency", 8, batch=2, chunk_sizes=(64,), **TINY),
    Case("full", "latency", None, batch=2, **TINY),
    Case("unigist", "decode", 8, batch=0, chunk_sizes=(64,), **TINY),
    Case("unigist", "limit", 8, chunk_sizes=(64,), memory_gib=1.0, **TINY),
    Case("unigist", "chunks", 8, chunk_sizes=(64, 128), **TINY),
    Case("unigist", "latency", 8, batch=2, chunk_sizes=(64,), tensor=2, **TINY),
]


@pytest.fixture(scope="module")
def records():
    """What every kind of case measures here."""
    return [{"name": case.name, **dataclasses.asdict(case), **measure(case)} for case in CASES]


def test_what_is_measured(records):
    for record in records:
        assert record["device"] == "cpu" and record["copy_bytes_s"] > 0
        a_token = 2 * 2 * 2 * 16 * 4  # keys and values of 2 layers, 2 heads of 16 in float32
        raws = 320 // 8 + 128 if record["system"] == "unigist" else 320
        sinks = 128 if record["system"] == "unigist" else 0
        table = 256 * 64 * 4 // record["tensor"]  # the embedding's rows are looked up
        read = a_token * (sinks + record["batch"] * raws) // record["tensor"]
        assert record["step_bytes"] == record["weights_bytes"] - table + read
    latency, full, decode, _, chunks, shared = records
    assert shared["name"] == latency["name"] + "-2devices" and shared["cache_bytes"] == latency["cache_bytes"] // 2
    # sinks and norms are whole on each device
    assert latency["weights_bytes"] / 2 < shared["weights_bytes"] < latency["weights_bytes"] * 0.54
    for record in (latency, full, shared):
        assert 0 < record["ttft_s"] < record["total_s"] < record["first_call_s"]
        assert record["total_s"] == pytest.approx(record["ttft_s"] + 8 * record["tpot_s"])
    assert decode["batch"] == 3 and decode["tokens_s"] == pytest.approx(3 / decode["tpot_s"])
    assert set(chunks["seconds_by_chunk"]) == {"64", "128"}


def test_baselines_are_systems_too():
    """Each holds what it keeps, and room for what is generated, of the 2 layers' 2 heads of 16 in float32."""
    systems = [parse_system(name) for name in ("snapkv4", "unigist_int88", "full")]
    assert systems == [("snapkv", 4), ("unigist_int8", 8), ("full", None)]
    with pytest.raises(ValueError, match=r"'snapkv'; choose full, .*'snapkv'.* and a ratio"):
        parse_system("snapkv")
    case = Case("snapkv", "latency", 4, batch=2, **TINY)
    record = measure(case)
    assert record["cache_bytes"] == 2 * (320 // 4 + 9) * (2 * 2 * 2 * 16 * 4) and record["tpot_s"] > 0
    assert record["step_bytes"] == record["weights_bytes"] - 256 * 64 * 4 + record["cache_bytes"]
    assert inference_report.system(dataclasses.asdict(case)) == "snapkv r=4"
    assert Case("autocompressors", "latency", 8, **TINY).layout == GistLayout(8, 256, 2040, chunk=2048)


def test_weights_are_those_of_the_shape():
    config, layout = CASES[0].config, GistLayout(8)
    model = random_model(config, layout)
    expected = jax.eval_shape(lambda: init_llama(config, layout, 0))
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (model, expected)]
    assert sizes[0] == sizes[1] and len(model.layers) == config.num_layers
    first, second = (np.asarray(noise(seed, jax.ShapeDtypeStruct((100_000,), np.float32), 0.02)) for seed in (0, 1))
    assert abs(first.std() - 0.02) < 2e-4 and abs(first.mean()) < 2e-4
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02 and abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.02


def test_report(records, tmp_path):
    lost = {"name": "transformers-latency-320-b2", "system": "transformers", "kind": "latency", "ratio": None}
    failed = [dataclasses.asdict(CASES[3]) | {"name": "larger", "error": "OOM"}, lost | {"error": "took too long"}]
    raw, page = tmp_path / "raw.json", tmp_path / "page.md"
    raw.write_text(json.dumps({"commands": ["python -m launch.bench_inference --out=x"], "records": records + failed}))
    begin, end = marks(raw, page)
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    inference_report.REPORT.write(raw, page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    full, gist = records[1], records[0]
    gains = [f"{full[name] / gist[name]:.2f}" for name in ("ttft_s", "tpot_s")]
    assert f"| UniGist r=8 | {gist['ttft_s'] * 1e3:,.0f} |" in text and " · ".join(gains) in text
    assert f"| UniGist r=8, 2 devices | {records[5]['ttft_s'] * 1e3:,.0f} |" in text
    assert "- transformers-latency-320-b2: took too long" in text and "larger" not in text
    assert "    python -m launch.bench_inference --out=x\n" in text and "![times and memory](raw.png)" in text
    assert raw.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    page.write_text("no marks")
    with pytest.raises(ValueError, match=r"page\.md needs the lines"):
        inference_report.REPORT.write(raw, page)


def test_the_parent_records_what_fails_and_goes_on(tmp_path):
    """More devices than there are, then more rounds than a second has time for."""
    command = [sys.executable, "-m", "launch.bench_inference", f"--out={tmp_path}", "--suites=latency", "--resume"]
    command += ["--contexts=64", "--systems=full", "--platform=cpu", "--shape=tiny"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    failing = {
        "full-latency-64-b1-16devices": (["--tensor=16"], "needs 16 devices, but there are"),
        "full-latency-64-b1": (["--rounds=1000000", "--timeout=1"], "took more than --timeout=1 s"),
    }
    for flags, _ in failing.values():
        subprocess.run([*command, *flags], env=environment, check=True, capture_output=True)
    result = json.loads((tmp_path / "bench_inference.json").read_text())
    errors = {record["name"]: record["error"] for record in result["records"]}
    assert list(errors) == list(failing) and all(failing[name][1] in error for name, error in errors.items())
    assert len(result["commands"]) == 2
    finished = subprocess.run([*command, "--shape=gpt5"], env=environment, check=False, capture_output=True, text=True)
    assert finished.returncode == 2 and "error: --shape=gpt5 is unknown; choose among tiny" in finished.stderr
