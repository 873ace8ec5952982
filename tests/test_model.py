"""The Llama itself: what training may choose must not change what it computes, and what gists may not leak."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.backends import RESIDUALS
from unigist_jax.layout import GistLayout, document_starts
from unigist_jax.model import LlamaConfig, RopeScaling, init_llama
from unigist_jax.model.layers import head_product
from unigist_jax.sharding import batch_sharding, make_mesh, tree_shardings

LAYOUT = GistLayout(2, 3, 4)
CONFIG = LlamaConfig(32, 16, 24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, dtype="float32")
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (4, 16)), jnp.int32)


@partial(jax.jit, static_argnames=("attention",))
def logits_of(model, tokens, doc_start=None, attention=None):
    return model(tokens, doc_start, attention=attention)


def model_with(layout=LAYOUT, **changes):
    return init_llama(dataclasses.replace(CONFIG, **changes), layout, 0)


def loss_of(model, tokens, doc_start=None):
    return jnp.sum(jnp.sin(model(tokens, doc_start)))


def assert_trees_close(got, want, rtol):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
    "choice",
    [
        dict(remat="full"),
        dict(remat="dots"),
        dict(remat="attention_output"),
        dict(remat="attention_offload"),
        dict(attention_backend="reference"),
    ],
    ids=str,
)
def test_choices_that_change_only_cost(choice):
    step = jax.jit(jax.value_and_grad(loss_of))
    assert_trees_close(step(model_with(**choice), TOKENS), step(model_with(), TOKENS), rtol=2e-5)


def test_what_each_policy_does_with_attentions_output():
    """Kept on the device, kept on the host, or computed a second time in the backward pass."""
    step = jax.value_and_grad(loss_of)
    for remat in ("attention_offload", "attention_output", "attention", "full"):
        traced = str(jax.make_jaxpr(step)(model_with(remat=remat), TOKENS))
        assert ("<host>" in traced) == (remat == "attention_offload"), remat
        again = traced.count(f"name={RESIDUALS}") > 2  # output and log-sum-exp once, or once more
        assert again == (remat == "full"), remat


@pytest.mark.parametrize(("attention", "sizes"), [("gist", (2, 2, 2)), ("full", (1, 4, 2))])
def test_every_mesh_computes_the_same(attention, sizes):
    doc_start = jnp.asarray(document_starts(np.array([[0] * 8, [0] * 3 + [1] * 5, [0, 1] * 4, [0] * 8])))
    model = model_with(attention=attention)
    step = jax.jit(jax.value_and_grad(loss_of))
    want = step(model, TOKENS, doc_start)
    mesh = make_mesh(*sizes)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(model, tree_shardings(mesh, model))
        batch = jax.device_put((TOKENS, doc_start), batch_sharding(mesh))
        got = step(sharded, *batch)
    assert_trees_close(jax.device_get(got), want, rtol=2e-5)


@pytest.mark.parametrize("attention", ["gist", "full"])
def test_packed_documents_are_each_alone(attention):
    model = model_with(attention=attention)
    lengths = [2, 5, 1]  # units
    doc_start = jnp.asarray(document_starts(np.repeat(np.arange(3), lengths)))[None]
    packed = logits_of(model, TOKENS[:1], doc_start)
    begin = 0
    for units in lengths:
        end = begin + units * LAYOUT.ratio
        alone = logits_of(model, TOKENS[:1, begin:end])
        np.testing.assert_allclose(packed[:, begin:end], alone, rtol=1e-4, atol=1e-5)
        begin = end


def test_no_logit_depends_on_a_later_token():
    model = model_with()
    changed = TOKENS.at[:, 9].set((TOKENS[:, 9] + 1) % 32)
    before, after = logits_of(model, TOKENS), logits_of(model, changed)
    np.testing.assert_array_equal(before[:, :9], after[:, :9])
    assert np.abs(before[:, 9:] - after[:, 9:]).max() > 1e-5


def test_raws_outside_the_window_are_seen_only_through_gists():
    """Without gists' values in between nothing of an old raw arrives; with them it does."""
    layout = GistLayout(2, 3, 0)
    model = model_with(layout, num_layers=1)
    changed = TOKENS.at[:, 0].set((TOKENS[:, 0] + 1) % 32)
    far = np.abs(logits_of(model, TOKENS) - logits_of(model, changed))[:, 8:].max()
    full = np.abs(np.subtract(*(logits_of(model, x, attention="full") for x in (TOKENS, changed))))[:, 8:].max()
    assert full > 1e-6  # full attention sees it in its only layer
    assert far == 0  # one layer: the gist's keys and values come from its embedding alone
    deeper = model_with(layout, num_layers=2)
    assert np.abs(logits_of(deeper, TOKENS) - logits_of(deeper, changed))[:, 8:].max() > 1e-9


def test_dtypes_and_rope_scaling():
    model = model_with(
        dtype="bfloat16", param_dtype="bfloat16", rope_scaling=RopeScaling(original_max_position_embeddings=8)
    )
    assert {x.dtype for x in jax.tree.leaves(model)} == {jnp.dtype("bfloat16")}
    assert jax.eval_shape(model.hidden_states, TOKENS).dtype == jnp.bfloat16
    assert logits_of(model, TOKENS).dtype == jnp.float32
    mixed = model_with(dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(mixed)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(logits_of(mixed, TOKENS), logits_of(model_with(), TOKENS), atol=0.03)


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match=r"num_heads=4 is not a multiple of num_kv_heads=3"):
        model_with(num_kv_heads=3)
    with pytest.raises(ValueError, match=r"head_dim=7 must be even"):
        model_with(head_dim=7)
    with pytest.raises(ValueError, match=r"remat='some'"):
        model_with(remat="some")
    with pytest.raises(ValueError, match=r"unknown attention backend 'flash'"):
        model_with(attention_backend="flash")
    with pytest.raises(ValueError, match=r"15 raw tokens is not a multiple of ratio=2; pad it to 16"):
        model_with()(TOKENS[:, :15])
    with pytest.raises(ValueError, match=r"tokens have shape \(4, 0\) .*, expected integers \[B, T\], one raw or more"):
        model_with()(TOKENS[:, :0])
    with pytest.raises(ValueError, match=r"doc_start has shape \(4, 16\), expected one entry a unit: \(4, 8\)"):
        model_with()(TOKENS, jnp.zeros(TOKENS.shape, jnp.int32))


def test_the_head_in_bfloat16_has_the_gradients_of_one_in_float32():
    x, head, weights = (
        jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(2, 6, 16), (16, 64), (2, 6, 64)])
    )

    def gradients(dtype, product):
        def loss(x, head):
            return jnp.sum(product(x, head) * weights)

        return jax.grad(loss, (0, 1))(x.astype(dtype), head.astype(dtype))

    want = gradients(jnp.float32, jnp.matmul)
    for dtype, rtol in ((jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)):
        got = gradients(dtype, head_product)
        assert all(x.dtype == dtype for x in got)
        assert_trees_close(jax.tree.map(lambda x: x.astype(jnp.float32), got), want, rtol)
