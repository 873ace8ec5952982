"""Which layout and which one-pass form a method is evaluated with."""

from __future__ import annotations

from unigist_jax.inference.methods import ROUNDED, TRAINING_FREE
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
      ValueError: for a method with chunks on a model without them or the other way round, or a ratio that the model's
        summary tokens do not allow.
    """
    own = model.layout
    if method in ("activation_beacon", "autocompressors") and not own.chunk:
        raise ValueError(f"{method} needs a model trained with chunks: launch.train --config.method={method}")
    if method in ("unigist", *ROUNDED) and own.chunk:
        raise ValueError(f"{method} needs a model trained with a sliding window; this one has chunks (gist.chunk)")
    ratio = ratio or own.ratio
    if method == "autocompressors" and ratio != own.ratio:
        raise ValueError(f"autocompressors has as many summary tokens as it was trained with: ratio {own.ratio}")
    if method == "activation_beacon":
        chunk = -(-own.chunk // ratio) * ratio
        return GistLayout(ratio, own.num_sinks, chunk - ratio, chunk)
    if method in TRAINING_FREE:
        return GistLayout(ratio, own.num_sinks, 0)
    if own.chunk:
        return own
    return GistLayout(ratio, own.num_sinks, -(-own.window // ratio) * ratio)


def one_pass_attention(method: str) -> str:
    """The `attention` of `Llama.hidden_states` that is the method in one pass. Raises ValueError if it has no such."""
    if method not in _ONE_PASS:
        raise ValueError(
            f"{method} compresses a context once it is read, so it has no perplexity by token; evaluate it with "
            f"--suite=recall (perplexity and boundary take {', '.join(_ONE_PASS)})"
        )
    return _ONE_PASS[method]
