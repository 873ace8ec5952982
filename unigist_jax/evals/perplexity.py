"""Held-out perplexity, over packed rows and by position in the document.

Axis legend
  B  documents of a batch      N  documents      T  raws of a document      C  raws of a chunk

By position is the boundary test: read chunk by chunk, as at inference, a method that treats chunks apart jumps at every
chunk border. UniGist computes the same function for any chunking, so its curve must not know where they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int32

from unigist_jax.data import PackedRows, Tokenizer, eval_batches
from unigist_jax.inference.cache import GistCache
from unigist_jax.inference.prefill import check_chunk_size, prefill_chunk
from unigist_jax.layout import GistLayout
from unigist_jax.model import Llama
from unigist_jax.training.loss import token_losses

LOSS_CHUNK = 512


def packed_perplexity(
    model: Llama, rows: PackedRows, *, attention: str, batch_size: int = 8, layout: GistLayout | None = None
) -> dict[str, float]:
    """Mean loss (nats a token), perplexity and targets over packed rows, each document seeing only itself."""
    total = count = 0.0
    for batch in eval_batches(rows, batch_size):
        losses = _one_pass_losses(model, batch["tokens"], batch["doc_start"], attention=attention, layout=layout)
        total += float(np.sum(np.asarray(losses), where=batch["loss_mask"], dtype=np.float64))
        count += int(batch["loss_mask"].sum())
    return {"loss": total / count, "perplexity": math.exp(total / count), "targets": count}


def long_documents(texts: Iterable[str], tokenizer: Tokenizer, length: int, most: int) -> Int32[np.ndarray, "N T"]:
    """The first `length` tokens of up to `most` documents that have so many.

    Raises:
      ValueError: if no document is that long.
    """
    found: list[np.ndarray] = []
    longest = 0
    for text in texts:
        tokens = tokenizer.encode(text, bos=True)
        longest = max(longest, len(tokens))
        if len(tokens) >= length:
            found.append(tokens[:length])
        if len(found) == most:
            break
    if not found:
        raise ValueError(f"no held-out document has {length} tokens, the longest {longest}; evaluate a shorter length")
    return np.stack(found)


def losses_by_position(
    model: Llama,
    documents: Int32[np.ndarray, "N T"],
    *,
    attention: str,
    chunk_size: int | None = None,
    gist_dtype: str | None = None,
    layout: GistLayout | None = None,
    batch_size: int = 8,
) -> Float[np.ndarray, " T1"]:
    """Mean loss (nats) of the token at each position 1 … T - 1 of documents read from their beginning.

    Args:
      documents: raw tokens; T a multiple of the ratio.
      attention: "gist", "full" or "autocompressors".
      chunk_size: reads through the compressed cache in chunks of so many raws; None: in one pass.
      gist_dtype: what the cache rounds gists to (`GistCache.create`).
      layout: another ratio or window than the model's.

    Raises:
      ValueError: for chunked reading without gists, or a chunk size that is not a multiple of the ratio.
    """
    layout = model.checked_layout(layout)
    if chunk_size is not None:
        if attention != "gist":
            raise ValueError(f"chunked reading needs attention='gist', not {attention!r}, which one pass reads")
        check_chunk_size(chunk_size, layout)
    total = np.zeros(documents.shape[1])
    for start in range(0, len(documents), batch_size):
        batch = documents[start : start + batch_size]
        if chunk_size is None:
            losses = _one_pass_losses(model, batch, None, attention=attention, layout=layout)
        else:
            losses = _chunked_losses(model, batch, chunk_size, layout, gist_dtype)
        total += np.asarray(losses, np.float64).sum(0)
    return (total / len(documents))[:-1]


def bucketed(losses: Float[np.ndarray, " T1"], bucket: int) -> dict[str, list[Any]]:
    """Perplexity of buckets of neighbouring positions: their first positions, and exp of their mean loss."""
    starts = list(range(0, len(losses), bucket))
    return {
        "position": [1 + start for start in starts],
        "perplexity": [math.exp(float(losses[start : start + bucket].mean())) for start in starts],
    }


def border_jump(losses: Float[np.ndarray, " T1"], chunk_size: int, reach: int) -> float:
    """How much more the `reach` tokens after each chunk border cost than the `reach` before it, nats, over all borders.

    `losses[i]` belongs to position i + 1. Positive: the method forgets at borders.
    """
    borders = range(chunk_size, len(losses) + 2 - reach, chunk_size)
    if not borders:
        raise ValueError(f"{len(losses) + 1} positions hold no border of chunks of {chunk_size}; use a smaller chunk")
    after = [losses[border - 1 : border - 1 + reach].mean() for border in borders]
    before = [losses[max(0, border - 1 - reach) : border - 1].mean() for border in borders]
    return float(np.mean(after) - np.mean(before))


@partial(jax.jit, static_argnames=("attention", "layout"))
def _one_pass_losses(model, tokens, doc_start, *, attention, layout):
    hidden = model.hidden_states(tokens, doc_start, attention=attention, layout=layout)
    return token_losses(model, hidden, tokens, min(LOSS_CHUNK, tokens.shape[1]))


def _chunked_losses(model: Llama, tokens: np.ndarray, chunk_size: int, layout: GistLayout, gist_dtype: str | None):
    """Losses of documents read through the compressed cache, chunk by chunk."""
    batch, length = tokens.shape
    cache = GistCache.create(model, batch, length, layout, gist_dtype)
    lengths = jnp.full((batch,), length, jnp.int32)
    hidden = []
    for start in range(0, length, chunk_size):
        chunk = jnp.asarray(tokens[:, start : start + chunk_size])
        states, cache = prefill_chunk(model, cache, chunk, jnp.int32(start // layout.ratio), lengths)
        hidden.append(states)
    return _head_losses(model, jnp.concatenate(hidden, axis=1), tokens)


_head_losses: Callable = jax.jit(
    lambda model, hidden, tokens: token_losses(model, hidden, tokens, min(LOSS_CHUNK, tokens.shape[1]))
)
