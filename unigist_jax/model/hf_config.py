"""The config.json of Hugging Face Llamas: both dialects are read (transformers 4 and 5), the older one is written.

| | transformers 4 | transformers 5 |
|---|---|---|
| rotary base | `rope_theta` | `rope_parameters.rope_theta` |
| rotary scaling | `rope_scaling` (null, or with `rope_type`, once `type`) | `rope_parameters.rope_type` and the rest |
| dtype | `torch_dtype` | `dtype` |

A model of this project adds one entry, `unigist: {ratio, num_sinks, window}`, with `chunk` and `attention` where the
model has chunks or attends otherwise than through gists; other readers ignore it.
"""

from __future__ import annotations

from typing import Any

from unigist_jax.layout import GistLayout
from unigist_jax.model.config import LlamaConfig, RopeScaling

_REQUIRED = object()
_LAYOUT_FIELDS = ("ratio", "num_sinks", "window")
_SCALING_FIELDS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _entry(entries: dict[str, Any], name: str, default: Any = _REQUIRED, where: str = "config.json") -> Any:
    """`entries[name]`, with null read as absent. Raises ValueError if it is absent and has no default."""
    value = entries.get(name)
    if value is not None:
        return value
    if default is _REQUIRED:
        raise ValueError(f"{where} has no {name!r}; take the file that came with the weights")
    return default


def _reject_unsupported(hf: dict[str, Any]) -> None:
    """Raises ValueError for a model that is not a plain Llama 3 decoder, naming the entry, its value and the remedy."""
    for name, expected, remedy in (
        ("model_type", ("llama",), "only Llama checkpoints can be loaded"),
        ("architectures", (["LlamaForCausalLM"], None), "only LlamaForCausalLM checkpoints can be loaded"),
        ("hidden_act", ("silu", "swish", None), "only silu is implemented"),
        ("attention_bias", (False, None), "projections have no bias here; choose a checkpoint without"),
        ("mlp_bias", (False, None), "projections have no bias here; choose a checkpoint without"),
        ("partial_rotary_factor", (1, None), "whole heads are rotated here"),
        ("quantization_config", (None,), "load the checkpoint in float32, bfloat16 or float16 instead"),
    ):
        if hf.get(name) not in expected:
            raise ValueError(f"config.json: {name}={hf.get(name)!r} is not supported: {remedy}")


def _rotary_from_hf(hf: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling, from either dialect."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    theta = float(_entry(rope, "rope_theta", _entry(hf, "rope_theta", 10_000.0)))
    kind = _entry(rope, "rope_type", _entry(rope, "type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(
            f"config.json: rope type {kind!r} is not supported: only 'llama3' and 'default' (no scaling) are; "
            "choose a checkpoint with one of them"
        )
    factor, low, high, original = (_entry(rope, name, where="config.json's rope entry") for name in _SCALING_FIELDS)
    return theta, RopeScaling(float(factor), float(low), float(high), int(original))


def config_from_hf(hf: dict[str, Any], **overrides: Any) -> LlamaConfig:
    """The model config of a parsed config.json, in the dialect of transformers 4 or 5.

    Args:
      hf: the parsed file. Absent entries that transformers has a default for take that default.
      **overrides: fields of `LlamaConfig` that replace the file's, or that it does not have. Unless overridden,
        `param_dtype` and `dtype` are both the checkpoint's dtype (float32 if it names none), and `attention` is that of
        the `unigist` entry ("gist" if it names none).

    Raises:
      ValueError: for a model that is not a plain Llama, naming the entry, its value and the remedy; for an absent size.
    """
    _reject_unsupported(hf)
    heads, hidden = _entry(hf, "num_attention_heads"), _entry(hf, "hidden_size")
    if hf.get("head_dim") is None and hidden % heads:
        raise ValueError(
            f"config.json: hidden_size={hidden} is not a multiple of num_attention_heads={heads}; add the head_dim"
        )
    theta, scaling = _rotary_from_hf(hf)
    dtype = _entry(hf, "dtype", _entry(hf, "torch_dtype", "float32"))
    fields = {
        "vocab_size": _entry(hf, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": _entry(hf, "intermediate_size"),
        "num_layers": _entry(hf, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": _entry(hf, "num_key_value_heads", heads),
        "head_dim": _entry(hf, "head_dim", hidden // heads),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_position_embeddings": _entry(hf, "max_position_embeddings", 2048),
        "rms_norm_eps": float(_entry(hf, "rms_norm_eps", 1e-6)),
        "tie_embeddings": _entry(hf, "tie_word_embeddings", False),
        "param_dtype": dtype,
        "dtype": dtype,
        "attention": "gist" if layout_from_hf(hf) is None else _entry(hf["unigist"], "attention", "gist"),
    }
    try:
        return LlamaConfig(**{**fields, **overrides})
    except TypeError as error:  # a number in quotes
        raise ValueError(
            f"config.json holds a value of another type ({error}): take the file that came with the weights"
        ) from error


def layout_from_hf(hf: dict[str, Any]) -> GistLayout | None:
    """The layout in the `unigist` entry of a parsed config.json, or None if there is no such entry.

    Raises:
      ValueError: if the entry lacks a number (`chunk` may be missing), or holds one that `GistLayout` refuses.
    """
    entry = hf.get("unigist")
    if entry is None:
        return None
    try:
        numbers = {name: _entry(entry, name, where="config.json's unigist entry") for name in _LAYOUT_FIELDS}
        return GistLayout(**numbers, chunk=_entry(entry, "chunk", 0))
    except (AttributeError, TypeError) as error:  # a list for an object, a number in quotes
        raise ValueError(f"config.json: unigist={entry!r} is not what launch.convert writes ({error})") from error


def config_to_hf(config: LlamaConfig, layout: GistLayout | None = None) -> dict[str, Any]:
    """The contents of config.json in the dialect of transformers 4, which transformers 5 reads too.

    Args:
      config: its sizes, rotary embedding and `param_dtype` are written; choices of a run (`remat`,
        `attention_backend`, the computation's `dtype`) have no place in the file.
      layout: written as the `unigist` entry, if given, with the config's `attention` unless that is "gist".
    """
    scaling = config.rope_scaling
    rope_scaling = scaling and {"rope_type": "llama3", **{name: getattr(scaling, name) for name in _SCALING_FIELDS}}
    hf = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope_scaling,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None,  # the tokenizer's business; absent, transformers would assume 1 and 2
        "eos_token_id": None,
        "torch_dtype": config.param_dtype,
        "dtype": config.param_dtype,
    }
    if layout is not None:
        hf["unigist"] = {name: int(getattr(layout, name)) for name in _LAYOUT_FIELDS}
        if layout.chunk:
            hf["unigist"]["chunk"] = int(layout.chunk)
        if config.attention != "gist":
            hf["unigist"]["attention"] = config.attention
    return hf
