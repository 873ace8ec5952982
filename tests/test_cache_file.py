"""Cache files: what is read back goes on as if it had never been away; what does not fit is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from unigist_jax.inference import for_inference, generate, prefill
from unigist_jax.inference.cache_file import load_cache, save_cache
from unigist_jax.layout import GistLayout
from unigist_jax.model import LlamaConfig, init_llama
from unigist_jax.model.fingerprint import fingerprint

CONFIG = LlamaConfig(61, 16, 24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, dtype="bfloat16")
LAYOUT = GistLayout(2, 3, 4)
TEXT = np.random.default_rng(0).integers(0, 61, 200).tolist()
DOCUMENTS = [TEXT[:150], TEXT[50:57]]


def new_model(seed=0):
    return jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, init_llama(CONFIG, LAYOUT, seed))


@pytest.fixture(scope="module")
def model():
    return new_model()


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "two.cache"
    save_cache(path, prefill(model, DOCUMENTS)[1], model, DOCUMENTS, "tokenizer")
    return path


@pytest.mark.parametrize("gist_dtype", [None, "float8_e4m3fn"])
def test_a_cache_read_back_goes_on_as_if_never_away(gist_dtype, model, tmp_path):
    """With more than one page of gists, and a page in progress."""
    _, cache = prefill(model, DOCUMENTS, capacity=500, gist_dtype=gist_dtype)
    save_cache(tmp_path / "c", cache, model, DOCUMENTS, "tokenizer")
    back, tokens, in_message = load_cache(tmp_path / "c", model, "tokenizer")
    assert tokens == DOCUMENTS and not in_message and back.gist_dtype == gist_dtype
    assert back.capacity == 256 and back.nbytes < cache.nbytes  # empty pages are left out
    assert (tmp_path / "c").stat().st_size < back.nbytes + 4000
    questions = [[5, 6, 7], [8]]
    want = generate(model, questions, max_new_tokens=120, cache=cache)
    assert generate(model, questions, max_new_tokens=120, cache=back).tokens == want.tokens
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_many_questions_on_one_document(model, tmp_path):
    save_cache(tmp_path / "c", prefill(model, [TEXT])[1], model, [TEXT], "tokenizer")
    questions = [[1, 2, 3, 4], [5], [6, 7]]
    answers = generate(model, questions, max_new_tokens=5, cache=load_cache(tmp_path / "c", model, "tokenizer").cache)
    for question, answer in zip(questions, answers.tokens, strict=True):
        assert answer == generate(model, [TEXT + question], max_new_tokens=5).tokens[0]


def test_a_file_of_something_else_is_refused(model, file):
    with pytest.raises(ValueError, match=r"two.cache is of another model: [0-9a-f]{16}, not [0-9a-f]{16}; use the one"):
        load_cache(file, new_model(1), "tokenizer")
    with pytest.raises(ValueError, match=r"of another tokenizer: tokenizer, not other; use the one it was made with"):
        load_cache(file, model, "other")
    with pytest.raises(ValueError, match=r"another layout: GistLayout\(ratio=2.*not GistLayout\(ratio=4"):
        load_cache(file, model, "tokenizer", GistLayout(4, 3, 4))
    with pytest.raises(FileNotFoundError, match=r"no cache file .*absent; make one with launch.compress"):
        load_cache(file.with_name("absent"), model, "tokenizer")
    with pytest.raises(ValueError, match=r"tokens of \[3, 7\] for a cache that has read \[150, 7\]"):
        save_cache(file.with_name("x"), load_cache(file, model, "tokenizer").cache, model, [[1] * 3, [1] * 7], "t")


def test_a_damaged_file_is_refused(model, file, tmp_path):
    """Cut anywhere, or with any byte changed: header, arrays, the last one."""
    content = file.read_bytes()
    rng = np.random.default_rng(0)
    for cut in (0, 7, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "cut").write_bytes(content[:cut])
        with pytest.raises(
            ValueError, match=r"cut is no cache file, or truncated .*: make it again with launch.compress"
        ):
            load_cache(tmp_path / "cut", model, "tokenizer")
    for at in (12, len(content) - 1, *rng.integers(8, len(content), 40).tolist()):
        damaged = bytearray(content)
        damaged[at] ^= 1
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"make it again with launch.compress"):
            load_cache(tmp_path / "damaged", model, "tokenizer")


def test_a_fingerprint_knows_every_weight_and_no_form(model):
    """Stacked or apart, in float32 or already in the compute dtype: the same; a changed bit of it: another."""
    found = fingerprint(model)
    assert fingerprint(for_inference(new_model())) == found
    assert fingerprint(new_model(1)) != found
    for name in ("sink_embedding", "head"):
        changed = jax.tree.map(lambda x: x, model)
        array = getattr(model, name)[...]
        setattr(changed, name, nnx.Param(array.at[1, 2].set(-array[1, 2])))
        assert fingerprint(changed) != found
    swapped = jax.tree.map(lambda x: x, model)
    swapped.layers = jax.tree.map(lambda x: x[jnp.array([1, 0])], model.layers)
    assert fingerprint(swapped) != found
    other = jax.tree.map(lambda x: x, model)
    other.config = dataclasses.replace(CONFIG, rope_theta=1e4)
    assert fingerprint(other) != found
