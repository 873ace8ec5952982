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

from unigist_jax.context import mesh_placement
from unigist_jax.model import Llama
from unigist_jax.sharding import constrain


def next_tokens(tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The target of each raw; the last one's is a stand-in that the mask leaves out."""
    return jnp.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)


def token_losses(
    model: Llama, hidden: Float[Array, "B T E"], tokens: Int[Array, "B T"], chunk: int
) -> Float[Array, "B T"]:
    """Cross-entropy of every raw's next token in nats, float32; entries outside the loss mask are meaningless."""
    return target_losses(model, hidden, next_tokens(tokens), chunk)


def target_losses(
    model: Llama, hidden: Float[Array, "B T E"], targets: Int[Array, "B T"], chunk: int, shards: int = 1
) -> Float[Array, "B T"]:
    """Cross-entropy of each raw's target in nats, float32.

    Each chunk's logits [B, C, V] live only while it is computed, forward and backward. T lies on `shards` devices of
    the mesh's context axis, each of which goes over its own raws in chunks.
    """
    batch, length, size = hidden.shape
    hidden, targets = hidden.reshape(batch, shards, -1, size), targets.reshape(batch, shards, -1)
    chunk = min(chunk, hidden.shape[2])
    padding = -hidden.shape[2] % chunk
    hidden = jnp.pad(hidden, [(0, 0), (0, 0), (0, padding), (0, 0)])
    targets = jnp.pad(targets, [(0, 0), (0, 0), (0, padding)])

    @jax.checkpoint
    def chunk_losses(pair):
        hidden, targets = pair
        hidden = constrain(hidden, "batch", "positions", None, None)
        logits = model.logits(hidden.reshape(batch * shards, chunk, size)).reshape(*targets.shape, -1)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - picked

    def by_chunk(x):
        return jnp.moveaxis(x.reshape(batch, shards, -1, chunk, *x.shape[3:]), 2, 0)

    losses = jnp.moveaxis(jax.lax.map(chunk_losses, (by_chunk(hidden), by_chunk(targets))), 0, 2)
    return losses.reshape(batch, shards, -1)[:, :, : length // shards].reshape(batch, length)


def summed_loss(
    model: Llama,
    tokens: Int[Array, "B T"],
    doc_start: Int[Array, "B U"],
    loss_mask: Bool[Array, "B T"],
    chunk: int,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of the losses inside the mask, and how many there are: two float32 scalars, so that batches can be added.

    Rows are spread over the context axis of the mesh in context.
    """
    placement = mesh_placement()
    placed, targets, mask = (placement.place(x) for x in (tokens, next_tokens(tokens), loss_mask))
    hidden = model.hidden_states(placed, doc_start, placement=placement)
    losses = target_losses(model, hidden, targets, chunk, placement.devices)
    return jnp.sum(jnp.where(mask, losses, 0.0)), jnp.sum(mask, dtype=jnp.float32)
