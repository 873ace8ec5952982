"""The train state and the train step.

Axis legend
  B  batch rows over all processes      T  raws of a row      U  units of a row
  A  parts that a batch is computed in, one after the other
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from pallas_kernels.backends import target_device
from unigist_jax.config import RunConfig
from unigist_jax.layout import GistLayout, refined_starts
from unigist_jax.model import Llama, init_llama
from unigist_jax.sharding import abstract_on, constrain, tree_shardings
from unigist_jax.training.flops import step_flops
from unigist_jax.training.loss import recalled_rows, summed_distillation, summed_loss
from unigist_jax.training.optimizer import learning_rate, make_optimizer
from unigist_jax.training.trainable import joined, split_trainable

# `model.remat` says what is computed again, and XLA adds to it by two passes of its own. The first, where it finds
# memory short, computes the head's products again and frees nothing. The second makes one kernel of attention and the
# write of its output among those kept for the backward pass, and runs attention once more for what the layer goes on
# with.
GPU_OPTIONS = {"xla_disable_hlo_passes": "rematerialization", "xla_gpu_enable_dynamic_slice_fusion": False}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows of one step (`unigist_jax.data`): arrays, or ShapeDtypeStructs to compile for.

    Attributes:
      tokens: int32 [B, T].
      doc_start: int32 [B, U], or None: every row is one document.
      loss_mask: bool [B, T].
    """

    tokens: Any
    doc_start: Any
    loss_mask: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a checkpoint holds. `step` (int32) counts finished steps; the model is a pytree of parameters.

    Also made of ShapeDtypeStructs or of shardings, which is why `step` is of any type.
    """

    step: Any
    model: Llama
    opt_state: Any


def _fresh_state(run: RunConfig, model: Llama | None) -> TrainState:
    if model is None:
        model = init_llama(run.model, run.gist, run.train.seed)
    optimizer = make_optimizer(run.optim, run.train.steps)
    return TrainState(jnp.int32(0), model, optimizer.init(split_trainable(model, run.train.trainable)[0]))


def abstract_state(run: RunConfig, mesh: jax.sharding.Mesh) -> TrainState:
    """The state's shapes, dtypes and shardings on the mesh, to restore a checkpoint into."""
    return abstract_on(mesh, jax.eval_shape(lambda: _fresh_state(run, None)))


def make_state(run: RunConfig, mesh: jax.sharding.Mesh, model: Llama | None = None) -> TrainState:
    """A fresh state, laid out on the mesh from the start. `model`: weights to begin with, else random ones."""

    def fresh(model):
        return _fresh_state(run, model)

    shardings = tree_shardings(mesh, jax.eval_shape(fresh, model))
    return jax.jit(fresh, out_shardings=shardings)(model)


def make_train_step(run: RunConfig, mesh: jax.sharding.Mesh) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """The jitted step of a run: `(state, batch, teacher=None, layout=None) -> (state, metrics)`.

    The state is donated and stays where it lies. The loss is the mean over the batch's targets, however many parts the
    batch is computed in. A step that is not finite, or whose gradient is a spike, changes nothing but the count of
    steps when `train.on_bad_step` says "skip".

    Args:
      teacher: a full-attention model, for `train.distill_weight`.
      layout: of `run.layouts()`, static; None: `run.gist`. Rows are packed for `run.gist` either way.

    Returns:
      The new state, and float32 scalars: loss (cross-entropy in nats), grad_norm (before clipping), learning_rate,
      targets, flops (`unigist_jax.training.flops`), bad (1 for a step that is not finite or a spike), and with a
      teacher divergence (nats).
    """
    settings = run.train
    optimizer = make_optimizer(run.optim, settings.steps)
    schedule = learning_rate(run.optim, settings.steps)

    def objective(model: Llama, rows: Batch, teacher: Llama | None, layout: GistLayout) -> tuple[Array, dict]:
        """What is minimised, and what is reported, both summed over targets."""
        inputs = model, rows.tokens, rows.doc_start, rows.loss_mask, settings.loss_chunk
        if teacher is None:
            loss, _ = summed_loss(*inputs, layout)
            return loss, {"loss": loss}
        loss, divergence = summed_distillation(
            model, teacher, *inputs[1:], temperature=settings.distill_temperature, layout=layout
        )
        weight = settings.distill_weight
        return (1 - weight) * loss + weight * divergence, {"loss": loss, "divergence": divergence}

    def train_step(
        state: TrainState, batch: Batch, teacher: Llama | None = None, layout: GistLayout | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        layout = layout or run.gist
        if batch.doc_start is not None:
            starts = refined_starts(batch.doc_start, run.gist.ratio // layout.ratio)
            batch = dataclasses.replace(batch, doc_start=starts)
        trained, frozen = split_trainable(state.model, settings.trainable)
        targets = jnp.maximum(jnp.sum(batch.loss_mask, dtype=jnp.float32), 1)

        def mean_loss(trained, rows):
            total, sums = objective(joined(trained, frozen), rows, teacher, layout)
            return total / targets, jax.tree.map(lambda x: x / targets, sums)

        grads, metrics = _summed_over_parts(jax.grad(mean_loss, has_aux=True), trained, batch, settings.accumulate)
        grad_norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
        bad = ~(jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm))
        if settings.spike_norm:
            bad |= grad_norm > settings.spike_norm
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        updated = optax.apply_updates(trained, updates)
        if settings.on_bad_step == "skip":
            updated, opt_state = _unless(bad, (updated, opt_state), (trained, state.opt_state))
        metrics |= {
            "grad_norm": grad_norm,
            "learning_rate": schedule(state.step),
            "targets": targets,
            "flops": _flops(run, batch, layout, teacher is not None),
            "bad": bad.astype(jnp.float32),
        }
        state = TrainState(state.step + 1, joined(updated, frozen), opt_state)
        # Left to itself the compiler may choose another layout, and the second step would be compiled anew.
        return jax.lax.with_sharding_constraint(state, tree_shardings(mesh, state)), metrics

    options = GPU_OPTIONS if target_device().platform in ("gpu", "cuda") else None
    return jax.jit(train_step, donate_argnums=0, static_argnames="layout", compiler_options=options)


def _summed_over_parts(function: Callable, weights: Any, batch: Batch, parts: int) -> Any:
    """`function(weights, rows)` summed over the parts of a batch, in float32 if there are several."""
    if parts == 1:
        return function(weights, batch)

    def cut(x):  # part i has every A-th row from i on, so that each device's rows stay on it
        x = jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)
        return constrain(x, None, "batch", *[None] * (x.ndim - 2))

    arrays, batch_of = jax.tree.flatten(batch)
    arrays = [cut(x) for x in arrays]
    shapes = jax.eval_shape(lambda *x: function(weights, batch_of.unflatten(y[0] for y in x)), *arrays)

    def add_part(total, rows):
        part = function(weights, batch_of.unflatten(rows))
        return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, part), None

    return jax.lax.scan(add_part, jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes), arrays)[0]


def _unless(bad: Array, new: Any, old: Any) -> Any:
    """`new`, but `old` in a bad step; counts of steps go on."""
    return jax.tree.map(
        lambda new, old: jnp.where(bad, old, new) if jnp.issubdtype(new.dtype, jnp.floating) else new, new, old
    )


def _flops(run: RunConfig, batch: Batch, layout: GistLayout, teacher: bool) -> Float[Array, ""]:
    batch_size, length = batch.tokens.shape
    starts = batch.doc_start
    if starts is None:
        starts = jnp.zeros((batch_size, layout.num_units(length)), jnp.int32)
    return step_flops(run.model, layout, starts, frozen=run.train.trainable == "gist", teacher=teacher)


def make_eval_step(run: RunConfig) -> Callable[[Llama, Batch], tuple[Float[Array, ""], Float[Array, ""]]]:
    """The jitted held-out loss of a batch: its sum in nats, and its count of targets. In the parts of a train step."""

    def loss_of(model: Llama, rows: Batch):
        return summed_loss(model, rows.tokens, rows.doc_start, rows.loss_mask, run.train.loss_chunk)

    def eval_step(model: Llama, batch: Batch):
        return _summed_over_parts(loss_of, model, batch, run.train.accumulate)

    return jax.jit(eval_step)


def make_recall_step(run: RunConfig) -> Callable[[Llama, Batch], dict[str, Float[Array, ""]]]:
    """The jitted recall of a batch of records, the mask on their answers (`unigist_jax.training.loss.recalled_rows`).

    Sums over the rows that have a mask: `answers` that are right as a whole, the share of their `tokens`, and `rows`.
    In the parts of a train step.
    """

    def recall_of(model: Llama, rows: Batch):
        asked = rows.loss_mask.any(axis=1)
        answers, tokens = recalled_rows(model, rows.tokens, rows.doc_start, rows.loss_mask, run.train.loss_chunk)
        sums = {"answers": answers, "tokens": tokens, "rows": asked.astype(jnp.float32)}
        return {name: jnp.sum(jnp.where(asked, x, 0.0)) for name, x in sums.items()}

    def recall_step(model: Llama, batch: Batch):
        return _summed_over_parts(recall_of, model, batch, run.train.accumulate)

    return jax.jit(recall_step)
