"""Losses over raws, computed chunk by chunk so that the whole logits never exist.

Axis legend
  B  batch      T  raws of a row      C  raws of a chunk      E  hidden size      V  vocabulary

Raw i predicts raw i + 1, also across a gist; gists and sinks predict nothing. Documents and padding come in through the
mask alone: `loss_mask[b, i]` says that raw i + 1 exists, is no padding, and belongs to raw i's document.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from unigist_jax.context import mesh_placement
from unigist_jax.layout import GistLayout
from unigist_jax.model import Llama
from unigist_jax.sharding import PARAMETER_AXES, constrain, parameter_path


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


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def summed_cross_entropy(
    head: Llama,
    hidden: Float[Array, "B T E"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    chunk: int,
    shards: int = 1,
) -> Float[Array, ""]:
    """Sum of `target_losses` inside the mask. Differentiated, a chunk gives its gradients beside its loss.

    A sum has one cotangent, a factor known afterwards. So the backward pass multiplies by it and computes no logits
    again: three products with the head a step instead of four (Hsu et al., Liger Kernel, arXiv 2410.10989).

    Args:
      head: of a model, by `head_of`.
      chunk, shards: as for `over_chunks`.
    """
    return jnp.sum(jnp.where(mask, target_losses(head, hidden, targets, chunk, shards), 0.0))


def _loss_forward(head, hidden, targets, mask, chunk, shards):
    replicas = jax.sharding.get_abstract_mesh().shape.get("data", 1)

    def shard_loss(head, hidden, targets, mask):
        losses = _cross_entropy(head.logits(hidden), targets)
        return jnp.sum(jnp.where(mask, losses, 0.0))

    def by_replica(x):
        x = x.reshape(replicas, -1, *x.shape[1:])
        return constrain(x, "replicas", "replica_batch", "positions", *[None] * (x.ndim - 3))

    def add_chunk(sums, parts):
        of_shards = jax.vmap(jax.value_and_grad(shard_loss, (0, 1)), (None, 1, 1, 1), (0, (0, 1)))
        of_replicas = jax.vmap(of_shards, (None, 0, 0, 0))
        loss, (head_gradient, gradient) = of_replicas(head, *map(by_replica, parts))
        sums = _as_parameters(jax.tree.map(jnp.add, sums, (loss, head_gradient)))
        return sums, gradient.reshape(-1, *gradient.shape[2:])

    # Each replica and shard has its sums, which meet after the last chunk: no chunk waits for other devices' gradients.
    zeros = jax.tree.map(lambda x: jnp.zeros((replicas, shards, *x.shape), x.dtype), (jnp.float32(0), head))
    parts = tuple(_cut(x, chunk, shards) for x in (hidden, targets, mask))
    sums, gradient = jax.lax.scan(add_chunk, _as_parameters(zeros), parts)
    loss, head_gradient = jax.tree.map(lambda x: jnp.sum(x, axis=(0, 1)), sums)
    return loss, (head_gradient, _joined(gradient, hidden.shape[1]))


def _loss_backward(_chunk, _shards, gradients, factor):
    return *jax.tree.map(lambda x: (factor * x).astype(x.dtype), gradients), None, None


summed_cross_entropy.defvjp(_loss_forward, _loss_backward)


def head_of(model: Llama) -> Llama:
    """The model without the parameters that `Llama.logits` does not read."""
    read = {"norm/scale", "embedding" if model.head is None else "head"}
    return jax.tree_util.tree_map_with_path(lambda path, x: x if parameter_path(path) in read else None, model)


def _as_parameters(tree: Any) -> Any:
    """The tree, what lies at a parameter's place in it, [replicas, shards, ...], laid out as that parameter on each."""

    def of_leaf(path, x):
        axes = PARAMETER_AXES.get(parameter_path(path))
        return x if axes is None else constrain(x, "replicas", "positions", *axes)

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def over_chunks(function: Callable[..., Any], arrays: tuple[Array, ...], chunk: int, shards: int = 1) -> Any:
    """`function` of arrays [B, T, ...] that gives [B, T] (or a tree of such), computed chunk by chunk.

    What a chunk computes lives only while it is at work, forward and backward. T lies on `shards` devices of the mesh's
    context axis, each of which goes over its own raws in chunks.

    Args:
      function: takes the arrays' chunks, [B, C, ...].
      chunk: C, raws of a chunk.
    """
    results = jax.lax.map(jax.checkpoint(partial(_at_once, function)), tuple(_cut(x, chunk, shards) for x in arrays))
    return jax.tree.map(lambda x: _joined(x, arrays[0].shape[1]), results)


def _cut(x: Array, chunk: int, shards: int) -> Array:
    """[B, T, ...] in chunks, [chunks, B, shards, C, ...], the last padded."""
    batch, length, *rest = x.shape
    own = length // shards
    chunk = min(chunk, own)
    x = x.reshape(batch, shards, own, *rest)
    x = jnp.pad(x, [(0, 0), (0, 0), (0, -own % chunk), *[(0, 0)] * len(rest)])
    return jnp.moveaxis(x.reshape(batch, shards, -1, chunk, *rest), 2, 0)


def _joined(x: Array, length: int) -> Array:
    """The inverse of `_cut`."""
    _, batch, shards, _, *rest = x.shape
    x = jnp.moveaxis(x, 0, 2).reshape(batch, shards, -1, *rest)
    return x[:, :, : length // shards].reshape(batch, length, *rest)


def _at_once(function: Callable[..., Any], parts: tuple[Array, ...]) -> Any:
    """`function` of one chunk [B, shards, C, ...], on every shard."""
    parts = [constrain(x, "batch", "positions", *[None] * (x.ndim - 2)) for x in parts]
    return jax.vmap(function, 1, 1)(*parts)  # merging batch and shards would gather what either is split over


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
    loss = summed_cross_entropy(head_of(model), hidden, targets, mask, chunk, placement.devices)
    return loss, jnp.sum(mask, dtype=jnp.float32)


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
