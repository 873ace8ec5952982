"""The tokenizer: lossless on every text, the same file for the same texts, whole characters while streaming."""

import argparse
import hashlib
import inspect
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unigist_jax.data import sentencepiece_tokenizer
from unigist_jax.data.tokenize import StreamDecoder, Tokenizer

SOURCE = inspect.getsource(argparse)
AWKWARD = " \t\n\r\0\u2581\u2585\ufffd\ufeff\u2028\u00e9\U0001f600e\u0301<s>0x0A"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "new" / "tokenizer.model"
    Tokenizer.train([SOURCE], 700, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(path):
    return Tokenizer.load(path)


@given(text=st.one_of(st.text(), st.text(alphabet=AWKWARD), st.text(alphabet=" \n\t")))
def test_every_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    stream = StreamDecoder(tokenizer)
    assert "".join([stream.push(index) for index in ids] + [stream.flush()]) == text


def test_every_character_and_whole_files_come_back(tokenizer):
    characters = "".join(chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000)
    assert tokenizer.decode(tokenizer.encode(characters)) == characters
    for text in (SOURCE, inspect.getsource(json.decoder), SOURCE.replace("    ", "\t").replace("\n", "\r\n")):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_code_is_short(tokenizer):
    assert len(tokenizer.encode(SOURCE)) < len(SOURCE) / 2
    assert len(tokenizer.encode(" " * 16)) == len(tokenizer.encode("\n")) == len(tokenizer.encode("\t")) == 1


def test_ids_and_marks(tokenizer):
    assert tokenizer.vocab_size == 700
    assert len({tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id}) == 3
    plain = tokenizer.encode("def f(): <s></s><pad>")
    marked = tokenizer.encode("def f(): <s></s><pad>", bos=True, eos=True)
    assert plain.dtype == marked.dtype == np.int32
    assert marked.tolist() == [tokenizer.bos_id, *plain.tolist(), tokenizer.eos_id]
    assert not {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id} & set(plain.tolist())
    assert tokenizer.decode(marked) == "def f(): <s></s><pad>"
    assert tokenizer.encode("").tolist() == []
    assert tokenizer.encode("", eos=True).tolist() == [tokenizer.eos_id]


def test_the_same_texts_give_the_same_file(path, tokenizer, tmp_path):
    again = Tokenizer.train((text for text in [SOURCE]), 700, tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == path.read_bytes()
    assert again.fingerprint == tokenizer.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    assert Tokenizer.train([SOURCE], 701, tmp_path / "other.model").fingerprint != tokenizer.fingerprint
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again.model", "other.model"]


def test_a_sample_of_long_training_data_covers_all_of_it(monkeypatch, tmp_path):
    monkeypatch.setattr(sentencepiece_tokenizer, "MAX_LINES", 300)
    texts = ["first words\n" * 10] * 300 + ["later zyzzyva\n" * 10] * 300
    tokenizer = Tokenizer.train(texts, 300, tmp_path / "tokenizer.model")
    assert len(tokenizer.encode("zyzzyva")) < 5


def test_streaming_gives_whole_characters_only(tokenizer):
    stream = StreamDecoder(tokenizer)
    ids = tokenizer.encode("\U0001f600")
    assert len(ids) == 4
    assert [stream.push(index) for index in ids] == ["", "", "", "\U0001f600"]
    assert stream.push(tokenizer.eos_id) == ""
    assert [stream.push(index) for index in ids[:2]] == ["", ""]
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""
    assert stream.push(int(tokenizer.encode("x")[0])) == "x"
    assert tokenizer.decode(ids[1:]) == "\ufffd" * 3


def test_unusable_input_is_refused(tokenizer, tmp_path):
    for index in (-1, 700):
        with pytest.raises(ValueError, match=f"the id {index} is not in this tokenizer's vocabulary of 700"):
            tokenizer.decode([index])
    with pytest.raises(ValueError, match="surrogates"):
        tokenizer.encode("\ud800")
    for vocab_size in (50, 100_000):
        with pytest.raises(ValueError, match=f"vocab_size={vocab_size}.*Choose another"):
            Tokenizer.train([SOURCE], vocab_size, tmp_path / "no.model")
    with pytest.raises(ValueError, match="no characters"):
        Tokenizer.train([" \n\n", ""], 700, tmp_path / "no.model")
    assert not list(tmp_path.iterdir())


def test_a_missing_or_damaged_file_is_named(path, tmp_path):
    file = tmp_path / "tokenizer.model"
    with pytest.raises(FileNotFoundError, match=f"no tokenizer at {file}; train one"):
        Tokenizer.load(file)
    for content in (b"", b"damaged", path.read_bytes()[:5000]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"the tokenizer at {file} is damaged"):
            Tokenizer.load(file)
