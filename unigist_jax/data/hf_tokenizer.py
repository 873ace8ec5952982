"""Hugging Face tokenizers of Llama checkpoints, read from `tokenizer.json` by the `tokenizers` library.

Two families are known, by the decoder that the file names: byte-level pieces (Llama 3), in which every byte is written
as one printable character, and sentencepiece's pieces (Llama 2), with a mark for spaces and `<0x0A>` for a byte.

Beside `tokenizer.json`, where they exist, are read: `tokenizer_config.json` (names of the marks, chat template),
`special_tokens_map.json` (likewise), `chat_template.jinja`, and `generation_config.json` (ids that end a text).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from unigist_jax.data.chat import render_chat, render_cut_chat
from unigist_jax.data.sentencepiece_tokenizer import piece_bytes
from unigist_jax.data.tokenize import HF_FILE, NO_TEMPLATE, Tokenizer

SETTINGS_FILE = "tokenizer_config.json"
MARKS_FILE = "special_tokens_map.json"
TEMPLATE_FILE = "chat_template.jinja"
GENERATION_FILE = "generation_config.json"
USUAL_MARKS = {"bos_token": ("<|begin_of_text|>", "<s>"), "eos_token": ("<|end_of_text|>", "</s>"), "pad_token": ()}


class HfTokenizer(Tokenizer):
    """A `tokenizer.json` and the files beside it. One that names no padding pads with `eos_id`."""

    def __init__(self, file: Path):
        """From the path of a `tokenizer.json`. Raises ValueError naming what is wrong with it or a file beside it."""
        names = SETTINGS_FILE, MARKS_FILE, TEMPLATE_FILE, GENERATION_FILE
        beside = {name: file.with_name(name) for name in names}
        contents = {name: path.read_bytes() for name, path in beside.items() if path.is_file()}
        self.files = {HF_FILE: file.read_bytes(), **contents}
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(self.files[HF_FILE])
        except Exception as error:  # of no narrower class
            raise ValueError(f"the tokenizers library cannot read it: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.fingerprint = hashlib.sha256(self.files[HF_FILE]).hexdigest()[:16]
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._added = self._tokenizer.get_added_tokens_decoder()

        decoders = _decoder_kinds(json.loads(self.files[HF_FILE]).get("decoder"))
        self._byte_level = "ByteLevel" in decoders
        if not self._byte_level and "ByteFallback" not in decoders:
            raise ValueError(
                f"its decoder is {sorted(decoders)}, neither byte-level (Llama 3) nor with byte fallback (Llama 2)"
            )
        self.adds_space = "Strip" in decoders

        self._settings = self._json(MARKS_FILE) | self._json(SETTINGS_FILE)
        self._marks = {name: self._mark(name) for name in USUAL_MARKS}
        self.bos_id, self.eos_id = (self._id_of(name) for name in ("bos_token", "eos_token"))
        self.pad_id = self.eos_id if self._marks["pad_token"] is None else self._id_of("pad_token")
        ends = self._json(GENERATION_FILE).get("eos_token_id")
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        self.stop_ids = tuple(dict.fromkeys([self.eos_id, *ends]))

    def encode_chat(self, messages: Sequence[Mapping[str, str]], **variables: Any) -> np.ndarray:
        return self._encode_marked(render_chat(self._chat_template(), messages, **(self._mark_names() | variables)))

    def encode_cut_chat(
        self, messages: Sequence[Mapping[str, str]], rest: str = "", **variables: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        template = self._chat_template()
        before, after = render_cut_chat(template, messages, rest, **(self._mark_names() | variables))
        return self._encode_marked(before), self._encode_marked(after)

    def _mark_names(self) -> dict[str, str]:
        return {name: mark for name, mark in self._marks.items() if mark is not None}

    def _encode_marked(self, text: str) -> np.ndarray:
        """The ids of a template's text, in which marks are written out."""
        self._tokenizer.encode_special_tokens = False
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def _encode(self, text: str) -> list[int]:
        self._tokenizer.encode_special_tokens = True
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _piece_bytes(self, index: int) -> bytes:
        added = self._added.get(index)
        if added is not None:
            return b"" if added.special else added.content.encode()
        piece = self._tokenizer.id_to_token(index)
        if piece is None:  # a gap in the ids
            return b""
        if self._byte_level:
            return bytes(_BYTE_OF[character] for character in piece)
        return piece_bytes(piece, len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"))

    def _json(self, name: str) -> dict[str, Any]:
        if name not in self.files:
            return {}
        try:
            contents = json.loads(self.files[name])
        except ValueError as error:
            raise ValueError(f"{name} beside it is not valid JSON: {error}") from error
        if not isinstance(contents, dict):
            raise ValueError(f"{name} beside it is not an object")
        return contents

    def _mark(self, name: str) -> str | None:
        """A mark's text: a string or an object with `content`; where no file names it, one of the usual ones."""
        mark = self._settings.get(name)
        mark = mark.get("content") if isinstance(mark, dict) else mark
        usual = (text for text in USUAL_MARKS[name] if self._tokenizer.token_to_id(text) is not None)
        return next(usual, None) if mark is None else mark

    def _id_of(self, name: str) -> int:
        index = self._marks[name] and self._tokenizer.token_to_id(self._marks[name])
        if index is None:
            raise ValueError(f"it has no {name} ({self._marks[name]!r}); copy {SETTINGS_FILE} from the checkpoint too")
        return index

    def _chat_template(self) -> str:
        if TEMPLATE_FILE in self.files:
            return self.files[TEMPLATE_FILE].decode()
        template = self._settings.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if template is None:
            raise ValueError(NO_TEMPLATE)
        return template


def _decoder_kinds(decoder: Mapping[str, Any] | None) -> set[str]:
    """Types of a decoder of tokenizer.json and of those that it is a sequence of."""
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*map(_decoder_kinds, decoder.get("decoders", ())))


def _byte_characters() -> dict[str, int]:
    """The byte of each character of byte-level pieces: printable Latin-1 stands for itself, the rest for U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_characters()
