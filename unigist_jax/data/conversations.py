"""Conversations as token ids, the loss on what the assistant says and on the mark that ends its turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from unigist_jax.data.tokenize import Tokenizer

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def conversation_of(row: Mapping[str, Any]) -> list[dict[str, str]] | None:
    """The messages of a data set's row, None if it has none.

    Known are `messages` (role, content), `conversations` (from, value: ShareGPT, Magpie), and `instruction` with
    `output` and perhaps `input` (Alpaca).

    Raises:
      ValueError: for an unknown role.
    """
    turns = row.get("messages") or row.get("conversations")
    if turns:
        pairs = [(turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))) for turn in turns]
        unknown = sorted({str(role) for role, _ in pairs} - set(ROLES))
        if unknown:
            raise ValueError(f"a conversation has the roles {unknown}; known are {sorted(ROLES)}")
        return [{"role": ROLES[role], "content": content or ""} for role, content in pairs]
    if row.get("instruction") and row.get("output"):
        question = "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
        return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
    return None


def encode_conversation(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]
) -> tuple[Int32[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """The ids of a conversation up to the end of the assistant's last turn, and which of them are to be learned.

    What the template writes before each turn of the assistant ends where the text of the turns so far, ready for an
    answer, ends; the turn's content and one mark follow. So any chat template serves that writes turns one after the
    other.

    Raises:
      ValueError: if there is no turn of the assistant, the tokenizer has no chat template, or the template writes
        earlier turns otherwise once there are later ones.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index]
    if not turns:
        raise ValueError("a conversation without an answer of the assistant; leave it out")
    closed = [*messages[: turns[-1] + 1], {"role": "user", "content": "."}]  # so that the last turn's end is written
    ids = tokenizer.encode_chat(closed)
    learned = np.zeros(len(ids), bool)
    end = 0
    for turn in turns:
        before = tokenizer.encode_chat(messages[:turn])
        begin = len(before)
        content = messages[turn]["content"]
        if not np.array_equal(ids[:begin], before):
            raise ValueError("the chat template writes earlier turns otherwise once there are later ones")
        for text in (content, content.strip()):
            end = begin + len(tokenizer.encode(text))
            if np.array_equal(ids[begin:end], tokenizer.encode(text)):
                break
        else:
            raise ValueError("the chat template does not write an answer right after what comes before it")
        learned[begin : end + 1] = True
    return ids[: end + 1], learned[: end + 1]
