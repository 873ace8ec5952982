"""The training-free baselines: what they keep, against kvpress; what they answer, against dense attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import CONFIG, LAYOUT, tiny_model, transformers_llama

from unigist_jax.baselines.compressed import PAGE
from unigist_jax.baselines.pyramidkv import pyramid_budgets
from unigist_jax.inference.methods import METHODS
from unigist_jax.layout import GistLayout
from unigist_jax.model.hf import load_hf
from unigist_jax.model.layers import rotary

TRAINING_FREE = ("streaming_llm", "streaming_llm_renumbered", "snapkv", "pyramidkv", "adakv")
TOKEN_BYTES = 2 * CONFIG.head_dim * 4  # key and value of one KV head
LAYERS, HEADS = CONFIG.num_layers, CONFIG.num_kv_heads


def read(name, model, prompts, ratio=4, capacity=None):
    return METHODS[name].prefill(model, prompts, capacity=capacity, layout=GistLayout(ratio, LAYOUT.num_sinks, 0))


def random_prompt(length, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, length).tolist()


def held(layer, head, row=0):
    """Keys and values of one head, in the order in which they lie."""
    slots = slice(int(layer.first[row, head]), int(layer.first[row, head] + layer.count[row, head]))
    return np.asarray(layer.k[row, slots]), np.asarray(layer.v[row, slots])


# --- kvpress as the oracle of what is kept ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both_models(tmp_path_factory):
    """One random Llama: transformers' and ours."""
    hf = transformers_llama()
    hf.set_attn_implementation("sdpa")  # kvpress wants it for AdaKV
    folder = tmp_path_factory.mktemp("llama")
    hf.save_pretrained(folder)
    return hf, load_hf(folder, LAYOUT)


def kept_by_kvpress(kvpress, hf, press, tokens):
    """For each layer and head: indices of the keys that kvpress keeps, and these keys as it holds them."""
    torch = pytest.importorskip("torch")
    kept = []

    def hook(module, _, kwargs, output):
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        numbers = torch.arange(layer.keys.shape[2])[:, None].expand(layer.values.shape)  # in place of values: they tell
        keys, index_of = press.compress(module, kwargs["hidden_states"], layer.keys, numbers, None, kwargs)
        heads = []
        for head in range(HEADS):
            index = index_of[0, head, :, 0]
            mask = torch.ones(len(index), dtype=torch.bool)
            if isinstance(press, kvpress.AdaKVPress):  # it masks instead of dropping
                _, masked_heads, masked = module.masked_key_indices
                mask[masked[masked_heads == head]] = False
            order = torch.argsort(index[mask])
            heads.append((index[mask][order].numpy(), keys[0, head][mask][order].numpy()))
        module.masked_key_indices = None
        kept.append(heads)

    hooks = [layer.self_attn.register_forward_hook(hook, with_kwargs=True) for layer in hf.model.layers]
    for layer in hf.model.layers:
        layer.self_attn.rotary_emb = hf.model.rotary_emb
    with torch.no_grad():
        hf(torch.tensor([tokens]), use_cache=True)
    for handle in hooks:
        handle.remove()
    return kept


@pytest.mark.parametrize("name", TRAINING_FREE)
def test_kept_keys_are_those_of_kvpress(name, both_models):
    kvpress = pytest.importorskip("kvpress", reason="kvpress is not installed (make test does)")
    hf, model = both_models
    snapkv = kvpress.SnapKVPress(0.5)
    press = {
        "streaming_llm": lambda: kvpress.StreamingLLMPress(0.5),
        "streaming_llm_renumbered": lambda: kvpress.KeyRerotationPress(kvpress.StreamingLLMPress(0.5)),
        "snapkv": lambda: snapkv,
        "pyramidkv": lambda: kvpress.PyramidKVPress(0.5),
        "adakv": lambda: kvpress.AdaKVPress(snapkv),
    }[name]()
    tokens = random_prompt(600)
    expected = kept_by_kvpress(kvpress, hf, press, tokens)
    _, everything = METHODS["full"].prefill(model, [tokens])
    _, cache = read(name, model, [tokens], ratio=2)
    for layer, (_, all_values), heads in zip(cache.layers, everything.layers, expected, strict=True):
        for head, (index, keys) in enumerate(heads):
            keys_held, values_held = held(layer, head)
            np.testing.assert_allclose(keys_held, keys, atol=2e-4)
            np.testing.assert_allclose(values_held, np.asarray(all_values)[0, index, head], atol=2e-4)


# --- dense attention as the oracle of decoding ------------------------------------------------------------------------


def dense_continuation(model, cache, name, context, tokens):
    """Logits after each of `tokens`, each attending to the keys that `cache` keeps and to those before it: NumPy."""
    visible_k = [[held(layer, head)[0] for head in range(HEADS)] for layer in cache.layers]
    visible_v = [[held(layer, head)[1] for head in range(HEADS)] for layer in cache.layers]
    start = len(held(cache.layers[0], 0)[0]) if name == "streaming_llm_renumbered" else len(context)
    logits = []
    for step, token in enumerate(tokens):
        x, angles = model.embed(jnp.array([[token]])), rotary(model.config, jnp.array([start + step]))
        for index in range(LAYERS):

            def attend(q, k, v, index=index):
                out = []
                for head in range(CONFIG.num_heads):
                    kv = head // (CONFIG.num_heads // HEADS)
                    if head % (CONFIG.num_heads // HEADS) == 0:
                        visible_k[index][kv] = np.concatenate([visible_k[index][kv], k[0, :, kv]])
                        visible_v[index][kv] = np.concatenate([visible_v[index][kv], v[0, :, kv]])
                    scores = visible_k[index][kv] @ np.asarray(q[0, 0, head]) * CONFIG.head_dim**-0.5
                    weights = np.exp(scores - scores.max())
                    out.append(weights @ visible_v[index][kv] / weights.sum())
                return jnp.asarray(np.stack(out))[None, None], None

            x, _ = model.layer(index)(x, angles, attend)
        logits.append(np.asarray(model.logits(x))[0, 0])
    return np.stack(logits)


@functools.cache
def random_model():
    return tiny_model()


@pytest.mark.parametrize("name", ["snapkv", "adakv", "streaming_llm_renumbered"])
def test_decoding_sees_what_was_kept_and_what_came_later(name):
    """A ragged batch, one context shorter than every window, asked twice; each sequence as if it were alone."""
    model, contexts, tokens = random_model(), [random_prompt(n, n) for n in (110, 7)], random_prompt(3, 9)
    logits, cache = read(name, model, contexts, capacity=120)
    full_logits, _ = METHODS["full"].prefill(model, contexts)
    np.testing.assert_allclose(logits, full_logits, rtol=2e-4, atol=2e-4)
    assert cache.layers[0].k.shape[1] == 2 * PAGE * HEADS  # 110 raws at ratio 4 keep 27 keys
    assert cache.layers[0].count.sum(1).tolist() == [27 * HEADS, HEADS]
    step, got = jax.jit(METHODS[name].decode_logits), []
    cache = cache.select([1, 0, 1])
    for token in tokens:
        logits, cache = step(model, cache, jnp.full((3,), token, jnp.int32))
        got.append(np.asarray(logits))
    assert cache.length.tolist() == [10, 113, 10] and cache.capacity == 120
    for context, *rows in ((contexts[0], 1), (contexts[1], 0, 2)):
        _, alone = read(name, model, [context])
        expected = dense_continuation(model, alone, name, context, tokens)
        for row in rows:
            np.testing.assert_allclose(np.stack(got)[:, row], expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", TRAINING_FREE)
def test_bytes_are_the_budget(name):
    """640 raws at ratio 2 keep 320 keys a head on average, and that is what is allocated."""
    _, cache = read(name, random_model(), [random_prompt(640)], ratio=2, capacity=672)
    per_layer = [layer.k.shape[1] // HEADS for layer in cache.layers]
    assert per_layer == ([576, 320, 64] if name == "pyramidkv" else [320, 320, 320])
    assert sum(x.nbytes for layer in cache.layers for x in (layer.k, layer.v)) == 320 * LAYERS * HEADS * TOKEN_BYTES
    assert cache.nbytes == (320 + 32) * LAYERS * HEADS * TOKEN_BYTES
    for layer, budget in zip(cache.layers, per_layer, strict=True):
        counts = layer.count[0].tolist()
        assert sum(counts) == budget * HEADS
        if name == "adakv":  # heads differ, so the layer's slots would not do if each had as many as the largest
            assert len(set(counts)) > 1 and min(counts) >= 0.2 * budget


def test_pyramid_of_the_paper():
    budgets = pyramid_budgets(32_768, 4, 32)
    assert (budgets[0], budgets[-1]) == (15_974, 410) and abs(sum(budgets) / 32 - 8192) < 1
    budgets = pyramid_budgets(1000, 2, 8)  # 2 m - m / 20 = 975 keys do not lie before the window
    assert (budgets[0], budgets[-1]) == (936, 64) and sum(budgets) == 8 * 500
    assert pyramid_budgets(400, 4, 8) == [100] * 8  # the last layer could not hold the window
