"""Options of the train step against computations of their own: parts of a batch, frozen weights, teachers, ratios, …"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brute_force import interleaved_mask
from tiny_runs import named_arrays, tiny_config

from unigist_jax.config import RunConfig
from unigist_jax.data import pack_documents
from unigist_jax.layout import GistLayout, refined_starts
from unigist_jax.model import init_llama
from unigist_jax.sharding import batch_sharding, make_mesh
from unigist_jax.training.flops import causal_pairs, gist_pairs, step_flops
from unigist_jax.training.loop import layout_of_step
from unigist_jax.training.step import Batch, make_eval_step, make_recall_step, make_state, make_train_step

pytestmark = pytest.mark.usefixtures("compiled_once")

VOCAB = 48


def run_with(**fields):
    """A tiny run on one device with some fields changed: `run_with(train__accumulate=2)`."""
    config = tiny_config()
    config.model.update(vocab_size=VOCAB, num_layers=1, attention_backend="reference")  # soon compiled
    config.optim.update(peak_lr=1e-2, warmup_steps=0)
    config.train.loss_chunk = 13
    config.mesh.update(data=1, fsdp=1, tensor=1)
    for name, value in fields.items():
        section, field = name.split("__")
        config[section][field] = value
    return RunConfig.from_dict(config.to_dict())


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, VOCAB, rng.integers(2, 30)).astype(np.int32) for _ in range(20)]
    packed = pack_documents(documents, row_length=32, layout=GistLayout(4, 0, 0), pad_id=0)
    return packed.tokens[:8], packed.doc_start[:8], packed.loss_mask[:8]


def one_step(run, rows, devices=1, teacher=None, layout=None, model=None):
    """The model before and after one step, as arrays by name, the optimizer state after it, and the metrics."""
    mesh = make_mesh(**dataclasses.asdict(run.mesh), devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        state = make_state(run, mesh, model)
        before = named_arrays(state.model)
        batch = Batch(*(jax.device_put(x, batch_sharding(mesh)) for x in rows))
        state, metrics = make_train_step(run, mesh)(state, batch, teacher=teacher, layout=layout)
        metrics = {name: float(value) for name, value in metrics.items()}
        return before, named_arrays(state.model), jax.device_get(state.opt_state), metrics


@pytest.fixture(scope="module")
def plain(rows):
    return one_step(run_with(), rows)


def assert_close(got, expected, tolerance=2e-6):
    for name, array in expected.items():
        np.testing.assert_allclose(got[name], array, rtol=0, atol=tolerance * np.abs(array).max(), err_msg=name)


@pytest.mark.parametrize(
    ("fields", "devices"),
    [
        ({"train__accumulate": 2, "mesh__fsdp": 2, "mesh__data": 2}, 4),
        ({"model__remat": "attention", "model__attention_backend": "blocked"}, 1),
        ({"model__remat": "dots"}, 1),
        ({"model__remat": "attention_offload", "mesh__fsdp": 2}, 2),
    ],
    ids=str,
)
def test_how_a_step_is_computed_does_not_change_it(fields, devices, rows, plain):
    """Rows differ in their numbers of targets, so parts must be weighed by them."""
    _, after, _, metrics = one_step(run_with(**fields), rows, devices)
    assert_close(metrics, plain[3])
    assert_close(after, plain[1], 1e-4)  # the first AdamW step divides each gradient by itself


def test_gist_training_leaves_everything_else_as_it_is(rows, plain):
    before, after, opt_state, metrics = one_step(run_with(train__trainable="gist"), rows)
    for name, array in after.items():
        learns = name in ("gist_embedding", "sink_embedding")
        assert (array.tobytes() != before[name].tobytes()) == learns, name
        if learns:
            np.testing.assert_allclose(array, plain[1][name], rtol=0, atol=1e-4 * np.abs(array).max())
    assert sum(x.size for x in jax.tree.leaves(opt_state)) < 200  # no moments of what is frozen
    assert metrics["flops"] == pytest.approx(2 / 3 * plain[3]["flops"])


def test_distillation_is_the_divergence_from_the_teachers_logits(rows):
    weight = 0.25
    run = run_with(train__distill_weight=weight, train__distill_temperature=2.0)
    teacher = jax.tree.map(lambda x: 4 * x, init_llama(run.model, run.gist, 7))
    model = init_llama(run.model, run.gist, run.train.seed)
    tokens, doc_start, mask = (jnp.asarray(x) for x in rows)
    taught = jax.nn.softmax(teacher(tokens, doc_start, attention="full") / 2.0)

    def whole(model):
        logits = model(tokens, doc_start)
        logs = jax.nn.log_softmax(logits / 2.0)
        divergence = 4.0 * jnp.sum(jnp.where(mask[..., None], taught * (jnp.log(taught) - logs), 0.0))
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.roll(tokens, -1, 1)[..., None], axis=-1)[..., 0]
        loss = -jnp.sum(jnp.where(mask, picked, 0.0))
        return ((1 - weight) * loss + weight * divergence) / mask.sum(), (loss / mask.sum(), divergence / mask.sum())

    gradient, (loss, divergence) = jax.jit(jax.grad(whole, has_aux=True))(model)
    norm = np.sqrt(sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(gradient)))
    metrics = one_step(run, rows, teacher=teacher)[3]
    got = [metrics[name] for name in ("loss", "divergence", "grad_norm")]
    np.testing.assert_allclose(got, [loss, divergence, norm], rtol=2e-5)


@pytest.mark.parametrize("kind", ["not finite", "spike"])
def test_a_bad_step_is_skipped(kind, rows):
    spike = {"train__spike_norm": 1e-3} if kind == "spike" else {}
    run = run_with(train__on_bad_step="skip", **spike)
    model = init_llama(run.model, run.gist, 0)
    if kind == "not finite":
        model = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.inf), model)
    before, after, opt_state, metrics = one_step(run, rows, model=model)
    assert metrics["bad"] == 1.0
    for name, array in after.items():
        assert array.tobytes() == before[name].tobytes(), name
    moments = [x for x in jax.tree.leaves(opt_state) if x.ndim]
    assert moments and not any(x.any() for x in moments)


def test_short_parameters_and_moments_train_like_long_ones(rows, plain):
    short = run_with(model__param_dtype="bfloat16", optim__state_dtype="bfloat16")
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), init_llama(run_with().model, short.gist, 0))
    model.config = short.model
    _, after, opt_state, metrics = one_step(short, rows, model=model)
    assert {str(x.dtype) for x in after.values()} == {"bfloat16"}
    assert {str(x.dtype) for x in jax.tree.leaves(opt_state) if x.ndim} == {"bfloat16"}
    assert metrics["loss"] == pytest.approx(plain[3]["loss"], rel=2e-3)
    assert metrics["grad_norm"] == pytest.approx(plain[3]["grad_norm"], rel=2e-2)


def test_rows_packed_for_the_largest_ratio_train_every_ratio(rows, plain):
    """What a step computes at a drawn ratio is what it computes from rows packed for that ratio."""
    run = run_with(gist__ratio=8, train__mixed_ratios="4,8")
    tokens, doc_start, mask = (np.array(x) for x in rows)
    coarse = doc_start[:, ::2] // 2  # one document a row, or borders at whole units of 8
    keep = (refined_starts(coarse, 2) == doc_start).all(axis=1)
    assert keep.any() and not keep.all()
    mask[~keep] = False
    four = next(layout for layout in run.layouts() if layout.ratio == 4)
    drawn = one_step(run, (tokens, coarse, mask), layout=four)[3]
    alone = one_step(run_with(), (tokens, doc_start, mask))[3]
    assert_close(drawn, {name: value for name, value in alone.items() if name != "flops"})
    ratios = [layout_of_step(run, step).ratio for step in range(40)]
    assert set(ratios) == {4, 8} and ratios[20:] == [layout_of_step(run, step).ratio for step in range(20, 40)]


def test_evaluation_in_the_parts_of_a_step_is_that_of_the_whole_batch(rows):
    run = run_with(train__accumulate=2, mesh__data=2)
    model = init_llama(run.model, run.gist, 0)
    tokens, doc_start, mask = map(jnp.asarray, rows)
    losses = -jax.nn.log_softmax(model(tokens, doc_start))[:, :-1]
    expected = jnp.take_along_axis(losses, tokens[:, 1:, None], axis=-1)[mask[:, :-1]]
    mesh = make_mesh(data=2, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        batch = jax.device_put(Batch(tokens, doc_start, mask), batch_sharding(mesh))
        total, count = make_eval_step(run)(model, batch)
    assert count == len(expected)
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-5)


def test_recall_is_whether_every_answer_token_comes_first(rows):
    run = run_with(train__accumulate=2)
    model = init_llama(run.model, run.gist, 0)
    tokens, doc_start, mask = (np.array(x) for x in rows)
    best = np.asarray(jnp.argmax(model(jnp.asarray(tokens), jnp.asarray(doc_start)), axis=-1))
    mask[:] = False
    mask[:5, 20:23] = True
    for row in range(3):  # the first three rows are answered, the fourth but for its last token
        for place in range(20, 23):
            tokens[row, place + 1] = best[row, place]
            best = np.asarray(jnp.argmax(model(jnp.asarray(tokens), jnp.asarray(doc_start)), axis=-1))
    expected = best[:5, 20:23] == tokens[:5, 21:24]
    with jax.set_mesh(make_mesh(data=1, devices=jax.devices()[:1])):
        sums = make_recall_step(run)(model, Batch(*(jnp.asarray(x) for x in (tokens, doc_start, mask))))
    assert expected.all(axis=1).sum() >= 3
    assert sums["answers"] == expected.all(axis=1).sum() and sums["rows"] == 5
    np.testing.assert_allclose(sums["tokens"], expected.mean(axis=1).sum(), rtol=1e-6)


def test_useful_operations_are_counted_from_the_mask(rows):
    layout = GistLayout(4, 2, 8)
    starts = jnp.asarray(rows[1][:2])
    seen = sum(int(interleaved_mask(4, 2, 8, 8, row)[2:].sum()) for row in rows[1][:2])
    assert int(gist_pairs(layout, starts)) == seen
    begin = np.repeat(np.asarray(starts) * 4, 4, axis=1)
    assert int(causal_pairs(4, starts)) == int((np.arange(32) - begin + 1).sum())
    model = run_with().model
    one = float(step_flops(model, layout, starts))
    weights = 2 * 16 * (4 + 2) * 8 + 3 * 16 * 24
    assert one == pytest.approx(6 * (weights * 80 + 16 * VOCAB * 64) + 3 * 4 * 4 * 8 * seen)
