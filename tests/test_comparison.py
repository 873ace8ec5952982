"""The comparison: what it collects from the files of trainings and evaluations, and its configs."""

import dataclasses
import importlib
import json
import math
from pathlib import Path

import pytest

from unigist_jax.config import RunConfig
from unigist_jax.evals import comparison, plots
from unigist_jax.sweeps.spec import read_sweep, resolve

FOLDER = Path(__file__).parent.parent / "configs" / "comparison"


@pytest.mark.parametrize(
    ("config", "sweep"), [("llama_100m", "methods"), ("llama_8m", "methods_8m"), ("micro", "methods_micro")]
)
def test_methods_differ_in_nothing_else(config, sweep):
    """All runs have the same model, data, optimizer and budget but for what the method is."""
    base = importlib.import_module(f"configs.comparison.{config}").get_config()
    runs = {run.name: resolve(base, run) for run in read_sweep(FOLDER / f"{sweep}.py")}
    names = ["full", "unigist,r=4", "unigist,r=8", "activation_beacon", "autocompressors"]
    seeds = ["", ",seed=1"] if config == "llama_8m" else [""]
    assert list(runs) == [name + seed for seed in seeds for name in names]
    full = runs["full"]
    for name, run in runs.items():
        assert run.train.seed == name.endswith(",seed=1")
        same = dataclasses.replace(run.train, seed=full.train.seed)
        assert (run.data, run.optim, same) == (full.data, full.optim, full.train)
        assert run.to_dict()["model"] | {"attention": "full"} == full.to_dict()["model"]
    assert runs["autocompressors"].gist.num_sinks * 4 == runs["activation_beacon"].gist.chunk


def test_the_base_reads_rows_of_every_length_in_steps_of_as_many_tokens():
    from configs.comparison import base_8m

    for length, steps in base_8m.STEPS.items():
        run = RunConfig.from_dict(base_8m.get_config(str(length)).to_dict())
        assert run.model.attention == "full" and run.data.row_length == length and run.train.steps == steps
        assert run.train.batch_size * length == base_8m.TOKENS


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def test_losses_are_collected_by_place_in_the_chunk():
    def row(method, *losses):
        curve = {"position": list(range(1, 8 * len(losses), 8)), "perplexity": [math.exp(loss) for loss in losses]}
        return {"method": method, "trained": True, "curve": curve}

    rows = [row("full", *12 * [2.0]), row("beacon", 9, 9, 9, 9, 3.0, 2.5, 2.25, 2.0, 5.0, 2.5, 2.25, 2.5)]
    assert comparison.place_table(rows, 32).splitlines() == [
        "| nats above full attention | places 1 to 8 | places 9 to 16 | places 17 to 32 |",
        "| --- | --- | --- | --- |",
        "| beacon | +2.000 | +0.500 | +0.250 |",
    ]
    assert comparison.place_table(rows[1:], 32) == comparison.place_table(rows, 36) == ""


def test_runs_are_called_as_their_directories():
    assert comparison.named(["a/full", "b/r4/"]) == {"full": Path("a/full"), "r4": Path("b/r4")}
    with pytest.raises(ValueError, match="two work directories are called 'full'"):
        comparison.named(["a/full", "a/r4", "b/full"])


def test_rows_are_those_of_the_files(tmp_path):
    def summary(method, length, accuracy):
        by_depth = [{"depth": 0.5, "distance": length / 2, "samples": 2, "accuracy": accuracy, "token_accuracy": 0.75}]
        named = {"task": "needle", "length": length, "method": method, "accuracy": accuracy, "token_accuracy": 0.75}
        return named | {"samples": 2, "cache_bytes": 10 * length, "by_depth": by_depth}

    cases = [("full", 64, 1.0), ("full", 128, 0.5), ("snapkv", 64, 0.25), ("snapkv", 128, 0.0)]
    write(tmp_path / "e" / "recall.json", {"results": {str(case): summary(*case) for case in cases}})
    write(tmp_path / "e" / "perplexity.json", {"methods": {"full": {"perplexity": 12.345}}})
    curve = {"position": [1, 17], "perplexity": [20.0, 10.0], "border_jump": -0.5, "loss": 1.0}
    write(tmp_path / "e" / "boundary.json", {"methods": {"full": curve}})
    speeds = [100.0, 3000.0, 5000.0]
    lines = "".join(json.dumps({"step": i, "tokens_per_second": speed}) + "\n" for i, speed in enumerate(speeds))
    (tmp_path / "metrics.jsonl").write_text(lines)

    rows = comparison.rows_of_run("full", tmp_path, tmp_path / "e")
    assert [(row["method"], row["trained"]) for row in rows] == [("full", True), ("snapkv", False)]
    table = comparison.write(rows, 16, tmp_path)
    assert "| full | yes | 1.00 (0.75) | 0.50 (0.75) | 12.35 | -0.500 | 1,280 | 3,000 |" in table
    assert "| snapkv | no | 0.25 (0.75) | 0.00 (0.75) |  |  | 1,280 |  |" in table

    cases = [("full", 64, 0.5), ("full", 128, 0.5), ("snapkv", 64, 0.25), ("snapkv", 128, 0.5)]
    write(tmp_path / "e1" / "recall.json", {"results": {str(case): summary(*case) for case in cases}})
    write(tmp_path / "e1" / "perplexity.json", {"methods": {"full": {"perplexity": 13.345}}})
    write(tmp_path / "e1" / "boundary.json", {"methods": {"full": curve | {"border_jump": 1.5}}})
    rows += comparison.rows_of_run("full,seed=1", tmp_path, tmp_path / "e1")
    assert [row["method"] for row in rows[2:]] == ["full,seed=1", "snapkv,seed=1"]
    table = comparison.write(rows, 16, tmp_path)
    recall = "0.75 [0.50, 1.00] (0.75) | 0.50 [0.50, 0.50] (0.75)"
    assert f"| full, 2 seeds | yes | {recall} | 12.85 [12.35, 13.35] | +0.500 [-0.500, +1.500] |" in table
    assert "| snapkv, 2 seeds | no | 0.25 [0.25, 0.25] (0.75) | 0.25 [0.00, 0.50] (0.75) |  |  |" in table
    assert json.loads((tmp_path / "comparison.json").read_text()) == rows
    plots.plot_training(
        {"full": [{"step": 1, "loss": 2.0}, {"step": 1, "recall_answers": 0.5}]}, tmp_path / "training.png"
    )
    for name in ("perplexity_by_position", "recall_by_distance", "training"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_documented_tables_are_those_of_their_raw_files():
    """Of docs/comparison/8m, but for speeds, since its metrics.jsonl are thinned; int8 has no row there."""
    folder = FOLDER.parent.parent / "docs" / "comparison" / "8m"
    rows = json.loads((folder / "comparison.json").read_text())
    assert (folder / "comparison.md").read_text() == comparison.tables(rows, 256)
    runs = [row["method"] for row in rows if row["trained"]]
    found = [row for name in runs for row in comparison.rows_of_run(name, folder / name, folder / name)]
    found = [row for row in found if row["method"] != "unigist_int8"]
    assert [row | {"tokens_per_second": 0} for row in found] == [row | {"tokens_per_second": 0} for row in rows]
