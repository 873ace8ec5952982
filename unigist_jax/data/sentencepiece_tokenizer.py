"""Sentencepiece models as tokenizers: those trained here, which lose nothing of any text, and others (Llama 2's).

Lossless by construction: nothing is normalised, stripped or added; tabs, line ends and runs of spaces are pieces of
their own; a character without a piece falls back to its UTF-8 bytes. The one character that sentencepiece itself cannot
tell from a space, U+2581 (its mark for a space), is always written as its three bytes.

A model of others is taken as sentencepiece runs it, with whatever it normalises and with the space that most put before
a text.
"""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Iterable, Iterator

import sentencepiece

from unigist_jax.data.tokenize import SENTENCEPIECE_FILE, Tokenizer

SPACE_MARK = "\u2581"
WHITESPACE_PIECES = ("\n", "\n\n", "\t", *(SPACE_MARK * count for count in (2, 4, 8, 16)))
MAX_LINE = 1000  # characters of a training line; longer ones are cut
MAX_LINES = 100_000  # training lines that are kept, drawn evenly from all


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model with byte pieces. A model without padding pads with `eos_id`."""

    def __init__(self, model: bytes):
        """From the contents of a model file. Raises ValueError if it is none, or has no document ends or bytes."""
        if not model:
            raise ValueError("an empty file")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocab_size = self._processor.vocab_size()
        except RuntimeError as error:
            raise ValueError("not a sentencepiece model") from error
        self.fingerprint = hashlib.sha256(model).hexdigest()[:16]
        self.files = {SENTENCEPIECE_FILE: model}
        self.bos_id, self.eos_id = self._processor.bos_id(), self._processor.eos_id()
        self.pad_id = self._processor.pad_id() if self._processor.pad_id() >= 0 else self.eos_id
        self.stop_ids = (self.eos_id,)
        self._space_mark_ids = [self._processor.piece_to_id(f"<0x{b:02X}>") for b in SPACE_MARK.encode()]
        if min(self.bos_id, self.eos_id) < 0 or not all(map(self._processor.is_byte, self._space_mark_ids)):
            raise ValueError("a sentencepiece model without document ends or byte pieces")
        self.adds_space = self._processor.encode("a", out_type=str)[0].startswith(SPACE_MARK)
        self._bytes = [self._bytes_of(index) for index in range(self.vocab_size)]

    def _bytes_of(self, index: int) -> bytes:
        if self._processor.is_control(index) or self._processor.is_unknown(index):
            return b""
        return piece_bytes(self._processor.id_to_piece(index), self._processor.is_byte(index))

    def _piece_bytes(self, index: int) -> bytes:
        return self._bytes[index]

    def _encode(self, text: str) -> list[int]:
        if self.adds_space:
            return self._processor.encode(text)
        ids = []
        for index, part in enumerate(text.split(SPACE_MARK)):
            if index:
                ids += self._space_mark_ids
            ids += self._processor.encode(part)
        return ids


def piece_bytes(piece: str, is_byte: bool) -> bytes:
    """The bytes that a piece of a sentencepiece vocabulary stands for; a byte piece is written `<0x0A>`."""
    return bytes([int(piece[1:-1], 16)]) if is_byte else piece.replace(SPACE_MARK, " ").encode()


def train_model(texts: Iterable[str], vocab_size: int) -> bytes:
    """The contents of a model file, trained as `Tokenizer.train` says. Raises ValueError likewise."""
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
    return model.getvalue()


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
