"""What gist and sink embeddings begin as, in random models and in plain checkpoints of Hugging Face."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from unigist_jax.layout import GistLayout
from unigist_jax.model import LlamaConfig, init_llama
from unigist_jax.model.hf import load_hf, save_hf
from unigist_jax.sharding import make_mesh

CONFIG = LlamaConfig(96, 16, 24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, dtype="float32")
LAYOUT = GistLayout(ratio=4, num_sinks=20, window=8)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A checkpoint without gists, whose vocabulary has a mean well away from 0."""
    directory = tmp_path_factory.mktemp("plain")
    model = init_llama(CONFIG, LAYOUT, 0)
    shift = np.arange(CONFIG.hidden_size, dtype=np.float32)
    save_hf(jax.tree.map(lambda leaf: leaf + shift if leaf.shape == (96, 16) else leaf, model), directory)
    hf = json.loads((directory / "config.json").read_text())
    del hf["unigist"]
    (directory / "config.json").write_text(json.dumps(hf))
    tensors = load_file(directory / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("unigist.")}
    save_file(kept, directory / "model.safetensors")
    return directory


def random_model(_, **choices):
    return init_llama(dataclasses.replace(CONFIG, **choices), LAYOUT, 0)


def loaded_model(directory, **choices):
    return load_hf(directory, LAYOUT, **choices)


@pytest.fixture(params=[random_model, loaded_model])
def made(request, plain):
    """Vocabulary, gist and sinks of a model with some choices of initialisation."""

    def make(**choices):
        model = request.param(plain, **choices)
        return [np.array(x[...]) for x in (model.embedding, model.gist_embedding, model.sink_embedding)]

    return make


def test_normal_is_around_zero(made):
    _, gist, sinks = made(gist_init_scale=0.5)
    assert abs(np.std(np.concatenate([sinks, gist[None]])) - 0.5) < 0.05
    assert np.abs(sinks.mean()) < 0.1


def test_mean_is_around_the_vocabularys(made):
    vocabulary, gist, sinks = made(gist_init="mean", gist_init_scale=0.0)
    mean = vocabulary.astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(gist, mean, rtol=0, atol=1e-6)
    np.testing.assert_allclose(sinks, np.broadcast_to(mean, (20, 16)), rtol=0, atol=1e-6)
    _, _, spread = made(gist_init="mean", gist_init_scale=0.5)
    assert abs(np.std(spread - mean) - 0.5) < 0.05


def test_tokens_are_different_rows_of_the_vocabulary(made):
    vocabulary, gist, sinks = made(gist_init="tokens")
    rows = [np.flatnonzero((vocabulary == row).all(axis=1)) for row in (gist, *sinks)]
    assert all(len(row) == 1 for row in rows)
    assert len({int(row[0]) for row in rows[1:]}) == 20


@pytest.mark.parametrize("gist_init", ["mean", "tokens"])
def test_loading_on_a_mesh_makes_the_same(gist_init, plain):
    mesh = make_mesh(1, 2, 1, devices=jax.devices()[:2])
    one, sharded = load_hf(plain, LAYOUT, gist_init=gist_init), load_hf(plain, LAYOUT, gist_init=gist_init, mesh=mesh)
    for name in ("gist_embedding", "sink_embedding"):
        np.testing.assert_array_equal(getattr(one, name)[...], getattr(sharded, name)[...])


def test_a_layout_without_sinks_has_none(plain):
    for gist_init in ("normal", "mean", "tokens"):
        config = dataclasses.replace(CONFIG, gist_init=gist_init)
        assert init_llama(config, GistLayout(4, 0, 8), 0).sink_embedding.shape == (0, 16)
        assert load_hf(plain, GistLayout(4, 0, 8), gist_init=gist_init).sink_embedding.shape == (0, 16)
