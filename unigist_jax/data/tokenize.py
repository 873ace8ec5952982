"""Text to ids and back, behind one interface: tokenizers trained here, other sentencepiece models, and Hugging Face's.

Every id stands for a fixed string of bytes (none for a mark, such as the end of a text); decoding concatenates those.
The tokenizers that `train` makes are lossless besides: `decode(encode(text)) == text` for every text.
"""

from __future__ import annotations

import abc
import codecs
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

SENTENCEPIECE_FILE = "tokenizer.model"
HF_FILE = "tokenizer.json"
NO_TEMPLATE = (
    "this tokenizer has no chat template; take the tokenizer.json and tokenizer_config.json of an instruction-tuned "
    "checkpoint, or give plain text"
)


class Tokenizer(abc.ABC):
    """Text to ids and back. Make one with `Tokenizer.train` or `Tokenizer.load`.

    Attributes:
      fingerprint: the first 16 hex digits of the SHA-256 of the file that fixes the ids.
      vocab_size: number of ids.
      pad_id, bos_id, eos_id: ids of padding, beginning and end of a document; they decode to nothing.
      stop_ids: ids that end a generated text; `eos_id` is among them.
      adds_space: whether `encode` puts a space before a text, which `decode` takes away.
      files: name and content of every file that makes this tokenizer.
    """

    fingerprint: str
    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    stop_ids: tuple[int, ...]
    adds_space: bool
    files: Mapping[str, bytes]

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, path: str | Path) -> Tokenizer:
        """Trains a lossless byte-pair encoding, writes it to `path` (at once and whole), and returns it.

        The same texts give the same file. Texts are read once; of their lines an even sample is learned from.

        Args:
          texts: texts of any length.
          vocab_size: number of ids to end up with, 256 bytes and a few marks included.
          path: the model file to write; its folder is made where it does not exist.

        Raises:
          ValueError: if the texts hold nothing to learn from, or too little for that many pieces, or if `vocab_size` is
            too small for the bytes and the characters of the texts.
        """
        from unigist_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer, train_model

        model = train_model(texts, vocab_size)
        _write_whole(Path(path), model)
        return SentencePieceTokenizer(model)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """The tokenizer at `path`.

        Args:
          path: a sentencepiece model, a Hugging Face `tokenizer.json`, or a directory that holds one of them (a work
            directory, a Hugging Face checkpoint) under its usual name; of both, `tokenizer.json` is taken.

        Raises:
          FileNotFoundError: if there is none.
          ValueError: if it is damaged, or of a kind that is not supported; naming the file.
        """
        file = Path(path)
        if file.is_dir():
            found = [file / name for name in (HF_FILE, SENTENCEPIECE_FILE) if (file / name).is_file()]
            if not found:
                raise FileNotFoundError(
                    f"there is no tokenizer in {file}: neither {HF_FILE} nor {SENTENCEPIECE_FILE}; copy the one that "
                    "belongs to the model into it"
                )
            file = found[0]
        remedy = "train one with Tokenizer.train, or name the file of a trained one"
        if not file.is_file():
            raise FileNotFoundError(f"there is no tokenizer at {file}; {remedy}")
        try:
            if file.suffix == ".json":
                from unigist_jax.data.hf_tokenizer import HfTokenizer

                return HfTokenizer(file)
            from unigist_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer

            return SentencePieceTokenizer(file.read_bytes())
        except ValueError as error:
            raise ValueError(f"the tokenizer at {file} is damaged or of another kind ({error}); {remedy}") from error

    def save(self, directory: str | Path) -> None:
        """Writes the tokenizer's files into `directory`, made if absent; `load` reads them back from there."""
        for name, content in self.files.items():
            _write_whole(Path(directory) / name, content)

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> Int32[np.ndarray, " n"]:
        """The ids of `text`, with `bos_id` before and `eos_id` after it where asked for.

        Marks that are written out in the text ("</s>") are text like any other.

        Raises:
          ValueError: if the text holds a lone surrogate, which no UTF-8 text can.
        """
        if not text.isascii():
            text.encode("utf-8")
        ids = [self.bos_id] * bos + self._encode(text) + [self.eos_id] * eos
        return np.asarray(ids, dtype=np.int32)

    def encode_chat(self, messages: Sequence[Mapping[str, str]], **variables: Any) -> Int32[np.ndarray, " n"]:
        """The ids of a conversation, by the tokenizer's chat template, up to where the assistant's next turn begins.

        Args:
          messages: each with a `role` ("system", "user", "assistant") and its `content`.
          **variables: further variables of the template, `date_string` of Llama 3.1's for instance.

        Raises:
          ValueError: if the tokenizer has no chat template, or the template refuses the messages.
        """
        raise ValueError(NO_TEMPLATE)

    def encode_cut_chat(
        self, messages: Sequence[Mapping[str, str]], rest: str = "", **variables: Any
    ) -> tuple[Int32[np.ndarray, " n"], Int32[np.ndarray, " m"]]:
        """The ids of a conversation in two parts, for a document that is read once and questions that follow it.

        Args:
          messages, **variables: as for `encode_chat`; the first part ends with the last message's content.
          rest: what follows there in the same message: the second part begins with it.

        Raises:
          ValueError: as for `encode_chat`, or if the template leaves no one place to cut.
        """
        raise ValueError(NO_TEMPLATE)

    def decode(self, ids: Iterable[Any]) -> str:
        """The text of integer `ids` (a list or a 1-D array); bytes that are not UTF-8 become U+FFFD.

        Raises:
          ValueError: if an id is not in the vocabulary.
        """
        text = b"".join(map(self.id_bytes, ids)).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.adds_space else text

    def id_bytes(self, index: Any) -> bytes:
        """The bytes of one integer id, none for a mark. Raises ValueError if it is not in the vocabulary."""
        index = int(index)
        if not 0 <= index < self.vocab_size:
            raise ValueError(f"the id {index} is not in this tokenizer's vocabulary of {self.vocab_size}")
        return self._piece_bytes(index)

    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]:
        """The ids of valid text, without marks."""

    @abc.abstractmethod
    def _piece_bytes(self, index: int) -> bytes:
        """The bytes of an id that is in the vocabulary."""


class StreamDecoder:
    """Decodes ids one at a time and gives out whole characters only, so that text can be printed as it arrives.

    The ids continue a text: unlike `Tokenizer.decode`, a space in front is kept.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, index: Any) -> str:
        """The text that is complete with this integer id, `""` in the middle of a character."""
        return self._decoder.decode(self._tokenizer.id_bytes(index))

    def flush(self) -> str:
        """What is left of an unfinished character, as U+FFFD; afterwards the decoder is as new."""
        return self._decoder.decode(b"", final=True)


def _write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that no reader ever sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
