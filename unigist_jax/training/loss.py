"""Losses over raws, computed chunk by chunk so that the whole logits never exist.

Axis legend
  B  batch      T  raws of a row      C  raws of a chunk      E  hidden size      V  vocabulary

Raw i predicts raw i + 1, also across a gist; gists and sinks predict nothing. Documents and padding come in through the
mask alone: `loss_mask[b, i]` says that raw i + 1 exists, is no padding, and belongs to raw i's document.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from unigist_jax.context import mesh_placement
from unigist_jax.layout import GistLayout
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
    """Cross-entropy of each raw's target in nats, float32; `chunk` and `shards` as for `over_chunks`."""
    return over_chunks(lambda *x: _cross_entropy(model.logits(x[0]), x[1]), (hidden, targets), chunk, shards)


def target_hits(
    model: Llama, hidden: Float[Array, "B T E"], targets: Int[Array, "B T"], chunk: int, shards: int = 1
) -> Bool[Array, "B T"]:
    """Whether the model puts each raw's target first."""
    return over_chunks(lambda *x: jnp.argmax(model.logits(x[0]), axis=-1) == x[1], (hidden, targets), chunk, shards)


def distillation_losses(
    model: Llama,
    teacher: Llama,
    hidden: Float[Array, "B T E"],
    teacher_hidden: Float[Array, "B T E"],
    targets: Int[Array, "B T"],
    chunk: int,
    temperature: float,
    shards: int = 1,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Cross-entropy of each raw's target, and temperature ** 2 * KL(teacher || model), both in nats, float32.

    The square keeps the gradient's size as the temperature softens both distributions (Hinton et al., 2015).
    """

    def losses(hidden, teacher_hidden, targets):
        logits = model.logits(hidden)
        wanted = jax.lax.stop_gradient(jax.nn.log_softmax(teacher.logits(teacher_hidden) / temperature))
        divergence = jnp.sum(jnp.exp(wanted) * (wanted - jax.nn.log_softmax(logits / temperature)), axis=-1)
        return _cross_entropy(logits, targets), temperature**2 * divergence

    return over_chunks(losses, (hidden, teacher_hidden, targets), chunk, shards)


def _cross_entropy(logits: Float[Array, "B C V"], targets: Int[Array, "B C"]) -> Float[Array, "B C"]:
    is_target = (
        jnp.arange(logits.shape[-1]) == targets[..., None]
    )  # a gather's gradient would scatter into whole logits
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)


def over_chunks(function: Callable[..., Any], arrays: tuple[Array, ...], chunk: int, shards: int = 1) -> Any:
    """`function` of arrays [B, T, ...] that gives [B, T] (or a tree of such), computed chunk by chunk.

    What a chunk computes lives only while it is at work, forward and backward. T lies on `shards` devices of the mesh's
    context axis, each of which goes over its own raws in chunks.

    Args:
      function: takes the arrays' chunks, [B, C, ...].
      chunk: C, raws of a chunk.
    """
    batch, length = arrays[0].shape[:2]
    own = length // shards
    chunk = min(chunk, own)
    padding = -own % chunk

    def cut(x):
        x = x.reshape(batch, shards, own, *x.shape[2:])
        x = jnp.pad(x, [(0, 0), (0, 0), (0, padding), *[(0, 0)] * (x.ndim - 3)])
        return jnp.moveaxis(x.reshape(batch, shards, -1, chunk, *x.shape[3:]), 2, 0)

    @jax.checkpoint
    def of_chunk(parts):
        parts = [constrain(x, "batch", "positions", *[None] * (x.ndim - 2)) for x in parts]
        return jax.vmap(function, 1, 1)(*parts)  # merging batch and shards would gather what either is split over

    def joined(y):
        return jnp.moveaxis(y, 0, 2).reshape(batch, shards, -1)[:, :, :own].reshape(batch, length)

    return jax.tree.map(joined, jax.lax.map(of_chunk, tuple(cut(x) for x in arrays)))


def summed_loss(
    model: Llama,
    tokens: Int[Array, "B T"],
    doc_start: Int[Array, "B U"] | None,
    loss_mask: Bool[Array, "B T"],
    chunk: int,
    layout: GistLayout | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of the losses inside the mask, and how many there are: two float32 scalars, so that batches can be added.

    Rows are spread over the context axis of the mesh in context. `doc_start` None: every row is one document.
    """
    placement = mesh_placement()
    placed, targets, mask = (placement.place(x) for x in (tokens, next_tokens(tokens), loss_mask))
    hidden = model.hidden_states(placed, doc_start, layout=layout, placement=placement)
    losses = target_losses(model, hidden, targets, chunk, placement.devices)
    return jnp.sum(jnp.where(mask, losses, 0.0)), jnp.sum(mask, dtype=jnp.float32)


def summed_distillation(
    model: Llama,
    teacher: Llama,
    tokens: Int[Array, "B T"],
    doc_start: Int[Array, "B U"] | None,
    loss_mask: Bool[Array, "B T"],
    chunk: int,
    temperature: float,
    layout: GistLayout | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sums inside the mask of cross-entropy and of `distillation_losses`' divergence from a full-attention teacher."""
    hidden = model.hidden_states(tokens, doc_start, layout=layout)
    teacher_hidden = teacher.hidden_states(tokens, doc_start, attention="full", layout=layout)
    losses = distillation_losses(model, teacher, hidden, teacher_hidden, next_tokens(tokens), chunk, temperature)
    return tuple(jnp.sum(jnp.where(loss_mask, x, 0.0)) for x in losses)


def recalled_rows(
    model: Llama,
    tokens: Int[Array, "B T"],
    doc_start: Int[Array, "B U"] | None,
    loss_mask: Bool[Array, "B T"],
    chunk: int,
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Of each row: whether the model puts every target inside the mask first, and the share of them that it does.

    Where a row's mask holds one answer, the first is whether greedy decoding gives that answer.
    """
    placement = mesh_placement()
    placed, targets, mask = (placement.place(x) for x in (tokens, next_tokens(tokens), loss_mask))
    hidden = model.hidden_states(placed, doc_start, placement=placement)
    hits = target_hits(model, hidden, targets, chunk, placement.devices)
    share = jnp.sum(hits & mask, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1)
    return jnp.all(hits | ~mask, axis=1).astype(jnp.float32), share.astype(jnp.float32)
