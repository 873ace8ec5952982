"""Tokenizers of others: Llama 3's and Llama 2's kinds from tokenizer.json, and foreign sentencepiece models.

The `tokenizers` library, transformers and sentencepiece themselves are the oracles.
"""

import argparse
import inspect
import io
import json
import shutil

import numpy as np
import pytest
import sentencepiece
import tokenizers
from chat_tokenizer import TEMPLATE, TURN, write_chat_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from unigist_jax.data.tokenize import StreamDecoder, Tokenizer

SOURCE = inspect.getsource(argparse)
TEXTS = ("def f():\n\treturn  1", " leading", "trailing ", "naïve 😀 ", "<|eot_id|></s>", "a ▁b", "\n\n  x", "")
MESSAGES = [
    {"role": "system", "content": " Be brief."},
    {"role": "user", "content": "What is naïve?\n"},
    {"role": "assistant", "content": "😀"},
    {"role": "user", "content": "Why <|eot_id|>?"},
]


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    """A directory with a byte-level tokenizer like Llama 3's, of 596 ids."""
    folder = tmp_path_factory.mktemp("llama3")
    write_chat_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def llama2(tmp_path_factory):
    """A directory with a tokenizer.json like the one that transformers converts Llama 2's sentencepiece model to."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    pieces = [*(chr(code) for code in range(0x21, 0x7F)), "▁", "▁d", "▁de", "▁def", "re", "tu", "rn", "▁▁"]
    vocab = {name: i for i, name in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces])}
    merges = [("▁", "d"), ("▁d", "e"), ("▁de", "f"), ("r", "e"), ("t", "u"), ("r", "n"), ("▁", "▁")]
    tokenizer.model = models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    tokenizer.add_special_tokens([tokenizers.AddedToken(mark, normalized=False) for mark in ("<unk>", "<s>", "</s>")])
    folder = tmp_path_factory.mktemp("llama2")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<unk>"}))
    return folder


@pytest.fixture(scope="module", params=["llama3", "llama2"])
def pair(request):
    """A tokenizer and the library's own of the same file."""
    folder = request.getfixturevalue(request.param)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True
    return Tokenizer.load(folder), theirs


def assert_agree(ours, theirs, text):
    ids = ours.encode(text)
    assert ids.tolist() == theirs.encode(text, add_special_tokens=False).ids
    assert ours.decode(ids) == theirs.decode(ids.tolist())
    if ours.adds_space:
        text = text.replace("▁", " ")  # which Llama 2's pieces cannot tell apart
    assert ours.decode(ids) == text
    stream = StreamDecoder(ours)
    said = "".join([stream.push(index) for index in ids] + [stream.flush()])
    assert said.removeprefix(" ") == text if ours.adds_space and text else said == text


@pytest.mark.parametrize("text", [*TEXTS, SOURCE[:3000]])
def test_encoding_and_decoding_equal_the_library(pair, text):
    assert_agree(*pair, text)


@given(text=st.text(alphabet=" \t\n\0\u00e9\U0001f600e\u0301<s>0x0A"))
def test_every_text_comes_back(pair, text):
    assert_agree(*pair, text)


def test_marks(llama3, llama2):
    tokenizer = Tokenizer.load(llama3 / "tokenizer.json")
    assert tokenizer.encode("ab", bos=True, eos=True).tolist() == [
        tokenizer.bos_id, *tokenizer.encode("ab").tolist(), tokenizer.eos_id,
    ]  # fmt: skip
    assert tokenizer.pad_id == tokenizer.eos_id
    assert [tokenizer.id_bytes(index) for index in tokenizer.stop_ids] == [b"", b""]
    assert len(tokenizer.stop_ids) == 2 and tokenizer.stop_ids[0] == tokenizer.eos_id
    other = Tokenizer.load(llama2)
    assert (other.pad_id, other.bos_id, other.eos_id, other.stop_ids) == (0, 1, 2, (2,))
    assert other.fingerprint != tokenizer.fingerprint
    with pytest.raises(ValueError, match=f"{other.vocab_size} is not in this tokenizer"):
        other.decode([other.vocab_size])


def test_chats_equal_transformers(llama3, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(llama3)
    expected = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=True)["input_ids"]
    ours = Tokenizer.load(llama3)
    assert ours.encode_chat(MESSAGES).tolist() == expected
    assert ours.encode(TURN).tolist() != [ours.stop_ids[1]]  # in plain text a mark is text
    for name in ("tokenizer.json", "generation_config.json"):
        shutil.copy(llama3 / name, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)  # as transformers 5 saves it; its marks are the usual ones
    assert Tokenizer.load(tmp_path).encode_chat(MESSAGES).tolist() == expected


def test_a_chat_in_two_parts_is_the_whole(llama3, tmp_path):
    """A document that begins the last message, and a question that ends it."""
    tokenizer = Tokenizer.load(llama3)
    *before, last = MESSAGES
    opening = [*before, {"role": "user", "content": " Read.\n\n"}]
    whole = [*before, {"role": "user", "content": " Read.\n\n" + last["content"]}]
    first, second = tokenizer.encode_cut_chat(opening, last["content"])
    assert [*first, *second] == tokenizer.encode_chat(whole).tolist()
    assert tokenizer.decode(second) == "Why ?\n" and tokenizer.decode(first).endswith("Read.\n\n")
    shutil.copy(llama3 / "tokenizer.json", tmp_path)
    for template, times in (("{{ messages[0].content * 2 }}", 2), ("{{ messages[0].role }}", 0)):
        (tmp_path / "chat_template.jinja").write_text(template)
        with pytest.raises(ValueError, match=f"writes the last message {times} times.*as one prompt"):
            Tokenizer.load(tmp_path).encode_cut_chat([last])


def test_chats_that_cannot_be_written(llama3, llama2, tmp_path):
    tokenizer = Tokenizer.load(llama3)
    with pytest.raises(ValueError, match="template cannot write this conversation: unknown role tool"):
        tokenizer.encode_chat([{"role": "tool", "content": ""}])
    with pytest.raises(ValueError, match="without messages"):
        tokenizer.encode_chat([])
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer.load(llama2).encode_chat(MESSAGES)
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer.load(llama2).encode_cut_chat(MESSAGES)
    shutil.copy(llama3 / "tokenizer.json", tmp_path)
    for template in ("{% if %}", "{{ ''.__class__.__mro__ }}", "{{ messages[9].content.x }}"):
        (tmp_path / "chat_template.jinja").write_text(template)
        with pytest.raises(ValueError, match="the chat template cannot write"):
            Tokenizer.load(tmp_path).encode_chat(MESSAGES)


def test_a_saved_tokenizer_is_the_same(pair, tmp_path):
    tokenizer, _ = pair
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (again.fingerprint, again.files) == (tokenizer.fingerprint, tokenizer.files)
    assert again.stop_ids == tokenizer.stop_ids


def test_damaged_and_foreign_files(llama3, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        Tokenizer.load(tmp_path)
    file = tmp_path / "tokenizer.json"
    whole = json.loads((llama3 / "tokenizer.json").read_text())
    for content, reason in (
        (b"{", "cannot read it"),
        (json.dumps(whole | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}).encode(), "WordPiece"),
        (json.dumps(whole | {"added_tokens": []}).encode(), "no bos_token"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"the tokenizer at {file} is damaged or of another kind .*{reason}"):
            Tokenizer.load(tmp_path)
    file.write_text(json.dumps(whole))
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json beside it is not an object"):
        Tokenizer.load(tmp_path)


def test_a_foreign_sentencepiece_model(tmp_path):
    """One with sentencepiece's defaults, as Llama 2's: a space in front, and no padding."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SOURCE.splitlines()), model_writer=model, vocab_size=500, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ours = Tokenizer.load(tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (1, 2, 2)
    for text in (*TEXTS, SOURCE):
        ids = ours.encode(text)
        assert ids.tolist() == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids.tolist())
    assert np.array_equal(ours.encode("a", bos=True), [1, *ours.encode("a")])
