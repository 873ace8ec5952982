"""Which layout and which one-pass form a method is evaluated with."""

from __future__ import annotations

from unigist_jax.inference.methods import TRAINING_FREE, get_method
from unigist_jax.layout import GistLayout
from unigist_jax.model import Llama

_ONE_PASS = {
    "unigist": "gist",
    "unigist_int8": "gist",
    "unigist_fp8": "gist",
    "activation_beacon": "gist",
    "full": "full",
    "autocompressors": "autocompressors",
}


def evaluation_layout(model: Llama, method: str, ratio: int | None) -> GistLayout:
    """The model's layout, with another ratio if asked for.

    Raises:
      ValueError: for a method that needs another training than the model's (`get_method`), or a ratio that the model's
        summary tokens do not allow.
    """
    get_method(method, model)
    own = model.layout
    ratio = ratio or own.ratio
    if method == "autocompressors" and ratio != own.ratio:
        raise ValueError(f"autocompressors has as many summary tokens as it was trained with: ratio {own.ratio}")
    if method in TRAINING_FREE:
        return GistLayout(ratio, own.num_sinks, 0)
    return own.with_ratio(ratio)


def check_borders(method: str, layout: GistLayout, chunk_size: int) -> None:
    """Raises ValueError unless multiples of `chunk_size` are borders of the method's own chunks, if it has such."""
    if layout.chunk and method != "full" and chunk_size % layout.chunk:
        raise ValueError(
            f"chunk size {chunk_size}: {method} has chunks of {layout.chunk} and is measured at their borders; "
            f"use {layout.chunk} or a multiple"
        )


def one_pass_attention(method: str) -> str:
    """The `attention` of `Llama.hidden_states` that is the method in one pass. Raises ValueError if it has no such."""
    if method not in _ONE_PASS:
        raise ValueError(
            f"{method} compresses a context once it is read, so it has no perplexity by token; evaluate it with "
            f"--suite=recall (perplexity and boundary take {', '.join(_ONE_PASS)})"
        )
    return _ONE_PASS[method]
