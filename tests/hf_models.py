"""Tiny models that the tests of HF weights share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from unigist_jax.layout import GistLayout
from unigist_jax.model import Llama, LlamaConfig, RopeScaling
from unigist_jax.model.hf_config import config_to_hf

LAYOUT = GistLayout(ratio=4, num_sinks=3, window=8)
SCALING = {  # divides all but the first of the 8 frequencies by 8
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rope_theta=10_000.0,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16),
    max_position_embeddings=256,
    dtype="float32",
)


def tiny_model(seed=0, layout=LAYOUT, **changes):
    """A model of random parameters, made without compiling anything."""
    config = dataclasses.replace(CONFIG, **changes)
    rng = np.random.default_rng(seed)
    abstract = jax.eval_shape(lambda: Llama(config, layout, rngs=nnx.Rngs(params=0)))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), leaf.dtype), abstract)


def transformers_llama(tied=False, scaled=True):
    """A random Llama of transformers of the sizes of `CONFIG`, with weights large enough that attention is not flat."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    hf = config_to_hf(dataclasses.replace(CONFIG, tie_embeddings=tied))
    rope = SCALING if scaled else {"rope_type": "default"}
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    names += ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings")
    config = transformers.LlamaConfig(
        **{name: hf[name] for name in names},
        rope_parameters={"rope_theta": 10_000.0, **rope},
        initializer_range=0.25,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model
