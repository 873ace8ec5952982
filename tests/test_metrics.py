"""Metrics of a run: what is written where, and what a resumed run makes of the lines that are there."""

import sys
from types import SimpleNamespace

import pytest

from unigist_jax.training.metrics import MetricsWriter, read_metrics


def test_a_resumed_run_drops_the_lines_it_will_write_again(tmp_path):
    first = MetricsWriter(tmp_path, 0, tensorboard=False)
    for step in (1, 2, 3):
        first.write(step, {"loss": float(step)})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # cut off by a crash
    resumed = MetricsWriter(tmp_path, 2, tensorboard=False)
    resumed.write(3, {"loss": 30.0})
    resumed.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_weights_and_biases_gets_the_same_scalars_under_the_name_of_the_work_directory(tmp_path, monkeypatch):
    calls = []
    run = SimpleNamespace(
        log=lambda scalars, step: calls.append((step, scalars)), finish=lambda: calls.append("finished")
    )
    package = SimpleNamespace(init=lambda **options: calls.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", package)
    workdir = tmp_path / "run7"
    workdir.mkdir()
    writer = MetricsWriter(workdir, 0, tensorboard=False, wandb_project="gists")
    writer.write(1, {"loss": 2.5})
    writer.close()
    options, *rest = calls
    assert (options["project"], options["name"], options["resume"]) == ("gists", "run7", "allow")
    assert rest == [(1, {"loss": 2.5}), "finished"]


def test_weights_and_biases_without_its_package_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="--wandb=gists needs the package wandb: pip install wandb"):
        MetricsWriter(tmp_path, 0, wandb_project="gists")
