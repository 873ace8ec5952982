"""AutoCompressors at inference: whole chunks become summaries, the rest of the context and what follows stays raw.

Axis legend
  B  batch      C  raws of a chunk      n  summary tokens of a chunk      R  raws behind the last whole chunk
  P  = m * n slots of summaries, m the most whole chunks of any sequence      E  hidden size      V  vocabulary

Summaries are input embeddings: what is cached are the keys and values that they have in every layer, and those of the
raws behind them. That is a `CompressedCache`, whose kept keys are the summaries' and whose positions moved back.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from unigist_jax.baselines.compressed import PAGE, CompressedCache, KeptKV
from unigist_jax.layout import GistLayout
from unigist_jax.model import Llama
from unigist_jax.model.attention import full_attention
from unigist_jax.model.layers import rotary
from unigist_jax.model.summaries import check_summaries, read_chunk
from unigist_jax.prompts import check_prompts, pad_prompts


def prefill(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    capacity: int | None = None,
    chunk_size: int | None = None,
    layout: GistLayout | None = None,
) -> tuple[Float[Array, "B V"], CompressedCache]:
    """Reads prompts; arguments and errors as for `unigist_jax.inference.prefill`.

    `chunk_size` means nothing here: chunks are those of the layout, and change the result.
    """
    layout = model.checked_layout(layout)
    check_summaries(layout)
    lengths = check_prompts(prompts, model.config.vocab_size, capacity)
    whole = lengths // layout.chunk
    most, raws = int(whole.max()), lengths - whole * layout.chunk
    tokens = pad_prompts(prompts, max(most * layout.chunk, int(lengths.max())))
    batch = len(prompts)
    summaries = jnp.zeros((batch, 0, model.config.hidden_size), model.config.dtype)
    ends = jnp.zeros((batch, model.config.hidden_size), model.config.dtype)
    for start in range(0, most * layout.chunk, layout.chunk):
        last, summaries = _next_summary(model, summaries, jnp.asarray(tokens[:, start : start + layout.chunk]))
        ends = jnp.where(jnp.asarray(lengths == start + layout.chunk)[:, None], last, ends)
    tail = max(capacity or 0, int(lengths.max())) - int(whole.min()) * layout.chunk
    rest = np.zeros((batch, -(-max(1, int(raws.max())) // PAGE) * PAGE), np.int32)
    for row, prompt, start, count in zip(rest, prompts, whole * layout.chunk, raws, strict=True):
        row[:count] = prompt[start:]
    hidden, layers = _read_rest(model, summaries, jnp.asarray(rest), jnp.asarray(whole), layout.num_sinks, tail)
    at_rest = hidden[jnp.arange(batch), np.maximum(raws - 1, 0)]
    ends = jnp.where(jnp.asarray(raws == 0)[:, None], ends, at_rest)
    context, length = whole * layout.chunk, jnp.asarray(lengths)
    shift = jnp.asarray(context - whole * layout.num_sinks)
    return _logits(model, ends), CompressedCache(layers, jnp.asarray(context), shift, length, even=True)


@jax.jit
def _next_summary(model, summaries, tokens):
    """The last raw's hidden state [B, E] of a chunk, and the summaries with the chunk's."""
    states, summary = read_chunk(model, summaries, tokens)
    return states[:, -1], jnp.concatenate([summaries, summary], axis=1)


@partial(jax.jit, static_argnames=("count", "tail"))
def _read_rest(model, summaries, tokens, whole, count, tail):
    """Hidden states [B, R, E] of the raws behind the whole chunks, and every layer's cache.

    Summaries [B, P, E] are shifted to the right end of their slots, so that each raw sees one run of positions.
    """
    (batch, slots), heads = summaries.shape[:2], model.config.num_kv_heads
    empty = slots - whole * count
    source = jnp.maximum(jnp.arange(slots) - empty[:, None], 0)
    x = jnp.concatenate([jnp.take_along_axis(summaries, source[..., None], axis=1), model.embed(tokens)], axis=1)
    angles = rotary(model.config, jnp.arange(x.shape[1]) - empty[:, None])
    begin = jnp.broadcast_to(empty[:, None], x.shape[:2])
    first = slots * jnp.arange(heads, dtype=jnp.int32) + empty[:, None]
    layers = []
    for index in range(model.config.num_layers):

        def attend(q, k, v):
            kept = (jnp.swapaxes(y[:, :slots], 1, 2).reshape(batch, heads * slots, y.shape[-1]) for y in (k, v))
            raws = (y[:, slots : slots + tail] for y in (k, v))
            tails = (jnp.pad(y, [(0, 0), (0, tail - y.shape[1]), (0, 0), (0, 0)]) for y in raws)
            counts = jnp.broadcast_to((whole * count)[:, None], (batch, heads))
            return full_attention(q, k, v, begin), KeptKV(*kept, first, counts, *tails)

        x, layer = model.layer(index)(x, angles, attend)
        layers.append(layer)
    return x[:, slots:], tuple(layers)


_logits = jax.jit(lambda model, hidden: model.logits(hidden[:, None])[:, 0])
