"""Every method of the comparison behind one interface: how a prompt is read, and how a token is decoded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from unigist_jax.baselines import (
    activation_beacon,
    adakv,
    autocompressors,
    compressed,
    full_attention,
    pyramidkv,
    snapkv,
    streaming_llm,
)
from unigist_jax.inference import decode, prefill
from unigist_jax.layout import GistLayout
from unigist_jax.model import Llama, LlamaConfig


class Method(NamedTuple):
    """The functions of a method, each `-> (logits, cache)`.

    Attributes:
      prefill: `(model, prompts, *, capacity, chunk_size, layout)`.
      decode_logits: `(model, cache, tokens)`.
      extend: `(model, cache, token_lists)` as `prefill.extend`; None: further tokens are decoded one by one.
    """

    prefill: Callable
    decode_logits: Callable
    extend: Callable | None = None


ROUNDED = {"unigist_int8": "int8", "unigist_fp8": "float8_e4m3fn"}  # what gists are stored in

METHODS = {
    "unigist": Method(prefill.prefill, decode.decode_logits, prefill.extend),
    **{
        name: Method(partial(prefill.prefill, gist_dtype=dtype), decode.decode_logits, prefill.extend)
        for name, dtype in ROUNDED.items()
    },
    "full": Method(full_attention.prefill, full_attention.decode_logits),
    "activation_beacon": Method(activation_beacon.prefill, decode.decode_logits, prefill.extend),
    "autocompressors": Method(autocompressors.prefill, compressed.decode_logits),
    # for models of full attention
    "streaming_llm": Method(streaming_llm.prefill_in_place, compressed.decode_logits),
    "streaming_llm_renumbered": Method(streaming_llm.prefill_renumbered, compressed.decode_logits),
    "snapkv": Method(snapkv.prefill, compressed.decode_logits),
    "pyramidkv": Method(pyramidkv.prefill, compressed.decode_logits),
    "adakv": Method(adakv.prefill, compressed.decode_logits),
}
TRAINING_FREE = ("streaming_llm", "streaming_llm_renumbered", "snapkv", "pyramidkv", "adakv")


def trained_method(config: LlamaConfig, layout: GistLayout) -> str:
    """The name of the method that a model of this config and layout was trained for."""
    if config.attention == "gist":
        return "activation_beacon" if layout.chunk else "unigist"
    return config.attention


def get_method(name: str | None, model: Llama) -> Method:
    """The method of that name; None: the one the model was trained for.

    Raises ValueError for an unknown name, and for a method with chunks on a model without them or the other way round.
    """
    if name is None:
        name = trained_method(model.config, model.layout)
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; choose one of {sorted(METHODS)}")
    if name in ("activation_beacon", "autocompressors") and not model.layout.chunk:
        raise ValueError(f"{name} needs a model trained with chunks: launch.train --config.method={name}")
    if name in ("unigist", *ROUNDED) and model.layout.chunk:
        raise ValueError(f"{name} needs a model trained with a sliding window; this one has chunks (gist.chunk)")
    return METHODS[name]
