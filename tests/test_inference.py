"""The invariant: one pass = any chunking = token-by-token decoding; and what the cache holds."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unigist_jax.baselines import full_attention
from unigist_jax.inference import (
    GistCache,
    Sampling,
    append,
    decode_step,
    full_cache_bytes,
    generate,
    gist_cache_bytes,
    prefill,
)
from unigist_jax.inference.methods import METHODS
from unigist_jax.inference.prefill import chunk_lengths
from unigist_jax.inference.sampling import filtered_logits, sample
from unigist_jax.layout import GistLayout
from unigist_jax.model import LlamaConfig, init_llama
from unigist_jax.pages import rung

prefill_module = importlib.import_module("unigist_jax.inference.prefill")
VOCAB = 61
CONFIG = LlamaConfig(
    VOCAB, 24, 40, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, rope_theta=100.0, dtype="float32"
)
EXACT = ("full", "unigist")
LAYOUTS = [GistLayout(4, 5, 8), GistLayout(2, 0, 6), GistLayout(3, 2, 0), GistLayout(1, 1, 2)]


@functools.cache
def model_of(layout):
    """Random weights large enough that every visible key matters."""
    model = init_llama(CONFIG, layout, 0)
    return jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x + 0.1, model)


@functools.cache
def one_pass(layout, units, method="unigist"):
    """Tokens, and logits after every raw in one pass, padded to whole units."""
    tokens = np.random.default_rng(1).integers(0, VOCAB, units * layout.ratio)
    model = model_of(layout)
    attention = "full" if method == "full" else "gist"
    run = jax.jit(lambda model, tokens: model(tokens, attention=attention))
    return tokens, np.asarray(run(model, jnp.asarray(tokens, jnp.int32)[None]))[0]


def units_past_window(layout):
    return layout.window_units + 3


def assert_same(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("chunk_units", [1, 2, 100])
def test_prefill_in_any_chunks_is_one_pass_at_every_prompt_length(layout, chunk_units):
    """All prompt lengths at once, as one ragged batch: 1 raw to 3 units past the window."""
    tokens, logits = one_pass(layout, units_past_window(layout))
    lengths = np.arange(1, len(tokens) + 1)
    prompts = [tokens[:n].tolist() for n in lengths]
    got, cache = prefill(model_of(layout), prompts, chunk_size=chunk_units * layout.ratio)
    assert_same(got, logits[lengths - 1])
    np.testing.assert_array_equal(cache.length, lengths)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_decoding_from_every_prompt_length_is_one_pass(layout):
    """Sequences of every length and phase step together; each step is that row of the one pass."""
    units = units_past_window(layout)
    tokens, logits = one_pass(layout, units + 2 + layout.window_units)
    lengths = np.arange(1, units * layout.ratio + 1)
    model = model_of(layout)
    _, cache = prefill(model, [tokens[:n].tolist() for n in lengths], chunk_size=2 * layout.ratio, capacity=len(tokens))
    for step in range(len(tokens) - lengths[-1]):
        got, cache = decode_step(model, cache, jnp.asarray(tokens[lengths + step], jnp.int32))
        assert_same(got, logits[lengths + step])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_decoding_from_the_first_token_on_is_one_pass(layout):
    tokens, logits = one_pass(layout, units_past_window(layout))
    model = model_of(layout)
    got, cache = prefill(model, [tokens[:1].tolist()], capacity=len(tokens))
    for i in range(1, len(tokens)):
        assert_same(got[0], logits[i - 1])
        got, cache = decode_step(model, cache, jnp.asarray(tokens[i : i + 1], jnp.int32))
    assert_same(got[0], logits[-1])


def test_another_ratio_than_the_model_s_keeps_the_invariant():
    trained, layout = GistLayout(4, 5, 8), GistLayout(2, 5, 4)
    model, (tokens, _) = model_of(trained), one_pass(trained, 4)
    want = model(jnp.asarray(tokens, jnp.int32)[None], layout=layout)[0]
    got, _ = prefill(model, [tokens[:n].tolist() for n in (3, 9, 16)], chunk_size=6, layout=layout)
    assert_same(got, want[np.array([2, 8, 15])])


def test_a_raw_that_left_the_window_is_gone():
    """The ring is too short to hold it, and blanking the gists' values changes what comes next: they are its trace."""
    layout = LAYOUTS[0]
    tokens, _ = one_pass(layout, units_past_window(layout))
    model = model_of(layout)
    _, cache = prefill(model, [tokens.tolist()], capacity=len(tokens) + 4)
    assert cache.layers[0].raw_k.shape[1] < len(tokens)
    blank = [kv._replace(gist_v=kv.gist_v * 0) for kv in cache.layers]
    forgetful = GistCache(cache.sinks, tuple(blank), cache.length, layout)
    step = functools.partial(decode_step, model, tokens=jnp.array([7], jnp.int32))
    kept, forgotten = (np.asarray(step(cache=jax.tree.map(jnp.copy, c))[0]) for c in (cache, forgetful))
    assert np.abs(kept - forgotten).max() > 1e-2


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_cache_bytes_follow_the_formula(layout):
    """2 L Hkv D bytes (s + G + W): a raw costs nothing, r raws cost one gist, allocated 64 at a time."""
    token = 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim * 4
    ring = -(-(layout.window + layout.ratio) // 8) * 8
    for pages, raws in ((1, 1), (1, 64 * layout.ratio), (2, 64 * layout.ratio + 1), (2, 128 * layout.ratio)):
        cache = GistCache.create(model_of(layout), 3, raws)
        expected = token * (layout.num_sinks + 3 * (64 * pages + ring))
        assert cache.nbytes == expected == gist_cache_bytes(CONFIG, layout, raws, batch=3)
        assert cache.capacity == 64 * pages * layout.ratio
        rounded = GistCache.create(model_of(layout), 3, raws, gist_dtype="int8")
        assert rounded.nbytes == gist_cache_bytes(CONFIG, layout, raws, batch=3, gist_dtype="int8")
    assert full_cache_bytes(CONFIG, 65, batch=3) == 3 * 128 * token


def test_sizes_of_caches_are_few_and_close():
    sizes = [rung(pages) for pages in range(1, 5000)]
    assert all(size >= pages for pages, size in enumerate(sizes, start=1))
    assert sizes[:32] == list(range(1, 33))
    assert max(size / pages for pages, size in enumerate(sizes, start=1)) < 17 / 16
    assert len(set(sizes)) < 32 + 8 * 16


def test_decoding_does_not_grow_the_cache():
    layout = LAYOUTS[0]
    tokens, _ = one_pass(layout, units_past_window(layout))
    _, cache = prefill(model_of(layout), [tokens[:3].tolist()] * 2, capacity=len(tokens))
    before = cache.nbytes
    for token in tokens[3:9]:
        _, cache = decode_step(model_of(layout), cache, jnp.full((2,), token, jnp.int32))
        assert cache.nbytes == before == gist_cache_bytes(CONFIG, layout, len(tokens), batch=2)


def test_full_attention_decodes_as_it_reads():
    layout = LAYOUTS[0]
    tokens, logits = one_pass(layout, 5, "full")
    model, lengths = model_of(layout), np.array([1, 4, 7])
    got, cache = full_attention.prefill(model, [tokens[:n].tolist() for n in lengths], capacity=len(tokens))
    assert cache.nbytes == full_cache_bytes(CONFIG, len(tokens), batch=3)
    for step in range(10):
        assert_same(got, logits[lengths - 1 + step])
        got, cache = jax.jit(full_attention.decode_logits)(model, cache, jnp.asarray(tokens[lengths + step], jnp.int32))


@pytest.mark.parametrize("method", EXACT)
def test_a_ragged_batch_generates_what_each_prompt_does_alone(method):
    layout = LAYOUTS[0]
    tokens, _ = one_pass(layout, 5)
    model, prompts = model_of(layout), [tokens[:n].tolist() for n in (1, 6, 11)]
    options = dict(max_new_tokens=9, chunk_size=4, capacity=24, method=method)
    together = generate(model, prompts, **options)
    for prompt, output in zip(prompts, together.tokens, strict=True):
        alone = generate(model, [prompt], **options).tokens[0]
        assert output == alone
        assert greedy_by_one_pass(model, prompt, 9, "full" if method == "full" else "gist") == alone


def greedy_by_one_pass(model, prompt, count, attention):
    """Greedy continuation without any cache: the whole text again for every token."""
    run = jax.jit(lambda model, tokens: model(tokens, attention=attention))
    text = list(prompt)
    for _ in range(count):
        padded = np.zeros(24, np.int32)
        padded[: len(text)] = text
        text.append(int(np.argmax(run(model, jnp.asarray(padded)[None])[0, len(text) - 1])))
    return text[len(prompt) :]


def test_generate_streams_stops_and_repeats_by_seed():
    layout = LAYOUTS[0]
    tokens, _ = one_pass(layout, 5)
    model, prompts = model_of(layout), [tokens[:3].tolist(), tokens[:8].tolist()]
    hot = dict(max_new_tokens=12, sampling=Sampling(temperature=1.5, top_k=20, top_p=0.9))
    streamed = [[], []]
    first = generate(model, prompts, seed=3, on_token=lambda b, token: streamed[b].append(token), **hot)
    assert streamed == first.tokens and [len(x) for x in first.tokens] == [12, 12] and first.stopped == [False, False]
    assert generate(model, prompts, seed=3, **hot).tokens == first.tokens
    assert generate(model, prompts, seed=4, **hot).tokens != first.tokens
    stop = first.tokens[0][5]
    ended = generate(model, prompts, seed=3, stop_tokens=[stop], **hot)
    assert ended.stopped[0] and ended.tokens[0] == first.tokens[0][: first.tokens[0].index(stop)]
    # streamed in blocks of which a further one is always launched, also behind the end of all
    alone = dict(hot, max_new_tokens=40)
    said = generate(model, prompts[:1], seed=3, **alone).tokens[0]
    stop = next(token for token in said if said.index(token) in range(3, 8))
    shown = []
    short = generate(
        model, prompts[:1], seed=3, stop_tokens=[stop], on_token=lambda _, token: shown.append(token), **alone
    )
    assert short.stopped == [True] and short.tokens == [said[: said.index(stop)]] == [shown]
    assert short.cache.length[0] == len(prompts[0]) + len(shown)


@pytest.mark.parametrize("method", EXACT)
def test_questions_behind_one_context_are_one_pass(method):
    """A context is read once; ragged questions, an answer, and a second round of questions read on from its cache."""
    layout = LAYOUTS[0]
    tokens, _ = one_pass(layout, 5)
    model, chosen, text = model_of(layout), METHODS[method], tokens.tolist()
    context, questions = text[:9], [text[9:10], text[10:17], text[3:6]]
    _, cache = chosen.prefill(model, [context], capacity=64, chunk_size=4)
    logits, asked = append(chosen, model, cache.select([0, 0, 0]), questions)
    for question, got in zip(questions, logits, strict=True):
        assert_same(got, chosen.prefill(model, [context + question], capacity=64)[0][0])
    np.testing.assert_array_equal(asked.length, [9 + len(q) for q in questions])
    logits, asked = append(chosen, model, asked.select([2, 0]), [text[:5], text[:2]])
    for said, got in zip((questions[2] + text[:5], questions[0] + text[:2]), logits, strict=True):
        assert_same(got, chosen.prefill(model, [context + said], capacity=64)[0][0])
    answers = generate(model, questions, max_new_tokens=6, cache=cache, method=method).tokens
    for question, answer in zip(questions, answers, strict=True):
        assert answer == generate(model, [context + question], max_new_tokens=6, method=method).tokens[0]


@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=str)
def test_a_long_question_is_read_in_chunks_from_the_middle_of_a_unit(layout, monkeypatch):
    """From every phase of a unit; most questions end with that unit, one goes on beyond the window: as one pass."""
    monkeypatch.setitem(prefill_module.CHUNK_RAWS, "cpu", 2 * layout.ratio * layout.ratio)
    tokens, logits = one_pass(layout, 2 * units_past_window(layout))
    model, begin = model_of(layout), layout.window + layout.ratio
    contexts = [tokens[: begin + phase].tolist() for phase in range(layout.ratio)]
    ends = np.array([begin + layout.ratio] * (layout.ratio - 1) + [len(tokens) - 2])
    _, cache = prefill(model, contexts, capacity=len(tokens), chunk_size=layout.ratio)
    questions = [tokens[len(context) : end].tolist() for context, end in zip(contexts, ends, strict=True)]
    got, cache = append(METHODS["unigist"], model, cache, questions)
    assert_same(got, logits[ends - 1])
    for step in range(2):
        got, cache = decode_step(model, cache, jnp.asarray(tokens[ends + step], jnp.int32))
        assert_same(got, logits[ends + step])


def test_a_sequence_that_has_stopped_is_frozen():
    """Its cache goes on as if the others had never decoded beside it."""
    layout = LAYOUTS[0]
    tokens, _ = one_pass(layout, 5)
    model, prompts, chosen = model_of(layout), [tokens[:3].tolist(), tokens[:8].tolist()], METHODS["unigist"]
    free = generate(model, prompts, max_new_tokens=12).tokens
    stop = next(token for token in free[0][1:] if token not in free[1])
    ended = generate(model, prompts, max_new_tokens=12, stop_tokens=[stop])
    said = free[0][: free[0].index(stop)]
    assert ended.stopped == [True, False] and ended.tokens == [said, free[1]]
    assert ended.cache.length[0] == 3 + len(said)
    logits, _ = append(chosen, model, ended.cache.select([0]), [[5, 6]])
    assert_same(logits[0], chosen.prefill(model, [prompts[0] + said + [5, 6]])[0][0])


def test_sampling_keeps_what_it_should():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))

    def kept(**options):
        return np.isfinite(filtered_logits(logits, Sampling(temperature=1.0, **options)))[0].tolist()

    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_p=0.5) == [True, False, False, False]
    assert kept(top_p=0.6) == [True, True, False, False]
    assert kept(top_k=3, top_p=0.99) == [True, True, True, False]
    assert kept() == [True] * 4
    assert kept(top_k=99) == [True] * 4
    keys = jax.random.split(jax.random.key(0), 4000)
    draws = jax.vmap(lambda key: sample(logits, Sampling(temperature=0.5), key)[0])(keys)
    shares = np.bincount(draws, minlength=4) / 4000
    sharpened = np.array([0.25, 0.09, 0.0225, 0.0025])
    np.testing.assert_allclose(shares, sharpened / sharpened.sum(), atol=0.03)
    assert sample(logits, Sampling(), keys[0]).tolist() == [0]


def test_rest_of_a_prompt_is_rounded_up_only_where_the_cache_has_room():
    layout = GistLayout(4, 0, 4)
    assert chunk_lengths(37, 16, 64, layout) == [16, 16, 8]
    assert chunk_lengths(43, 16, 64, layout) == [16, 16, 16]
    assert chunk_lengths(43, 16, 44, layout) == [16, 16, 12]
    assert chunk_lengths(32, 16, 32, layout) == [16, 16]
    assert chunk_lengths(1, 16, 1, layout) == [4]


def test_bad_input_is_named():
    layout = LAYOUTS[0]
    model = model_of(layout)
    with pytest.raises(ValueError, match=r"chunk size 6 is not a positive multiple of ratio=4; use 4 or 8"):
        prefill(model, [[1, 2]], chunk_size=6)
    with pytest.raises(ValueError, match=r"prompt 1 is empty"):
        prefill(model, [[1], []])
    with pytest.raises(ValueError, match=r"no prompts"):
        prefill(model, [])
    with pytest.raises(ValueError, match=r"prompt 0 holds token 61, outside the vocabulary 0 … 60"):
        prefill(model, [[1, 61]])
    with pytest.raises(ValueError, match=r"prompt 0 has 9 tokens and does not fit a cache for 8"):
        prefill(model, [[1] * 9], capacity=8)
    with pytest.raises(ValueError, match=r"9 tokens and 4 new ones need a cache for 13, but capacity is 12"):
        generate(model, [[1] * 9], max_new_tokens=4, capacity=12)
    with pytest.raises(ValueError, match=r"unknown method 'beacon'.*full.*unigist"):
        generate(model, [[1]], max_new_tokens=1, method="beacon")
    with pytest.raises(ValueError, match=r"num_sinks=4, the weights 5"):
        prefill(model, [[1]], layout=GistLayout(4, 4, 8))
    with pytest.raises(ValueError, match=r"max_new_tokens=0"):
        generate(model, [[1]], max_new_tokens=0)
    _, cache = prefill(model, [[1, 2], [3]], capacity=8)
    with pytest.raises(ValueError, match=r"1 token lists for a cache of 2 sequences.*cache.select\(rows\)"):
        append(METHODS["unigist"], model, cache, [[1]])
    with pytest.raises(ValueError, match=r"sequence 0 would hold 257 tokens.*room for 256.*larger capacity"):
        append(METHODS["unigist"], model, cache, [[1] * 255, [1]])
    with pytest.raises(ValueError, match=r"tokens of shape \(1,\) for a cache of 2 sequences"):
        decode_step(model, cache, jnp.zeros(1, jnp.int32))
    with pytest.raises(ValueError, match=r"stop token 61 is outside the vocabulary 0 … 60"):
        generate(model, [[1]], max_new_tokens=1, stop_tokens=[61])
    with pytest.raises(ValueError, match=r"rows \[2\] of a batch of 2 sequences; give at least one of 0 … 1"):
        cache.select([2])
    with pytest.raises(ValueError, match=r"3 prompts continue a cache of 2 sequences"):
        generate(model, [[1]] * 3, max_new_tokens=1, cache=cache)
    for field, bad in (("temperature", -1.0), ("temperature", np.nan), ("top_k", -1), ("top_p", 0.0)):
        with pytest.raises(ValueError, match=f"{field}={bad}"):
            Sampling(**{field: bad})
