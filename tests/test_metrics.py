"""Metrics of a run: what is written where, and what a resumed run makes of the lines that are there."""

import resource
import struct
import sys
from types import SimpleNamespace

import pytest

from unigist_jax.training import metrics
from unigist_jax.training.metrics import MetricsWriter, read_metrics
from unigist_jax.training.report import Watch


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
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is damaged .*; delete that line to go on"):
        read_metrics(tmp_path)


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


def test_weights_and_biases_without_its_package_is_refused(monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--wandb=gists needs the package wandb: pip install wandb"):
        Watch(wandb_project="gists")


def test_tensorboard_gets_the_same_scalars(tmp_path):
    events = pytest.importorskip("tensorboardX.proto.event_pb2")
    writer = MetricsWriter(tmp_path, 0, tensorboard=True)
    writer.write(3, {"loss": 2.5})
    writer.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    content, found = file.read_bytes(), []
    while content:  # TFRecords: length, its checksum, an event, its checksum
        (length,) = struct.unpack_from("<Q", content)
        event = events.Event.FromString(content[12 : 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        content = content[16 + length :]
    assert found == [(3, "loss", 2.5)]


def test_a_full_disk_is_named(tmp_path):
    writer = MetricsWriter(tmp_path, 0, tensorboard=False)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, before[1]))
    try:
        with pytest.raises(OSError, match=r"metrics.jsonl cannot be written \(.*free some space, then run the same"):
            writer.write(1, {"loss": 2.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
