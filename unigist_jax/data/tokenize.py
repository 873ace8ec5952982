"""A lossless sentencepiece tokenizer for text and source code: `decode(encode(text)) == text` for every text.

Lossless by construction: nothing is normalised, stripped or added; tabs, line ends and runs of spaces are pieces of
their own; a character without a piece falls back to its UTF-8 bytes. Every id thus stands for a fixed string of bytes,
and decoding concatenates those. The one character that sentencepiece itself cannot tell from a space, U+2581 (its mark
for a space), is always written as its three bytes.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import os
import random
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from jaxtyping import Int32

SPACE_MARK = "\u2581"
WHITESPACE_PIECES = ("\n", "\n\n", "\t", *(SPACE_MARK * count for count in (2, 4, 8, 16)))
MAX_LINE = 1000  # characters of a training line; longer ones are cut
MAX_LINES = 100_000  # training lines that are kept, drawn evenly from all


class Tokenizer:
    """Text to ids and back. Make one with `Tokenizer.train` or `Tokenizer.load`.

    Attributes:
      fingerprint: the first 16 hex digits of the model file's SHA-256.
      vocab_size: number of ids.
      pad_id, bos_id, eos_id: ids of padding, beginning and end of a document; they decode to nothing.
    """

    def __init__(self, model: bytes):
        """From the contents of a model file. Raises ValueError if it is not a model that `train` wrote."""
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            size = self._processor.vocab_size()
        except RuntimeError as error:
            raise ValueError("not a sentencepiece model") from error
        self.fingerprint: str = hashlib.sha256(model).hexdigest()[:16]
        self.vocab_size: int = size
        self.pad_id: int = self._processor.pad_id()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self._bytes = [self._piece_bytes(index) for index in range(size)]
        self._space_mark_ids = [self._processor.piece_to_id(f"<0x{b:02X}>") for b in SPACE_MARK.encode()]
        marks_exist = min(self.pad_id, self.bos_id, self.eos_id) >= 0
        if not marks_exist or not all(map(self._processor.is_byte, self._space_mark_ids)):
            raise ValueError("a sentencepiece model without padding, document ends or byte pieces")

    def _piece_bytes(self, index: int) -> bytes:
        if self._processor.is_control(index) or self._processor.is_unknown(index):
            return b""
        piece = self._processor.id_to_piece(index)
        if self._processor.is_byte(index):
            return bytes([int(piece[1:-1], 16)])
        return piece.replace(SPACE_MARK, " ").encode()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, path: str | Path) -> Tokenizer:
        """Trains a byte-pair encoding, writes it to `path` (at once and whole), and returns it.

        The same texts give the same file. Texts are read once; of their lines an even sample is learned from.

        Args:
          texts: texts of any length.
          vocab_size: number of ids to end up with, 256 bytes and a few marks included.
          path: the model file to write; its folder is made where it does not exist.

        Raises:
          ValueError: if the texts hold nothing to learn from, or too little for that many pieces, or if `vocab_size` is
            too small for the bytes and the characters of the texts.
        """
        lines = _sample_lines(texts)
        if not lines:
            raise ValueError("the texts to train a tokenizer on hold no characters other than white space")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                character_coverage=0.999,
                byte_fallback=True,
                split_digits=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                user_defined_symbols=list(WHITESPACE_PIECES),
                pad_id=0,
                bos_id=1,
                eos_id=2,
                unk_id=3,
                num_threads=1,
                max_sentence_length=4 * MAX_LINE,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ValueError(
                f"no tokenizer of vocab_size={vocab_size} can be trained on these texts: {str(error).rstrip('.')}. "
                "Choose another vocab_size (1,000 to 32,000 is usual) or more text"
            ) from error
        _write_whole(Path(path), model.getvalue())
        return cls(model.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """The tokenizer in a file that `train` wrote. Raises FileNotFoundError or ValueError, naming the file."""
        remedy = "train one with Tokenizer.train, or name the file of a trained one"
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no tokenizer at {path}; {remedy}")
        try:
            return cls(Path(path).read_bytes())
        except ValueError as error:
            raise ValueError(f"the tokenizer at {path} is damaged or of another kind ({error}); {remedy}") from error

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> Int32[np.ndarray, " n"]:
        """The ids of `text`, with `bos_id` before and `eos_id` after it where asked for.

        Raises:
          ValueError: if the text holds a lone surrogate, which no UTF-8 text can.
        """
        if not text.isascii():
            text.encode("utf-8")
        ids = [self.bos_id] if bos else []
        for index, part in enumerate(text.split(SPACE_MARK)):
            if index:
                ids += self._space_mark_ids
            ids += self._processor.encode(part)
        if eos:
            ids.append(self.eos_id)
        return np.asarray(ids, dtype=np.int32)

    def decode(self, ids: Iterable[Any]) -> str:
        """The text of integer `ids` (a list or a 1-D array); bytes that are not UTF-8 become U+FFFD.

        Raises:
          ValueError: if an id is not in the vocabulary.
        """
        return b"".join(map(self.id_bytes, ids)).decode("utf-8", errors="replace")

    def id_bytes(self, index: Any) -> bytes:
        """The bytes of one integer id, none for a mark. Raises ValueError if it is not in the vocabulary."""
        index = int(index)
        if not 0 <= index < self.vocab_size:
            raise ValueError(f"the id {index} is not in this tokenizer's vocabulary of {self.vocab_size}")
        return self._bytes[index]


class StreamDecoder:
    """Decodes ids one at a time and gives out whole characters only, so that text can be printed as it arrives."""

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


def _sample_lines(texts: Iterable[str]) -> list[str]:
    """At most `MAX_LINES` lines, each equally likely, by reservoir sampling with a fixed seed."""
    rng = random.Random(0)
    kept: list[str] = []
    for index, line in enumerate(_lines(texts)):
        if index < MAX_LINES:
            kept.append(line)
        elif (slot := int(rng.random() * (index + 1))) < MAX_LINES:
            kept[slot] = line
    return kept


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            for begin in range(0, len(line), MAX_LINE):
                part = line[begin : begin + MAX_LINE]
                if part.strip():
                    yield part
