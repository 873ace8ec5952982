"""AdamW with global-norm clipping, linear warm-up and a cosine to a fraction of the peak, as in the paper."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from unigist_jax.config import OptimConfig


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: 0 to the peak over the warm-up, then a cosine that ends at step `steps`."""
    end = config.peak_lr * config.final_fraction
    return optax.warmup_cosine_decay_schedule(0.0, config.peak_lr, config.warmup_steps, steps, end)


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of `steps` steps. Weight decay touches matrices alone: no norms, no gist, no sinks."""

    def decayed(params: Any) -> Any:
        def is_matrix(path, leaf):
            name = jax.tree_util.keystr(path)
            return leaf.ndim >= 2 and not any(part in name for part in ("norm", "gist_embedding", "sink_embedding"))

        return jax.tree_util.tree_map_with_path(is_matrix, params)

    adamw = optax.adamw(
        learning_rate(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    return in_float32(optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw), config.state_dtype)


def in_float32(inner: optax.GradientTransformation, state_dtype: str) -> optax.GradientTransformation:
    """`inner`, computed in float32 whatever the dtype of the parameters; its state is kept in `state_dtype`."""

    def cast(tree: Any, dtype: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)

    def init(params):
        return cast(inner.init(params), state_dtype)

    def update(updates, state, params):
        exact = (cast(x, jnp.float32) for x in (updates, state, params))
        updates, state = inner.update(*exact)
        return updates, cast(state, state_dtype)

    return optax.GradientTransformation(init, update)
