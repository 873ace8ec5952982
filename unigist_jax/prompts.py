"""Checking and padding prompts, for every method that reads them.

Axis legend
  B  prompts of a batch
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int, capacity: int | None) -> Int32[np.ndarray, " B"]:
    """Lengths of the prompts.

    Raises:
      ValueError: for no prompts, one that is empty or no list of integers, a token outside the vocabulary, or a prompt
        longer than `capacity` raws.
    """
    if not len(prompts):
        raise ValueError("no prompts given")
    for index, prompt in enumerate(prompts):
        tokens = np.asarray(prompt)
        if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
            raise ValueError(f"prompt {index} is {str(prompt)[:40]!r}, expected a list of token ids, integers")
        if not tokens.size:
            raise ValueError(f"prompt {index} is empty; give it at least one token (a beginning-of-text token, say)")
        low, high = tokens.min(), tokens.max()
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"prompt {index} holds token {low if low < 0 else high}, outside the vocabulary 0 … {vocab_size - 1}; "
                "is it of another tokenizer?"
            )
        if capacity is not None and len(prompt) > capacity:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens and does not fit a cache for {capacity}; "
                "raise the capacity or shorten the prompt"
            )
    return np.array([len(prompt) for prompt in prompts], np.int32)


def pad_prompts(prompts: Sequence[Sequence[int]], length: int) -> Int32[np.ndarray, "B length"]:
    """The prompts as one array, zeros behind each."""
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens
