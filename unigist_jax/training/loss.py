"""Next-token cross-entropy over raws, computed chunk by chunk so that the whole logits never exist.

Axis legend
  B  batch      T  raws of a row      C  raws of a chunk      E  hidden size      V  vocabulary

Raw i predicts raw i + 1, also across a gist; gists and sinks predict nothing. Documents and padding come in through the
mask alone: `loss_mask[b, i]` says that raw i + 1 exists, is no padding, and belongs to raw i's document.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from unigist_jax.model import Llama


def next_tokens(tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The target of each raw; the last one's is a stand-in that the mask leaves out."""
    return jnp.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)


def token_losses(
    model: Llama, hidden: Float[Array, "B T E"], tokens: Int[Array, "B T"], chunk: int
) -> Float[Array, "B T"]:
    """Cross-entropy of every raw's next token in nats, float32; entries outside the loss mask are meaningless.

    Each chunk's logits [B, C, V] live only while it is computed, forward and backward.
    """
    batch, length, size = hidden.shape
    padding = -length % chunk
    hidden = jnp.pad(hidden, [(0, 0), (0, padding), (0, 0)])
    targets = jnp.pad(next_tokens(tokens), [(0, 0), (0, padding)])

    @jax.checkpoint
    def chunk_losses(pair):
        hidden, targets = pair
        logits = model.logits(hidden)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - picked

    chunks = hidden.reshape(batch, -1, chunk, size).swapaxes(0, 1), targets.reshape(batch, -1, chunk).swapaxes(0, 1)
    return jax.lax.map(chunk_losses, chunks).swapaxes(0, 1).reshape(batch, -1)[:, :length]


def summed_loss(
    model: Llama,
    tokens: Int[Array, "B T"],
    doc_start: Int[Array, "B U"],
    loss_mask: Bool[Array, "B T"],
    chunk: int,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of the losses inside the mask, and how many there are: two float32 scalars, so that batches can be added."""
    losses = token_losses(model, model.hidden_states(tokens, doc_start), tokens, min(chunk, tokens.shape[1]))
    return jnp.sum(jnp.where(loss_mask, losses, 0.0)), jnp.sum(loss_mask, dtype=jnp.float32)
