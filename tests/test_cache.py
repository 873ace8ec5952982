"""Caches beyond the invariant of test_inference.py: growing, rounded gists, weights apart, two devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unigist_jax.inference import GistCache, append, for_inference, generate, gist_cache_bytes, prefill
from unigist_jax.inference.methods import METHODS
from unigist_jax.layout import GistLayout
from unigist_jax.model import LlamaConfig, init_llama
from unigist_jax.sharding import make_mesh, tree_shardings

CONFIG = LlamaConfig(
    61, 24, 40, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, rope_theta=100.0, dtype="float32"
)
LAYOUT = GistLayout(2, 3, 4)
TEXT = np.random.default_rng(1).integers(0, 61, 320).tolist()  # 160 gists: two whole pages and a half


def new_model(config=CONFIG):
    """Random weights large enough that every visible key matters."""
    return jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x + 0.1, init_llama(config, LAYOUT, 0))


@functools.cache
def model_and_logits():
    """The model, and its logits after every raw of the text in one pass."""
    model = new_model()
    return model, np.asarray(jax.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(TEXT)[None]))[0]


def relative(got, want):
    return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


@pytest.mark.parametrize("method", ["unigist", "unigist_int8"])
def test_a_cache_grows_where_it_is_too_short(method):
    """Two more rounds of text than the first cache has room for read on as if there had been room from the start."""
    model, _ = model_and_logits()
    chosen = METHODS[method]
    _, short = chosen.prefill(model, [TEXT[:100], TEXT[:9]], capacity=100)
    _, long = chosen.prefill(model, [TEXT[:100], TEXT[:9]], capacity=300)
    assert short.capacity == 128 and long.capacity == 384
    said = [TEXT[100:150], TEXT[9:12]]
    with pytest.raises(ValueError, match=r"sequence 0 would hold 150 tokens.*room for 128.*cache.grow"):
        append(chosen, model, short, said)
    short = short.grow(150)
    assert short.capacity == 256 and short.nbytes == gist_cache_bytes(CONFIG, LAYOUT, 150, 2, short.gist_dtype)
    assert short.grow(200) is short
    got, short = append(chosen, model, short, said)
    want, long = append(chosen, model, long, said)
    np.testing.assert_array_equal(got, want)
    answers = [
        generate(model, [[5]], max_new_tokens=150, cache=cache.select([0]), method=method) for cache in (short, long)
    ]
    assert answers[0].tokens == answers[1].tokens and answers[0].cache.capacity == 384


@pytest.mark.parametrize("chunk_size", [6, 1000])
@pytest.mark.parametrize(("gist_dtype", "bound"), [("int8", 0.02), ("float8_e4m3fn", 0.1)])
def test_rounded_gists_keep_the_invariant_to_their_rounding(gist_dtype, bound, chunk_size):
    """Ragged prompts that end before, on and after the border of a page; then steps that fill pages."""
    model, logits = model_and_logits()
    lengths = np.array([5, 127, 128, 129, 250, 257])
    got, cache = prefill(model, [TEXT[:n] for n in lengths], capacity=320, chunk_size=chunk_size, gist_dtype=gist_dtype)
    assert relative(got[0], logits[4]) < 1e-5  # one unit that is not rounded yet
    assert relative(got, logits[lengths - 1]) < bound
    for _ in range(40):
        got, cache = _step(model, cache, jnp.asarray([TEXT[n] for n in lengths], jnp.int32))
        lengths += 1
        assert 1e-5 < relative(got, logits[lengths - 1]) < bound
    assert cache.gist_dtype == gist_dtype and cache.nbytes < 0.7 * gist_cache_bytes(CONFIG, LAYOUT, 320, 6)


@functools.partial(jax.jit, donate_argnames="cache")
def _step(model, cache, tokens):
    return METHODS["unigist"].decode_logits(model, cache, tokens)


def test_an_unknown_gist_dtype_is_named():
    with pytest.raises(ValueError, match=r"gist_dtype='int4' is unknown; choose one of \('int8', 'float8_e4m3fn'\)"):
        GistCache.create(model_and_logits()[0], 1, 1, gist_dtype="int4")


@pytest.mark.parametrize("tied", [False, True])
def test_weights_apart_compute_the_same_and_free_the_stacks(tied):
    stacked = new_model(dataclasses.replace(CONFIG, dtype="bfloat16", tie_embeddings=tied))
    want = generate(stacked, [TEXT[:30], TEXT[:7]], max_new_tokens=8)
    logits, _ = prefill(stacked, [TEXT[:30]])
    before = jax.tree.leaves(stacked.layers)
    apart = for_inference(stacked)
    assert all(x.is_deleted() for x in before)
    assert {str(x.dtype) for x in jax.tree.leaves(apart)} == {"bfloat16", "float32"}  # norms stay
    assert generate(apart, [TEXT[:30], TEXT[:7]], max_new_tokens=8).tokens == want.tokens
    np.testing.assert_array_equal(prefill(for_inference(apart), [TEXT[:30]])[0], logits)
    one_pass = apart(jnp.asarray(TEXT[:30])[None])[0, -1]
    assert relative(one_pass, logits[0]) < 0.03  # bfloat16


@pytest.mark.parametrize("method", ["unigist", "unigist_int8", "full"])
def test_two_devices_that_share_the_heads_are_one(method):
    """Prefill, questions and generation on a mesh with tensor = 2: the cache holds half of the heads on each device."""
    model = new_model(dataclasses.replace(CONFIG, vocab_size=62))  # which two devices can share
    prompts, questions = [TEXT[:150], TEXT[:31]], [[3], [4, 5]]
    options = dict(max_new_tokens=6, chunk_size=32, method=method)
    one = generate(model, prompts, **options)
    one_again = generate(model, questions, cache=one.cache, **options)
    mesh = make_mesh(data=1, tensor=2, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        split = for_inference(jax.device_put(model, tree_shardings(mesh, model)))
        two = generate(split, prompts, **options)
        again = generate(split, questions, cache=two.cache, **options)
    assert two.tokens == one.tokens and again.tokens == one_again.tokens
    held = jax.tree.leaves(again.cache.layers[0])[0]
    assert held.sharding.shard_shape(held.shape)[2] == 1
