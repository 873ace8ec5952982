"""Inference with a compressed cache: chunked prefill, evicting decode, generation."""

from unigist_jax.inference.append import append
from unigist_jax.inference.cache import GistCache, full_cache_bytes, gist_cache_bytes
from unigist_jax.inference.decode import decode_step
from unigist_jax.inference.generate import Generated, generate
from unigist_jax.inference.prefill import prefill
from unigist_jax.inference.sampling import Sampling
from unigist_jax.inference.weights import for_inference

__all__ = [
    "Generated",
    "GistCache",
    "Sampling",
    "append",
    "decode_step",
    "for_inference",
    "full_cache_bytes",
    "generate",
    "gist_cache_bytes",
    "prefill",
]
