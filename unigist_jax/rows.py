"""Taking sequences of a batch by index, for every cache that has `select`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


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
