"""A tiny model that the tests of HF weights share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from unigist_jax.layout import GistLayout
from unigist_jax.model import Llama, LlamaConfig, RopeScaling

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
