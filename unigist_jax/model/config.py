"""Sizes and choices of a Llama 3 model. Frozen and hashable: static under `jax.jit`."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from pallas_kernels.backends import check_name

DTYPES = ("float32", "bfloat16", "float16")
REMAT_POLICIES = ("none", "dots", "attention_gate", "attention", "attention_output", "attention_offload", "full")
Attention = Literal["gist", "full", "autocompressors"]
GIST_INITS = ("normal", "mean", "tokens")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the long rotary wavelengths (`rope_type: llama3`)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A Llama 3 decoder.

    Attributes:
      vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim: sizes; `num_heads` is a
        multiple of `num_kv_heads`, `head_dim` is even. A vocabulary of 0 is still to be fixed, by a tokenizer.
      rope_theta, rope_scaling: rotary base, and llama3 scaling or None.
      max_position_embeddings: longest context the weights were made for; carried to and from HF, no bound here.
      rms_norm_eps: epsilon of RMSNorm.
      tie_embeddings: the head shares the embedding.
      attention: "gist" (sinks, gists and a window or a chunk of raws), "full" (plain causal attention, no sinks, no
        gists) or "autocompressors" (summaries of chunks, `unigist_jax.model.summaries`).
      param_dtype, dtype: of the parameters and of the computation; norms, softmax and logits are float32.
      remat: what the backward pass recomputes of each layer: "none" (nothing), "dots" (all but attention and products),
        "attention_gate" (all but attention, what goes into it, and one of the MLP's products), "attention" (all but
        attention and what goes into it), "attention_output" (all but attention), "attention_offload" (all but
        attention, whose output waits in the host's memory), "full" (everything).
      attention_backend: of `pallas_kernels.gist_attention`; None chooses by platform.
      gist_init: what gist and sink embeddings begin as: "normal" (around 0), "mean" (around the mean of the
        vocabulary's embeddings), "tokens" (embeddings of tokens drawn from the vocabulary).
      gist_init_scale: standard deviation of "normal" and "mean".

    Raises:
      ValueError: naming the field, its value and what it may be.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 131_072
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = False
    attention: Attention = "gist"
    param_dtype: str = "float32"
    dtype: str = "bfloat16"
    remat: str = "none"
    attention_backend: str | None = None
    gist_init: str = "normal"
    gist_init_scale: float = 0.02

    def __post_init__(self):
        if self.vocab_size < 0:
            raise ValueError(f"LlamaConfig.vocab_size={self.vocab_size} must be at least 0 (0: by the tokenizer)")
        for name in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"LlamaConfig.{name}={getattr(self, name)} must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"LlamaConfig.num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"LlamaConfig.head_dim={self.head_dim} must be even: rotary embeddings turn pairs")
        for name, allowed in (
            ("attention", get_args(Attention)),
            ("param_dtype", DTYPES),
            ("dtype", DTYPES),
            ("remat", REMAT_POLICIES),
            ("gist_init", GIST_INITS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"LlamaConfig.{name}={getattr(self, name)!r} is unknown; choose one of {allowed}")
        check_name(self.attention_backend)
