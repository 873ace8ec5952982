"""AdamW with global-norm clipping, linear warm-up and a cosine to a fraction of the peak (METHOD 6)."""

from __future__ import annotations

from typing import Any

import jax
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
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
