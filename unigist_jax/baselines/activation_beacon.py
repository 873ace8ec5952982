"""Activation Beacon (Zhang et al., arXiv 2401.03462): chunks whose raws see each other, and beacons that stay.

In this project's terms a beacon is a gist, and the method is gist attention with chunks in place of a sliding window
(`GistLayout.chunk`): a raw sees all beacons before it, and the raws of its own chunk. Training does it in one pass,
inference chunk by chunk or token by token; a chunk's raws are dropped when the next chunk begins. So the model, the
cache, prefill and decoding are those of UniGist.

As in UniGist's comparison all parameters are trained. The original has projections of its own for beacons, keys
renumbered in each window, and ratios drawn from 2-32 in training; here beacons share the projections, positions are
those of the text, and the ratio is fixed. The learned sinks, which the original lacks, are its too.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Array, Float

from unigist_jax.inference import prefill as gist_prefill
from unigist_jax.inference.cache import GistCache
from unigist_jax.model import Llama


def prefill(model: Llama, prompts: Sequence[Sequence[int]], **options) -> tuple[Float[Array, "B V"], GistCache]:
    """As `unigist_jax.inference.prefill`. Raises ValueError for a layout without chunks."""
    if not (options.get("layout") or model.layout).chunk:
        raise ValueError(
            "activation_beacon needs chunks, but the layout has none; train with --config.method=activation_beacon"
        )
    return gist_prefill.prefill(model, prompts, **options)
