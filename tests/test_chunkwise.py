"""Activation Beacon and AutoCompressors: training in one pass, and inference, against their definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.reference import masked_attention
from unigist_jax.config import RunConfig, default_config
from unigist_jax.inference import generate
from unigist_jax.inference.methods import METHODS, trained_method
from unigist_jax.layout import GistLayout
from unigist_jax.model import LlamaConfig, init_llama
from unigist_jax.model.hf import load_hf, save_hf
from unigist_jax.model.layers import rotary
from unigist_jax.pages import PAGE

VOCAB = 61
BEACON = GistLayout(ratio=2, num_sinks=3, window=6, chunk=8)
SUMMARY = GistLayout(ratio=2, num_sinks=4, window=6, chunk=8)
LAYOUTS = {"activation_beacon": BEACON, "autocompressors": SUMMARY}


@functools.cache
def model_of(method):
    """Random weights large enough that every visible key matters."""
    attention = "gist" if method == "activation_beacon" else method
    config = LlamaConfig(
        VOCAB, 24, 40, 2, 4, 2, 8, rope_theta=100.0, dtype="float32", attention=attention,
        attention_backend="reference" if attention == "gist" else None,
    )  # fmt: skip
    model = init_llama(config, LAYOUTS[method], 0)
    return jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x + 0.1, model)


def random_tokens(count, seed=1):
    return np.random.default_rng(seed).integers(0, VOCAB, count)


@jax.jit
def one_pass(model, tokens, doc_start):
    return model(tokens, doc_start)


def assert_same(got, want):
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5 * np.abs(want).max())


# --- the definitions ------------------------------------------------------------------------------------------------


def causal_layers(model, x, positions, past=None):
    """Embeddings [1, P, E] through all layers, each seeing `past` (keys and values a layer) and those before it."""
    angles, new = rotary(model.config, positions), []
    for index in range(model.config.num_layers):

        def attend(q, k, v, index=index):
            new.append((k, v))
            if past is not None:
                k, v = (jnp.concatenate([old, x], axis=1) for old, x in zip(past[index], (k, v), strict=True))
            seen = jnp.arange(k.shape[1]) <= jnp.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
            return masked_attention(q, k, v, seen[None]), None

        x, _ = model.layer(index)(x, angles, attend)
    return x, new


def beacon_logits(model, tokens, layout):
    """Chunk by chunk over `x … x b x … x b …`; of a chunk only its beacons' keys and values stay."""
    r, sinks = layout.ratio, layout.num_sinks
    _, past = causal_layers(model, model.embed_sinks(), jnp.arange(sinks))
    logits = []
    for start in range(0, len(tokens), layout.chunk):
        raws = tokens[start : start + layout.chunk]
        x, positions, is_raw = [], [], []
        for i, token in enumerate(raws):
            x.append(model.embed(jnp.array([[token]])))
            positions.append(sinks + start + i)
            is_raw.append(True)
            if i % r == r - 1:
                x.append(model.embed_gists(1, 1))
                positions.append(sinks + start + i + 1)
                is_raw.append(False)
        hidden, new = causal_layers(model, jnp.concatenate(x, axis=1), jnp.array(positions), past)
        is_raw = np.array(is_raw)
        logits.append(np.asarray(model.logits(hidden))[0, is_raw])
        past = [
            tuple(jnp.concatenate([old, x[:, ~is_raw]], axis=1) for old, x in zip(*pair, strict=True))
            for pair in zip(past, new, strict=True)
        ]
    return np.concatenate(logits)


def autocompressors_logits(model, tokens, cuts):
    """Segment by segment: summaries are the normed final states of the summary tokens, and inputs of what follows."""
    summaries, logits = [], []
    for segment in np.split(tokens, cuts):
        x = jnp.concatenate([*summaries, model.embed(jnp.asarray(segment)[None]), model.embed_sinks()], axis=1)
        hidden, _ = causal_layers(model, x, jnp.arange(x.shape[1]))
        first = sum(summary.shape[1] for summary in summaries)
        logits.append(np.asarray(model.logits(hidden))[0, first : first + len(segment)])
        summaries.append(model.norm(hidden[:, first + len(segment) :]))
    return np.concatenate(logits)


# --- training -------------------------------------------------------------------------------------------------------


def test_one_pass_is_beacon_s_definition():
    """A row of two documents: each as if it were alone, its chunks counted from its beginning."""
    model, tokens = model_of("activation_beacon"), random_tokens(44)
    doc_start = jnp.array([[0] * 9 + [9] * 13])  # 18 and 26 raws
    got = one_pass(model, jnp.asarray(tokens)[None], doc_start)[0]
    assert_same(got[:18], beacon_logits(model, tokens[:18], BEACON))
    assert_same(got[18:], beacon_logits(model, tokens[18:], BEACON))


def test_one_pass_is_autocompressors_definition():
    """The second document begins inside a chunk, which is its first segment; chunks are cut where the row has them."""
    model, tokens = model_of("autocompressors"), random_tokens(44)
    doc_start = jnp.array([[0] * 9 + [9] * 13])
    got = one_pass(model, jnp.asarray(tokens)[None], doc_start)[0]
    assert_same(got[:18], autocompressors_logits(model, tokens[:18], [8, 16]))
    assert_same(got[18:], autocompressors_logits(model, tokens[18:], [6, 14, 22]))


def test_autocompressors_cut_gradients_every_two_chunks():
    """What chunk i says depends on chunk j's tokens for training only if both lie in one pair."""
    model, tokens = model_of("autocompressors"), jnp.asarray(random_tokens(32))[None]

    @jax.jit
    def gradient(x):
        def of_chunks(x):
            stand_in = jax.tree.map(lambda leaf: leaf, model)
            stand_in.embedding = type(model.embedding)(x)
            hidden = stand_in.hidden_states(jnp.arange(32)[None])
            return jnp.stack([jnp.abs(hidden[:, 8 * i : 8 * i + 8]).sum() for i in range(4)])

        return jax.jacrev(of_chunks)(x)

    own_embeddings = model.embedding[...][tokens[0]]  # token i of the row has embedding i, used there alone
    size = np.abs(np.asarray(gradient(own_embeddings))).reshape(4, 4, 8, -1).sum((2, 3))  # chunk said, chunk read
    reached = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    np.testing.assert_array_equal(size > 0, np.array(reached, bool))


# --- inference ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(LAYOUTS))
def test_reading_a_prompt_of_any_length_is_one_pass(method):
    """All lengths from 1 raw to past the second chunk, as one ragged batch; then some steps of decoding."""
    model, tokens = model_of(method), random_tokens(24)
    logits = np.asarray(one_pass(model, jnp.asarray(tokens)[None], jnp.zeros((1, 12), jnp.int32)))[0]
    lengths = np.arange(1, 21)
    got, cache = METHODS[method].prefill(model, [tokens[:n].tolist() for n in lengths], capacity=24, chunk_size=4)
    assert_same(got, logits[lengths - 1])
    step = jax.jit(METHODS[method].decode_logits)
    for i in range(3):
        got, cache = step(model, cache, jnp.asarray(tokens[lengths + i], jnp.int32))
        # what follows a context stays raw with AutoCompressors, also where a chunk ends
        same = (lengths % 8 + i < 8) | (method == "activation_beacon")
        assert_same(np.asarray(got)[same], logits[lengths + i][same])


@pytest.mark.parametrize("method", sorted(LAYOUTS))
def test_contexts_shorter_than_a_chunk_stay_raw(method):
    model, tokens = model_of(method), random_tokens(8)
    logits = np.asarray(one_pass(model, jnp.asarray(tokens)[None], jnp.zeros((1, 4), jnp.int32)))[0]
    got, _ = METHODS[method].prefill(model, [tokens[:5].tolist(), tokens[:3].tolist()], capacity=8)
    assert_same(got, logits[[4, 2]])


def test_caches_hold_beacons_or_summaries_and_one_chunk():
    token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, dim, float32
    prompt = random_tokens(80).tolist()
    _, cache = METHODS["activation_beacon"].prefill(model_of("activation_beacon"), [prompt], capacity=80)
    pages = -(-80 // 2 // PAGE) * PAGE
    assert cache.nbytes == token * (3 + pages + 8)
    _, cache = METHODS["autocompressors"].prefill(model_of("autocompressors"), [prompt[:79]], capacity=88)
    assert cache.nbytes == token * (9 * 4 + 88 - 72)


@pytest.mark.parametrize("method", sorted(LAYOUTS))
def test_questions_go_behind_a_context(method):
    """Greedy answers from one context's cache are those to context and question read together, chunks permitting."""
    model, context, questions = model_of(method), random_tokens(17).tolist(), [[3, 5], [7]]
    _, cache = METHODS[method].prefill(model, [context], capacity=24)
    answers = generate(model, questions, max_new_tokens=4, cache=cache, method=method).tokens
    for question, answer in zip(questions, answers, strict=True):
        assert generate(model, [context + question], max_new_tokens=4).tokens[0] == answer


# --- config ---------------------------------------------------------------------------------------------------------


def test_method_sets_what_it_implies(tmp_path):
    config = default_config()
    for method, layout in {
        "unigist": GistLayout(),
        "full": GistLayout(),
        "activation_beacon": GistLayout(4, 128, 2044, 2048),
        "autocompressors": GistLayout(4, 512, 2044, 2048),
    }.items():
        config.method = method
        run = RunConfig.from_dict(config.to_dict())
        assert run.gist == layout and trained_method(run.model, run.gist) == method
        assert RunConfig.from_dict(run.to_dict()) == run
    config.gist.chunk = 512
    assert RunConfig.from_dict(config.to_dict()).gist == GistLayout(4, 128, 508, 512)
    config.method = "snapkv"
    with pytest.raises(ValueError, match=r"method='snapkv' is not one that can be trained; choose one of"):
        RunConfig.from_dict(config.to_dict())
    with pytest.raises(ValueError, match=r"chunk=10 with window=8 and ratio=4.*use chunk=8, window=4"):
        GistLayout(4, 0, 8, 10)
    with pytest.raises(ValueError, match="activation_beacon needs chunks"):
        METHODS["activation_beacon"].prefill(model_of("autocompressors"), [[1]], layout=GistLayout(2, 4, 6))
    model = model_of("activation_beacon")
    save_hf(model, tmp_path)
    assert load_hf(tmp_path).layout == BEACON
