"""Models from directories of either kind, and conversions between them."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from hf_models import LAYOUT, tiny_model

from unigist_jax.checkpoints import hf_layout, is_hf_directory, load_directory, save_as_run
from unigist_jax.config import DataConfig
from unigist_jax.data import Tokenizer
from unigist_jax.layout import GistLayout
from unigist_jax.model.hf import save_hf


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = ["".join(map(chr, range(32, 127)))] * 3
    return Tokenizer.train(texts, 370, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture
def model(tokenizer):
    return tiny_model(vocab_size=tokenizer.vocab_size)


def logits(model):
    return np.asarray(model(jax.numpy.arange(8)[None]))


def test_there_and_back_to_equal_logits(model, tokenizer, tmp_path):
    """Hugging Face directory, work directory, Hugging Face directory: the same logits, layout and tokenizer."""
    expected = logits(model)
    hf, run, again = tmp_path / "hf", tmp_path / "run", tmp_path / "again"
    tokenizer.save(hf)
    save_hf(model, hf)
    loaded = load_directory(hf)
    assert (loaded.step, loaded.data, loaded.origin) == (None, DataConfig(), "Hugging Face weights")
    tokenizer.save(run)
    save_as_run(run, loaded.model, dataclasses.replace(DataConfig(), row_length=30))
    loaded = load_directory(run)
    assert (loaded.step, loaded.data.row_length, loaded.origin) == (0, 28, "step 0")
    tokenizer.save(again)
    save_hf(loaded.model, again)
    assert (again / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()
    for directory in (hf, run, again):
        loaded = load_directory(directory)
        assert np.array_equal(logits(loaded.model), expected)
        assert loaded.model.layout == LAYOUT
        assert loaded.tokenizer.fingerprint == tokenizer.fingerprint
    assert [is_hf_directory(directory) for directory in (hf, run, tmp_path)] == [True, False, False]


def test_a_plain_llama_attends_fully_until_it_has_gists(model, tokenizer, tmp_path, caplog):
    tokenizer.save(tmp_path)
    save_hf(model, tmp_path, gists=False)
    assert hf_layout(tmp_path) is None
    with caplog.at_level("WARNING", logger="absl"):
        loaded = load_directory(tmp_path)
    assert "plain Llama checkpoint: its gists are untrained" in caplog.text
    assert (loaded.model.config.attention, loaded.model.layout) == ("full", GistLayout())
    loaded = load_directory(tmp_path, layout=LAYOUT, gist_init="mean")
    assert (loaded.model.config.attention, loaded.model.layout) == ("gist", LAYOUT)
    assert np.allclose(loaded.model.gist_embedding[...], model.embedding[...].mean(0), atol=0.1)


def test_bad_directories(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        load_directory(tmp_path)
    save_hf(model, tmp_path)
    with pytest.raises(FileNotFoundError, match=f"there is no tokenizer in {tmp_path}"):
        load_directory(tmp_path)
    tokenizer.save(tmp_path)
    save_hf(tiny_model(vocab_size=64), tmp_path)
    with pytest.raises(ValueError, match="the tokenizer has 370 ids, the model 64"):
        load_directory(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"config\.json has no"):
        load_directory(tmp_path)
