"""Sequences of a batch: taking them by index, for every cache that has `select`, and writing one slot of each.

Axis legend
  B  batch      N  slots of a sequence
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32


def select_rows(tree: Any, rows: Sequence[int]) -> Any:
    """A copy of a pytree of arrays [B, …] that holds these sequences, in this order; repeats are allowed.

    Raises:
      ValueError: for no rows, or one that is not there.
    """
    batch = jax.tree.leaves(tree)[0].shape[0]
    rows = np.asarray(rows, np.int32).reshape(-1)
    if not len(rows) or rows.min() < 0 or rows.max() >= batch:
        raise ValueError(f"rows {rows.tolist()} of a batch of {batch} sequences; give at least one of 0 … {batch - 1}")
    return _take(tree, jnp.asarray(rows))


_take = jax.jit(lambda tree, rows: jax.tree.map(lambda x: x[rows], tree))


def set_slots(x: Array, index: Int32[Array, " B"], new: Array) -> Array:
    """`x` [B, N, …] with `new` [B, …] in slot `index` of each sequence.

    In a batch a slot beyond the last is dropped: that of a sequence which is full, and frozen. One sequence alone must
    have room: it is updated in place without the kernels that would look whether it has.
    """
    if x.shape[0] == 1:
        return jax.lax.dynamic_update_slice_in_dim(x, new[:, None], index[0], axis=1)
    return x.at[jnp.arange(x.shape[0]), index].set(new)
