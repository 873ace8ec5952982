"""AdaKV on SnapKV's scores: the heads of a layer share its budget (Feng et al., arXiv 2407.11550).

A fifth of each head's budget is its own; the rest goes to the best keys over all heads of the layer. Heads so keep
different numbers of keys, and are stored ragged: the layer holds its budget and no more.
"""

from __future__ import annotations

from functools import partial

from unigist_jax.baselines import compressed
from unigist_jax.baselines.compressed import Policy, even_budgets
from unigist_jax.baselines.snapkv import observed_attention

PROTECTED = 0.2

prefill = partial(compressed.prefill, Policy(observed_attention, even_budgets, protected=PROTECTED))
