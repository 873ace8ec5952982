"""Training: the loss, the optimizer, exact resume, and refusals, against computations of their own in NumPy."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from unigist_jax.config import OptimConfig, RunConfig, default_config
from unigist_jax.data import load_or_train_tokenizer, pack_documents
from unigist_jax.layout import GistLayout
from unigist_jax.model import LlamaConfig, init_llama
from unigist_jax.model.hf import save_hf
from unigist_jax.sharding import batch_sharding, make_mesh, parameter_path
from unigist_jax.training import loop
from unigist_jax.training.checkpoint import load_trained
from unigist_jax.training.loop import train
from unigist_jax.training.loss import summed_loss, token_losses
from unigist_jax.training.metrics import read_metrics
from unigist_jax.training.optimizer import learning_rate, make_optimizer
from unigist_jax.training.step import Batch, make_state, make_train_step

# Orbax abandons its other reads when one of a damaged checkpoint fails, and their threads complain.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

QUIET = {"progress": False, "tensorboard": False}
NOT_DECAYED = {
    "gist_embedding",
    "sink_embedding",
    "norm/scale",
    "layers/attention_norm/scale",
    "layers/mlp_norm/scale",
}


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Runs of one config compile the same programs: they share them through jax's cache on disk."""
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = [getattr(jax.config, name) for name in names]

    def set_to(*values):
        for name, value in zip(names, values, strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    set_to(str(tmp_path_factory.mktemp("compiled")), 0.0)
    yield
    set_to(*before)


def tiny_config(source="stdlib", tokenizer=""):
    config = default_config()
    config.model.update(
        hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        rope_theta=10_000.0, dtype="float32",
    )  # fmt: skip
    config.gist.update(ratio=4, num_sinks=2, window=8)
    config.data.update(source=source, tokenizer=tokenizer, row_length=32, heldout_fraction=0.3)
    config.optim.update(peak_lr=3e-3, warmup_steps=2)
    config.train.update(steps=7, batch_size=8, eval_every=4, eval_rows=8, checkpoint_every=3)
    config.mesh.update(data=2, fsdp=2, tensor=2)
    return config


def named_arrays(tree):
    """Parameters as NumPy arrays by path; copies, which outlive the donation of their originals."""
    return {parameter_path(path): np.array(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same_bits(got, expected):
    got, expected = named_arrays(got), named_arrays(expected)
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].tobytes() == array.tobytes(), name


def log_probabilities(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


# --- loss and optimizer, on one device and on meshes ------------------------------------------------------------------

VOCAB = 48


@pytest.fixture(scope="module")
def small_run():
    config = tiny_config()
    config.model.vocab_size = VOCAB
    config.optim.update(peak_lr=1e-2, warmup_steps=4, clip_norm=0.5, eps=1e-3, weight_decay=0.3)
    config.train.update(steps=60, loss_chunk=13)
    config.mesh.update(data=1, fsdp=1, tensor=1)
    return RunConfig.from_dict(config.to_dict())


@pytest.fixture(scope="module")
def documents():
    """Counting modulo a number, from different beginnings: learned in a few steps."""
    rng = np.random.default_rng(0)
    return [
        (1 + (rng.integers(40) + np.arange(rng.integers(1, 30))) % 40).astype(np.int32)  # 0 is padding
        for _ in range(20)
    ]


@pytest.fixture(scope="module")
def packed(documents, small_run):
    rows = pack_documents(documents, row_length=32, layout=small_run.gist, pad_id=0)
    assert len(rows) >= 8 and (rows.doc_start[:8].max(axis=1) > 0).any()  # some rows hold several documents
    return rows


@pytest.fixture(scope="module")
def small_model(small_run):
    """Weights large enough that every visible token and every position matters."""
    model = init_llama(small_run.model, small_run.gist, 3)
    return jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, model)


def documents_alone(model, documents, layout):
    """Total loss and targets of each document by itself, from its full logits."""
    tokens = np.zeros((len(documents), 32), np.int32)
    for row, document in zip(tokens, documents, strict=True):
        row[: len(document)] = document
    logs = log_probabilities(jax.jit(lambda model, tokens: model(tokens, layout=layout))(model, tokens))
    total = 0.0
    for log, document in zip(logs, documents, strict=True):
        total -= sum(log[i, document[i + 1]] for i in range(len(document) - 1))
    return total, sum(len(document) - 1 for document in documents)


def test_loss_of_packed_rows_is_that_of_each_document_alone(small_model, documents, packed, small_run):
    total, count = jax.jit(summed_loss, static_argnames="chunk")(
        small_model, packed.tokens, packed.doc_start, packed.loss_mask, chunk=13
    )
    expected, targets = documents_alone(small_model, documents, small_run.gist)
    assert count == targets
    np.testing.assert_allclose(total, expected, rtol=1e-6)


def full_logits_loss(model, tokens, doc_start, loss_mask):
    """Mean loss from the logits of everything at once."""
    logs = jax.nn.log_softmax(model(tokens, doc_start))
    picked = jnp.take_along_axis(logs[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(loss_mask[:, :-1], picked, 0.0)) / jnp.sum(loss_mask)


def first_batch(packed):
    return packed.tokens[:8], packed.doc_start[:8], packed.loss_mask[:8]


@pytest.mark.parametrize("chunk", [1, 13, 32])
def test_chunked_losses_are_the_unchunked_ones(chunk):
    """Values and gradients of every token's loss, from hidden states of any origin."""
    config = LlamaConfig(VOCAB, 16, 24, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, dtype="float32")
    model = init_llama(config, GistLayout(4, 0, 0), 0)
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((2, 32, 16)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, VOCAB, (2, 32)), jnp.int32)
    weight = jnp.asarray(rng.standard_normal((2, 32)), jnp.float32).at[:, -1].set(0)  # the last has no target

    def chunked(model, hidden):
        losses = token_losses(model, hidden, tokens, chunk)
        return jnp.sum(losses * weight), losses

    def at_once(model, hidden):
        logs = jax.nn.log_softmax(model.logits(hidden))
        losses = -jnp.take_along_axis(logs, jnp.roll(tokens, -1, axis=1)[..., None], axis=-1)[..., 0]
        return jnp.sum(losses * weight), losses

    gradient, losses = jax.jit(jax.grad(chunked, (0, 1), has_aux=True))(model, hidden)
    expected, expected_losses = jax.jit(jax.grad(at_once, (0, 1), has_aux=True))(model, hidden)
    np.testing.assert_allclose(losses[:, :-1], expected_losses[:, :-1], rtol=1e-6)
    for got, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * max(1, np.abs(want).max(initial=0)))


def small_training(run, packed, devices, steps, **mesh):
    """Metrics of each step on one batch over and over, and the parameters after 4 steps."""
    mesh = make_mesh(**mesh, devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        state, step = make_state(run, mesh), make_train_step(run, mesh)
        batch = Batch(*(jax.device_put(x, batch_sharding(mesh)) for x in first_batch(packed)))
        placed = [leaf.sharding for leaf in jax.tree.leaves(state)]
        history = []
        for index in range(steps):
            state, metrics = step(state, batch)
            history.append({name: float(value) for name, value in metrics.items()})
            if index == 3:
                after_4 = named_arrays(state.model)
        for before, leaf in zip(placed, jax.tree.leaves(state), strict=True):
            assert leaf.sharding.is_equivalent_to(before, leaf.ndim)  # every step finds the layout it was compiled for
    return history, after_4


@pytest.fixture(scope="module")
def on_one_device(small_run, packed):
    return small_training(small_run, packed, 1, 60)


def test_four_steps_are_clipped_adamw(small_run, packed, on_one_device):
    """AdamW in NumPy, float64, with gradients of the unchunked loss."""
    gradient_of = jax.jit(jax.grad(full_logits_loss))
    optim, batch = small_run.optim, first_batch(packed)
    model = init_llama(small_run.model, small_run.gist, small_run.train.seed)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(model)
    names = [parameter_path(path) for path, _ in leaves]
    parameters = {name: np.array(leaf, np.float64) for name, (_, leaf) in zip(names, leaves, strict=True)}
    m, v = ({name: np.zeros_like(p) for name, p in parameters.items()} for _ in range(2))
    norms = []
    for step in range(4):
        model = jax.tree.unflatten(treedef, [parameters[name].astype(np.float32) for name in names])
        gradient = {name: g.astype(np.float64) for name, g in named_arrays(gradient_of(model, *batch)).items()}
        norms.append(np.sqrt(sum((g**2).sum() for g in gradient.values())))
        rate = optim.peak_lr * step / optim.warmup_steps
        for name in names:
            g = gradient[name] * min(1.0, optim.clip_norm / norms[-1])
            m[name] = optim.b1 * m[name] + (1 - optim.b1) * g
            v[name] = optim.b2 * v[name] + (1 - optim.b2) * g**2
            update = m[name] / (1 - optim.b1 ** (step + 1))
            update = update / (np.sqrt(v[name] / (1 - optim.b2 ** (step + 1))) + optim.eps)
            if name not in NOT_DECAYED:
                update = update + optim.weight_decay * parameters[name]
            parameters[name] = parameters[name] - rate * update
    assert min(norms) > optim.clip_norm  # clipping is in play
    history, after_4 = on_one_device
    np.testing.assert_allclose([line["grad_norm"] for line in history[:4]], norms, rtol=1e-5)
    for name, expected in parameters.items():
        np.testing.assert_allclose(after_4[name], expected, rtol=0, atol=2e-6 * np.abs(expected).max(), err_msg=name)


def test_weight_decay_touches_matrices_alone(small_run, small_model):
    """With no gradient, all that an update does is decay."""
    optim = dataclasses.replace(small_run.optim, warmup_steps=0)
    optimizer = make_optimizer(optim, 60)
    zeros = jax.tree.map(jnp.zeros_like, small_model)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(small_model), small_model)
    parameters = named_arrays(small_model)
    assert parameters.keys() > NOT_DECAYED
    for name, update in named_arrays(updates).items():
        decay = 0 if name in NOT_DECAYED else optim.peak_lr * optim.weight_decay
        np.testing.assert_allclose(update, -decay * parameters[name], rtol=1e-6, err_msg=name)


def test_learning_rate_warms_up_from_zero_and_falls_to_the_fraction():
    """The paper's: 1e-5, 256 steps, a cosine to half of it."""
    rate = learning_rate(OptimConfig(peak_lr=1e-5, warmup_steps=256, final_fraction=0.5), 1256)
    steps = [0, 1, 128, 256, 506, 756, 1256, 2000]
    cosine = 0.75 + 0.25 * np.cos(np.pi / 4)
    expected = [0, 1 / 256, 0.5, 1, cosine, 0.75, 0.5, 0.5]
    np.testing.assert_allclose([rate(step) for step in steps], 1e-5 * np.array(expected), rtol=1e-5)
    at_once = learning_rate(OptimConfig(peak_lr=2.0, warmup_steps=0, final_fraction=0.1), 10)
    np.testing.assert_allclose([at_once(0), at_once(10)], [2.0, 0.2], rtol=1e-6)


def test_loss_falls_when_one_batch_is_seen_again_and_again(on_one_device):
    losses = [line["loss"] for line in on_one_device[0]]
    assert abs(losses[0] - np.log(VOCAB)) < 0.1
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor"])
def test_every_mesh_trains_alike(axis, small_run, packed, on_one_device):
    history, after_4 = small_training(small_run, packed, 2, 4, **{"data": 1, axis: 2})
    for name in ("loss", "grad_norm", "learning_rate", "targets"):
        got, expected = ([line[name] for line in lines] for lines in (history, on_one_device[0][:4]))
        np.testing.assert_allclose(got, expected, rtol=2e-6, err_msg=name)
    for name, expected in on_one_device[1].items():
        np.testing.assert_allclose(after_4[name], expected, rtol=0, atol=2e-6 * np.abs(expected).max(), err_msg=name)


# --- whole runs, on eight devices ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for index in range(12):
        words = [f"w{number:x}" for number in rng.integers(0, 400, size=rng.integers(5, 200))]
        (folder / f"{index}.txt").write_text(f"document {index}\n\n" + " ".join(words) + "\n")
    return str(folder)


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
    """The lines of metrics.jsonl without what depends on the clock."""
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in read_metrics(workdir)]


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

        def poisoned(state, batch):
            state, metrics = step(state, batch)
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


# --- checkpoints that are refused -----------------------------------------------------------------------------------


def test_checkpoint_of_other_shapes_is_refused(copied):
    config = json.loads((copied / "config.json").read_text())
    config["model"]["intermediate_size"] = 48
    config["gist"]["num_sinks"] = 3
    (copied / "config.json").write_text(json.dumps(config))
    message = r"another model or layout: layers.mlp.down: checkpoint \(2, 24, 16\), model \(2, 48, 16\)"
    with pytest.raises(ValueError, match=message + r".*sink_embedding: checkpoint \(2, 16\), model \(3, 16\)"):
        load_trained(copied)


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
