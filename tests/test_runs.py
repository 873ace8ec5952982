"""Whole training runs: exact resume, refusals, damaged checkpoints, beginning from an HF checkpoint."""

import dataclasses
import json
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import assert_same_bits, named_arrays, tiny_config, without_speed, write_corpus

from unigist_jax.config import RunConfig
from unigist_jax.data import load_or_train_tokenizer
from unigist_jax.layout import GistLayout
from unigist_jax.model import init_llama
from unigist_jax.model.hf import save_hf
from unigist_jax.sharding import parameter_path
from unigist_jax.training import loop
from unigist_jax.training.checkpoint import check_workdir, load_trained
from unigist_jax.training.loop import train
from unigist_jax.training.metrics import read_metrics
from unigist_jax.training.report import Watch
from unigist_jax.training.step import make_train_step

# Orbax abandons its other reads when one of a damaged checkpoint fails, and their threads complain.
pytestmark = [
    pytest.mark.usefixtures("compiled_once"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

QUIET = {"watch": Watch(progress=False, tensorboard=False)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), longest=200)


@pytest.fixture(scope="module")
def config(corpus, tmp_path_factory):
    """With a tokenizer trained once for all runs."""
    folder = tmp_path_factory.mktemp("tokenizer")
    load_or_train_tokenizer(folder, corpus, 320, heldout_fraction=0.3)
    return tiny_config(corpus, str(folder / "tokenizer.model"))


@pytest.fixture
def changed(config):
    """A run with some fields changed: `changed(optim__peak_lr=1.0)`."""

    def change(**fields):
        copy = config.copy_and_resolve_references()
        for name, value in fields.items():
            section, field = name.split("__")
            copy[section][field] = value
        return RunConfig.from_dict(copy.to_dict())

    return change


@pytest.fixture(scope="module")
def run(config):
    return RunConfig.from_dict(config.to_dict())


@pytest.fixture(scope="module")
def uninterrupted(run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    return workdir, train(run, workdir, **QUIET)


@pytest.fixture
def copied(uninterrupted, tmp_path):
    """A work directory of its own that holds the uninterrupted run."""
    return shutil.copytree(uninterrupted[0], tmp_path / "copy")


def timeless(workdir):
    return without_speed(read_metrics(workdir))


def test_metrics_are_one_line_a_step(uninterrupted):
    lines = timeless(uninterrupted[0])
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["step"] for line in lines if "heldout_loss" in line] == [4, 7]
    for line in lines:
        if "heldout_loss" in line:
            np.testing.assert_allclose(line["heldout_perplexity"], np.exp(line["heldout_loss"]))


def test_resuming_after_a_crash_is_bit_identical(uninterrupted, run, tmp_path):
    """Stopped after step 4; then metrics of steps that no checkpoint holds, the last line cut off."""
    train(run, tmp_path, stop_at_step=4, **QUIET)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 99.0}\n{"step": 6, "loss": 99.0}\n{"step": 7, "lo')
    state = train(run, tmp_path, **QUIET)
    assert timeless(tmp_path) == timeless(uninterrupted[0])
    assert_same_bits(state.model, uninterrupted[1].model)
    assert all(
        np.array(a).tobytes() == np.array(b).tobytes()
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(uninterrupted[1]), strict=True)
    )


def test_a_finished_run_is_left_as_it_is(uninterrupted, run, copied):
    state = train(run, copied, **QUIET)
    assert timeless(copied) == timeless(uninterrupted[0])
    assert_same_bits(state.model, uninterrupted[1].model)


def not_a_number(name, leaf):
    return leaf * jnp.nan if name == "embedding" else leaf


def overflowing_gradient(name, leaf):
    """The same logits from a tiny norm and a huge head, whose gradient's norm is beyond float32."""
    return leaf * {"norm/scale": 1e-25, "head": 1e25}.get(name, 1.0)


@pytest.mark.parametrize("poison", [not_a_number, overflowing_gradient])
def test_training_stops_at_nan_and_keeps_the_checkpoint_before(poison, run, tmp_path, monkeypatch):
    """Parameters go bad in step 5; step 6 shows it, and would be a checkpoint."""

    def make_poisoned_step(run, mesh):
        step = make_train_step(run, mesh)

        def poisoned(state, batch, **options):
            state, metrics = step(state, batch, **options)
            if int(state.step) == 5:
                model = jax.tree_util.tree_map_with_path(lambda path, x: poison(parameter_path(path), x), state.model)
                state = dataclasses.replace(state, model=model)
            return state, metrics

        return poisoned

    monkeypatch.setattr(loop, "make_train_step", make_poisoned_step)
    with pytest.raises(FloatingPointError, match=r'step 6 .*optim.peak_lr.*"peak_lr": 0.003'):
        train(run, tmp_path, **QUIET)
    _, model, step = load_trained(tmp_path)
    assert step == 3
    assert all(np.isfinite(array).all() and np.abs(array).max() < 10 for array in named_arrays(model).values())


def test_a_work_directory_holds_one_run(changed, uninterrupted):
    with pytest.raises(ValueError, match=r"holds a different run \(optim.peak_lr: 0.003 -> 0.01\).*another --workdir"):
        train(changed(optim__peak_lr=0.01), uninterrupted[0], **QUIET)


def test_a_run_may_go_on_elsewhere_and_be_watched_otherwise(changed, uninterrupted):
    assert check_workdir(
        uninterrupted[0], changed(train__log_every=7, mesh__data=1, model__remat="full").with_vocab_size(320)
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data__recall_weight": 0.5, "data__recall_kinds": "riddle"}, "'riddle'"),
        ({"train__batch_size": 6, "mesh__fsdp": 1, "mesh__tensor": 1, "mesh__data": -1}, "train.batch_size=6.*= 8"),
        ({"mesh__data": 1}, "4 devices, but there are 8"),
        ({"model__vocab_size": 100}, "model.vocab_size=100 is smaller than the tokenizer's 320"),
    ],
)
def test_a_run_that_cannot_begin_does_not_claim_the_work_directory(fields, message, changed, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(changed(**fields), tmp_path, **QUIET)
    assert not (tmp_path / "config.json").exists()


def test_a_profile_of_steps_that_never_come_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"--profile begins at step 900, and train.steps=\d+"):
        train(run, tmp_path, watch=Watch(progress=False, tensorboard=False, profile_steps=(900, 901)))


# --- checkpoints that are refused -----------------------------------------------------------------------------------


def test_checkpoint_of_other_shapes_is_refused(copied):
    config = json.loads((copied / "config.json").read_text())
    config["model"]["intermediate_size"] = 48
    config["gist"]["num_sinks"] = 3
    (copied / "config.json").write_text(json.dumps(config))
    message = r"another model or layout: layers.mlp.down: checkpoint \(2, 24, 16\), model \(2, 48, 16\)"
    with pytest.raises(ValueError, match=message + r".*sink_embedding: checkpoint \(2, 16\), model \(3, 16\)"):
        load_trained(copied)


def test_a_full_disk_is_named_and_costs_no_checkpoint(run, tmp_path, uninterrupted):
    """Files may not grow beyond 4 KB, as if there were no room; then there is again, and the run goes on."""
    train(run, tmp_path, stop_at_step=3, **QUIET)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        message = r"cannot be written to .*checkpoints \(.*the one of step 3 is whole. Free some space"
        with pytest.raises(OSError, match=message):
            train(run, tmp_path, **QUIET)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    state = train(run, tmp_path, **QUIET)
    assert_same_bits(state.model, uninterrupted[1].model)


def truncate(*files):
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage",
    [
        lambda step: truncate(*(step / "model").rglob("d/*")),
        lambda step: truncate(step / "model" / "_METADATA"),
        lambda step: (step / "model" / "manifest.ocdbt").write_bytes(b""),
        lambda step: shutil.rmtree(step / "model"),
    ],
    ids=["data", "metadata", "manifest", "folder"],
)
def test_damaged_checkpoint_is_named_with_the_remedy(damage, copied):
    damage(copied / "checkpoints" / "7")
    with pytest.raises(ValueError, match=r"checkpoints/7 .*delete that folder to go on from the one before it"):
        load_trained(copied)
    shutil.rmtree(copied / "checkpoints" / "7")
    assert load_trained(copied)[2] == 6


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "damaged"), ("{}", "damaged.*'gist'"), ('{"steps": 3}', "damaged.*'gist'"), (None, "holds no run")],
)
def test_damaged_config_is_named(content, message, copied):
    (copied / "config.json").unlink()
    if content is not None:
        (copied / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_trained(copied)


def test_no_checkpoint_yet_is_said(copied):
    shutil.rmtree(copied / "checkpoints")
    with pytest.raises(ValueError, match="no checkpoint yet"):
        load_trained(copied)


# --- beginning from a checkpoint of Hugging Face ---------------------------------------------------------------------


def test_init_from_begins_with_those_weights(run, tmp_path):
    """The learning rate of the first step is 0: after it, the model is still the one it began with."""
    model = init_llama(dataclasses.replace(run.model, vocab_size=320), run.gist, 11)
    save_hf(model, tmp_path / "hf")
    state = train(run, tmp_path / "run", init_from=str(tmp_path / "hf"), stop_at_step=1, **QUIET)
    assert_same_bits(state.model, model)


def test_init_from_another_shape_is_refused(run, tmp_path):
    other = dataclasses.replace(run.model, vocab_size=320, hidden_size=32, rope_theta=500.0)
    save_hf(init_llama(other, GistLayout(4, 2, 8), 0), tmp_path / "hf")
    message = r"another model than the config: model.hidden_size: 32 -> 16; model.rope_theta: 500.0 -> 10000.0$"
    with pytest.raises(ValueError, match=message):
        train(run, tmp_path / "run", init_from=str(tmp_path / "hf"), **QUIET)


def test_a_run_with_a_teacher_and_drawn_ratios(changed, tmp_path):
    """The teacher is the model it began with, read with full attention: they differ a little, and say by how much."""
    run = changed(
        train__distill_weight=0.5,
        gist__ratio=8,
        train__mixed_ratios="4,8",
        train__on_bad_step="skip",
        model__attention_backend="reference",
    )
    save_hf(init_llama(dataclasses.replace(run.model, vocab_size=320), run.gist, 11), tmp_path / "hf")
    with pytest.raises(
        ValueError, match=r"distill_weight=0.5 needs a teacher; name its checkpoint with --teacher_from"
    ):
        train(run, tmp_path / "none", **QUIET)
    train(run, tmp_path / "run", init_from=str(tmp_path / "hf"), stop_at_step=3, **QUIET)
    lines = read_metrics(tmp_path / "run")
    assert [line["ratio"] for line in lines] == [loop.layout_of_step(run, step).ratio for step in range(3)]
    assert all(0 < line["divergence"] < 0.1 and line["skipped"] == 0 for line in lines)
