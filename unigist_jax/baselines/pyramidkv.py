"""PyramidKV: SnapKV's scores, and budgets that fall from the first layer to the last (Cai et al., arXiv 2406.02069)."""

from __future__ import annotations

from functools import partial

import numpy as np

from unigist_jax.baselines import compressed
from unigist_jax.baselines.compressed import Policy, even_budgets
from unigist_jax.baselines.snapkv import WINDOW, observed_attention

STEEPNESS = 20  # the last layer keeps the mean budget divided by it


def pyramid_budgets(length: int, ratio: int, num_layers: int) -> list[int]:
    """Budgets on a line from `2 m - m / 20` to `m / 20` for the mean budget `m = length / ratio`.

    The first is cut to what lies before the observing window, the last then raised so that the mean stays. Where the
    last would not hold the window, all layers get the mean, as in SnapKV.
    """
    mean = length / ratio
    last = mean / STEEPNESS
    first = 2 * mean - last
    if first >= length - WINDOW:
        first = length - WINDOW
        last = 2 * mean - first
    if not length >= first >= last >= WINDOW:
        return even_budgets(length, ratio, num_layers)
    return [round(budget) for budget in np.linspace(first, last, num_layers).tolist()]


prefill = partial(compressed.prefill, Policy(observed_attention, pyramid_budgets))
