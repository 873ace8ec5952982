"""The Llama 3 model with gists."""

from unigist_jax.model.config import LlamaConfig, RopeScaling
from unigist_jax.model.llama import Llama, init_llama

__all__ = ["Llama", "LlamaConfig", "RopeScaling", "init_llama"]
