"""The loss, the optimizer and the step, on one device and on meshes, against computations of their own in NumPy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import named_arrays, tiny_config

from unigist_jax.config import OptimConfig, RunConfig
from unigist_jax.data import pack_documents
from unigist_jax.layout import GistLayout
from unigist_jax.model import LlamaConfig, init_llama
from unigist_jax.sharding import batch_sharding, make_mesh, parameter_path
from unigist_jax.training.loss import head_of, next_tokens, summed_cross_entropy, summed_loss, token_losses
from unigist_jax.training.optimizer import learning_rate, make_optimizer
from unigist_jax.training.step import Batch, make_state, make_train_step

pytestmark = pytest.mark.usefixtures("compiled_once")

NOT_DECAYED = {
    "gist_embedding",
    "sink_embedding",
    "norm/scale",
    "layers/attention_norm/scale",
    "layers/mlp_norm/scale",
}


def log_probabilities(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


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


@pytest.mark.parametrize(("chunk", "shards", "tied"), [(1, 1, False), (13, 1, True), (7, 2, False), (32, 1, False)])
def test_chunked_losses_are_the_unchunked_ones(chunk, shards, tied):
    """Every token's loss and their sum, and the gradients of both, from hidden states of any origin."""
    config = LlamaConfig(
        VOCAB, 16, 24, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, dtype="float32", tie_embeddings=tied
    )
    model = init_llama(config, GistLayout(4, 0, 0), 0)
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((2, 32, 16)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, VOCAB, (2, 32)), jnp.int32)
    mask = jnp.asarray(rng.random((2, 32)) < 0.7).at[:, -1].set(False)  # the last has no target
    weight = jnp.asarray(rng.standard_normal((2, 32)), jnp.float32).at[:, -1].set(0)

    def chunked(model, hidden):
        loss = summed_cross_entropy(head_of(model), hidden, next_tokens(tokens), mask, chunk, shards)
        losses = token_losses(model, hidden, tokens, chunk)
        return (-3.7 * loss, jnp.sum(losses * weight)), losses

    def at_once(model, hidden):
        logs = jax.nn.log_softmax(model.logits(hidden))
        losses = -jnp.take_along_axis(logs, jnp.roll(tokens, -1, axis=1)[..., None], axis=-1)[..., 0]
        return (-3.7 * jnp.sum(jnp.where(mask, losses, 0.0)), jnp.sum(losses * weight)), losses

    def values_and_gradients(function):
        sums, pull, losses = jax.vjp(function, model, hidden, has_aux=True)
        return sums[0], losses, [pull(tuple(map(jnp.float32, of)))[:2] for of in ((1, 0), (0, 1))]

    loss, losses, gradient = jax.jit(lambda: values_and_gradients(chunked))()
    expected_loss, expected_losses, expected = jax.jit(lambda: values_and_gradients(at_once))()
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    np.testing.assert_allclose(loss, -3.7 * jnp.sum(jnp.where(mask, losses, 0.0)), rtol=1e-6)
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


MESHES = [{"data": 2}, {"fsdp": 2}, {"tensor": 2}, {"context": 2}, {"data": 2, "fsdp": 2, "context": 2}]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_mesh_trains_alike(sizes, small_run, packed, on_one_device):
    devices = math.prod(sizes.values())
    history, after_4 = small_training(small_run, packed, devices, 4, **({"data": 1} | sizes))
    for name in ("loss", "grad_norm", "learning_rate", "targets"):
        got, expected = ([line[name] for line in lines] for lines in (history, on_one_device[0][:4]))
        np.testing.assert_allclose(got, expected, rtol=2e-6, err_msg=name)
    for name, expected in on_one_device[1].items():
        np.testing.assert_allclose(after_4[name], expected, rtol=0, atol=2e-6 * np.abs(expected).max(), err_msg=name)
