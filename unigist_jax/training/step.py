"""The train state and the train step.

Axis legend
  B  batch rows over all processes      T  raws of a row      U  units of a row
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int32

from unigist_jax.config import RunConfig
from unigist_jax.model import Llama, init_llama
from unigist_jax.sharding import abstract_on, tree_shardings
from unigist_jax.training.loss import summed_loss
from unigist_jax.training.optimizer import learning_rate, make_optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows of one step (`unigist_jax.data`)."""

    tokens: Int32[Array, "B T"]
    doc_start: Int32[Array, "B U"]
    loss_mask: Bool[Array, "B T"]


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
    return TrainState(jnp.int32(0), model, optimizer.init(model))


def abstract_state(run: RunConfig, mesh: jax.sharding.Mesh) -> TrainState:
    """The state's shapes, dtypes and shardings on the mesh, to restore a checkpoint into."""
    return abstract_on(mesh, jax.eval_shape(lambda: _fresh_state(run, None)))


def make_state(run: RunConfig, mesh: jax.sharding.Mesh, model: Llama | None = None) -> TrainState:
    """A fresh state, laid out on the mesh from the start. `model`: weights to begin with, else random ones."""

    def fresh(model):
        return _fresh_state(run, model)

    shardings = tree_shardings(mesh, jax.eval_shape(fresh, model))
    return jax.jit(fresh, out_shardings=shardings)(model)


def make_train_step(
    run: RunConfig, mesh: jax.sharding.Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """The jitted step of a run: `(state, batch) -> (state, metrics)`; the state is donated and stays where it lies.

    The loss is the mean over the batch's targets; metrics are float32 scalars: loss, grad_norm (before clipping),
    learning_rate, targets.
    """
    optimizer = make_optimizer(run.optim, run.train.steps)
    schedule = learning_rate(run.optim, run.train.steps)

    def train_step(state: TrainState, batch: Batch):
        def mean_loss(model):
            total, count = summed_loss(model, batch.tokens, batch.doc_start, batch.loss_mask, run.train.loss_chunk)
            return total / jnp.maximum(count, 1), count

        (loss, count), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.model)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.model)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": schedule(state.step),
            "targets": count,
        }
        state = TrainState(state.step + 1, optax.apply_updates(state.model, updates), opt_state)
        # Left to itself the compiler may choose another layout, and the second step would be compiled anew.
        return jax.lax.with_sharding_constraint(state, tree_shardings(mesh, state)), metrics

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(run: RunConfig) -> Callable[[Llama, Batch], tuple[Float[Array, ""], Float[Array, ""]]]:
    """The jitted held-out loss of a batch: its sum in nats, and its count of targets."""

    def eval_step(model: Llama, batch: Batch):
        return summed_loss(model, batch.tokens, batch.doc_start, batch.loss_mask, run.train.loss_chunk)

    return jax.jit(eval_step)
