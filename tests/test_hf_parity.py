"""transformers as the oracle of the model: logits and gradients, plain and with the UniGist mask handed to it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brute_force import interleaved_mask, interleaved_positions, interleaved_tokens
from hf_models import CONFIG, LAYOUT, transformers_llama

from unigist_jax.layout import document_starts
from unigist_jax.model.hf import load_hf, save_hf


def assert_close(got, expected, relative=1e-5):
    """Equal to `relative` of the largest expected magnitude."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(np.asarray(got), expected, rtol=0, atol=relative * np.abs(expected).max())


def random_tokens(shape):
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, shape)


@functools.partial(jax.jit, static_argnames="attention")
def logits_and_grads(model, tokens, doc_start, weights, attention):
    """Logits, and gradients of their weighted mean."""

    def loss(model):
        logits = model(tokens, doc_start, attention=attention)
        return (logits * weights).mean(), logits

    (_, logits), grads = jax.value_and_grad(loss, has_aux=True)(model)
    return logits, grads


@pytest.mark.parametrize(("tied", "scaled"), [(False, True), (True, True), (False, False)])
def test_full_attention_equals_transformers(tmp_path, tied, scaled):
    """Logits and gradients, from a directory that transformers wrote."""
    hf = transformers_llama(tied, scaled)
    torch = pytest.importorskip("torch")
    hf.save_pretrained(tmp_path)
    model = load_hf(tmp_path, LAYOUT)
    tokens = random_tokens((2, 40))
    weights = np.random.default_rng(1).normal(size=(2, 40, CONFIG.vocab_size)).astype(np.float32)

    expected = hf(torch.from_numpy(tokens)).logits
    (expected * torch.from_numpy(weights)).mean().backward()
    logits, grads = logits_and_grads(model, tokens, None, weights, "full")
    assert_close(logits, expected.detach())
    query = grads.layers.attention.query[...][1].reshape(CONFIG.hidden_size, -1).T
    assert_close(query, hf.model.layers[1].self_attn.q_proj.weight.grad, 2e-5)
    assert_close(grads.embedding[...], hf.model.embed_tokens.weight.grad, 2e-5)


@pytest.mark.parametrize(("tied", "max_shard_bytes"), [(False, 20_000), (True, 5_000_000_000)])
def test_transformers_reads_what_we_write(tmp_path, tied, max_shard_bytes):
    source = transformers_llama(tied)
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    source.save_pretrained(tmp_path / "theirs")
    save_hf(load_hf(tmp_path / "theirs", LAYOUT), tmp_path / "ours", max_shard_bytes=max_shard_bytes)
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert ours.dtype == torch.float32
    for (name, a), (_, b) in zip(ours.named_parameters(), source.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    tokens = torch.from_numpy(random_tokens((2, 40)))
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, source(tokens).logits)


def transformers_gist_logits(hf, tokens, gist, sinks, layout, documents):
    """Logits [B, T, V] at the raws of transformers' Llama run over the augmented sequence in causal order.

    Args:
      tokens: [B, T].
      gist, sinks: embeddings [E] and [s, E], torch tensors.
      documents: document of each unit of each row, [B, U].
    """
    torch = pytest.importorskip("torch")
    rows, num_units = tokens.shape[0], tokens.shape[1] // layout.ratio
    order = interleaved_tokens(layout.ratio, layout.num_sinks, num_units)
    raws = hf.model.embed_tokens(torch.from_numpy(tokens))
    pick = {
        "sink": lambda i: sinks[i].expand(rows, -1),
        "raw": lambda i: raws[:, i],
        "gist": lambda i: gist.expand(rows, -1),
    }
    embeds = torch.stack([pick[kind](index) for kind, index, _ in order], dim=1)
    sizes = layout.ratio, layout.num_sinks
    masks = np.stack([interleaved_mask(*sizes, layout.window, num_units, document) for document in documents])
    positions = np.stack([interleaved_positions(*sizes, num_units, document) for document in documents])
    bias = torch.where(torch.from_numpy(masks), 0.0, torch.finfo(torch.float32).min)[:, None]
    out = hf(inputs_embeds=embeds, attention_mask=bias, position_ids=torch.from_numpy(positions), use_cache=False)
    return out.logits[:, [i for i, (kind, _, _) in enumerate(order) if kind == "raw"]]


@pytest.mark.parametrize("documents", [[[0] * 6] * 2, [[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]]])
def test_gists_equal_transformers_with_the_mask(tmp_path, documents):
    """The one-pass form against transformers' eager attention, given Eq. 3 as a dense mask in causal order."""
    hf = transformers_llama()
    torch = pytest.importorskip("torch")
    hf.save_pretrained(tmp_path)
    model = load_hf(tmp_path, LAYOUT, gist_init_scale=0.3)
    tokens = random_tokens((2, 24))
    weights = np.random.default_rng(1).normal(size=(2, 24, CONFIG.vocab_size)).astype(np.float32)
    doc_start = document_starts(jnp.asarray(documents))

    gist, sinks = (
        torch.tensor(np.array(x[...]), requires_grad=True) for x in (model.gist_embedding, model.sink_embedding)
    )
    expected = transformers_gist_logits(hf, tokens, gist, sinks, LAYOUT, documents)
    (expected * torch.from_numpy(weights)).mean().backward()
    logits, grads = logits_and_grads(model, tokens, doc_start, weights, "gist")
    assert_close(logits, expected.detach())
    query = grads.layers.attention.query[...][1].reshape(CONFIG.hidden_size, -1).T
    assert_close(grads.gist_embedding[...], gist.grad, 2e-5)
    assert_close(grads.sink_embedding[...], sinks.grad, 2e-5)
    assert_close(grads.embedding[...], hf.model.embed_tokens.weight.grad, 2e-5)
    assert_close(query, hf.model.layers[1].self_attn.q_proj.weight.grad, 2e-5)
