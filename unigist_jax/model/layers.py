"""The parts of a Llama 3 decoder layer but attention: RMSNorm, rotary embeddings, SwiGLU; and the layer itself.

Axis legend
  B  batch      P  positions      E  hidden size      F  intermediate size      H  heads      D  head dim
  V  vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from unigist_jax.model.attention import Attention
from unigist_jax.model.config import LlamaConfig

GATE = "mlp_gate"  # the name under which `jax.checkpoint` policies find the gate's product


class Rotary(NamedTuple):
    """Cosines and sines of rotary angles, float32 [B or 1, P, D / 2]."""

    cos: Float[Array, "B P half"]
    sin: Float[Array, "B P half"]


def rotary_frequencies(config: LlamaConfig) -> np.ndarray:
    """Angle per position of each rotated pair, float32 [D / 2], with llama3 scaling where the config has it."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponent).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return ((1 - kept) * frequencies / scaling.factor + kept * frequencies).astype(np.float32)


def rotary(config: LlamaConfig, positions: Int[Any, " P"] | Int[Any, "B P"]) -> Rotary:
    """Rotary angles at `positions`."""
    positions = jnp.atleast_2d(positions)
    angles = positions[..., None].astype(jnp.float32) * rotary_frequencies(config)
    return Rotary(jnp.cos(angles), jnp.sin(angles))


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, in float32."""

    def __init__(self, config: LlamaConfig, stack: tuple[int, ...] = ()):
        self.scale = nnx.Param(jnp.ones((*stack, config.hidden_size), config.param_dtype))
        self.eps = config.rms_norm_eps

    def __call__(self, x: Float[Array, "B P E"]) -> Float[Array, "B P E"]:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (normed * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class SwiGLU(nnx.Module):
    """Gated feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig, stack: tuple[int, ...] = (), *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02, dtype=config.param_dtype)
        wide = (*stack, config.hidden_size, config.intermediate_size)
        narrow = (*stack, config.intermediate_size, config.hidden_size)
        self.gate = nnx.Param(init(rngs.params(), wide))
        self.up = nnx.Param(init(rngs.params(), wide))
        self.down = nnx.Param(init(rngs.params(), narrow))

    def __call__(self, x: Float[Array, "B P E"]) -> Float[Array, "B P E"]:
        gate, up, down = (w[...].astype(x.dtype) for w in (self.gate, self.up, self.down))
        return (jax.nn.silu(checkpoint_name(x @ gate, GATE)) * (x @ up)) @ down


class DecoderLayer(nnx.Module):
    """One pre-norm decoder layer. What attends to what is the caller's: training, prefill, decoding share it."""

    def __init__(self, config: LlamaConfig, stack: tuple[int, ...] = (), *, rngs: nnx.Rngs):
        """`stack`: leading axes of every parameter; `(L,)` makes the stacked layers that `jax.lax.scan` runs over."""
        self.attention_norm = RMSNorm(config, stack)
        self.attention = Attention(config, stack, rngs=rngs)
        self.mlp_norm = RMSNorm(config, stack)
        self.mlp = SwiGLU(config, stack, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B P E"],
        angles: Rotary,
        attend: Callable[..., tuple[jax.Array, Any]],
        mlp_parts: int = 1,
    ) -> tuple[Float[Array, "B P E"], Any]:
        """Runs the layer.

        Args:
          x: hidden states.
          angles: rotary angles of the positions.
          attend: `(q [B, P, Hq, D], k [B, P, Hkv, D], v) -> (context [B, P, Hq, D], anything)`, with q and k rotated.
          mlp_parts: runs the feed-forward on so many parts of the positions, one after another: its wide hidden states
            exist for one at a time. It divides P.

        Returns:
          The new hidden states, and what `attend` returned beside the context (a cache, say).
        """
        with jax.named_scope("attention"):
            q, k, v = self.attention.project(self.attention_norm(x), *angles)
            context, extra = attend(q, k, v)
            x = x + self.attention.output(context)
        with jax.named_scope("mlp"):
            if mlp_parts == 1:
                return x + self.mlp(self.mlp_norm(x)), extra
            parts = jnp.moveaxis(x.reshape(x.shape[0], mlp_parts, -1, x.shape[2]), 1, 0)
            parts = jax.lax.map(lambda part: part + self.mlp(self.mlp_norm(part)), parts)
            return jnp.moveaxis(parts, 0, 1).reshape(x.shape), extra


@jax.custom_vjp
def head_product(x: Float[Array, "B P E"], head: Float[Array, "E V"]) -> Float[Array, "B P V"]:
    """Logits in float32 from factors of one dtype, in which both products of the backward pass run too.

    Left to itself, jax multiplies the logits' float32 gradient by factors that it widens, at half the speed or less.
    """
    return jnp.einsum("bpe,ev->bpv", x, head, preferred_element_type=jnp.float32)


def _head_forward(x, head):
    return head_product(x, head), (x, head)


def _head_backward(factors, gradient):
    x, head = factors
    gradient = gradient.astype(x.dtype)
    return jnp.einsum("bpv,ev->bpe", gradient, head), jnp.einsum("bpe,bpv->ev", x, gradient)


head_product.defvjp(_head_forward, _head_backward)
