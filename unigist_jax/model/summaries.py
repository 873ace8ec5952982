"""AutoCompressors (Chevalier et al., arXiv 2305.14788): a chunk's content as the hidden states of summary tokens.

Axis legend
  B  batch      T  raws of a row      C  raws of a chunk      n  summary tokens of a chunk      E  hidden size

  chunk 0:  [ x0 … | S ]                     S: n learned embeddings. Their final hidden states are the summary σ0,
  chunk 1:  [ σ0 | x … | S ]                 which stands as n input embeddings in front of all later chunks,
  chunk 2:  [ σ0 σ1 | x … ]                  together with those of the chunks between; nothing else passes over.

The learned embeddings are the layout's sinks (`num_sinks` = n), so the compression ratio is C / n. Positions are those
within the input. Gradients are cut in front of every second chunk. In packed rows chunks are cut where they are in the
row: the first chunk of a document may be shorter than C (the original draws lengths at random).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from unigist_jax.layout import GistLayout
from unigist_jax.model.layers import rotary

if TYPE_CHECKING:
    from unigist_jax.model.llama import Llama

CHUNKS_OF_GRADIENT = 2


def summary_pass(
    model: Llama, tokens: Int[Array, "B T"], doc_start: Int[Array, "B U"] | None, layout: GistLayout
) -> Float[Array, "B T E"]:
    """Final hidden states of the raws, before the last norm; `doc_start` None: one document a row.

    Raises ValueError for a layout without chunks or sinks.
    """
    check_summaries(layout)
    summaries = jnp.zeros((tokens.shape[0], 0, model.config.hidden_size), model.config.dtype)
    hidden = []
    for index, start in enumerate(range(0, tokens.shape[1], layout.chunk)):
        if index % CHUNKS_OF_GRADIENT == 0:
            summaries = jax.lax.stop_gradient(summaries)
        begin = None if doc_start is None else _first_visible(doc_start, layout, start)
        is_last = start + layout.chunk >= tokens.shape[1]
        chunk = tokens[:, start : start + layout.chunk]
        states, summary = read_chunk(model, summaries, chunk, begin, summarise=not is_last)
        hidden.append(states)
        summaries = jnp.concatenate([summaries, summary], axis=1)
    return jnp.concatenate(hidden, axis=1)


def _first_visible(doc_start: Int[Array, "B U"], layout: GistLayout, start: int) -> Int[Array, "B SC"]:
    """First position that each summary held before raw `start`, and each raw of the chunk there, sees."""
    chunk, count = layout.chunk, layout.num_sinks
    first_raw = jnp.repeat(doc_start * layout.ratio, layout.ratio, axis=1)
    held, first = start // chunk * count, first_raw[:, start : start + chunk]
    # a summary belongs to the document at its chunk's end, and sees that document's earlier ones
    of_summaries = jnp.repeat(first_raw[:, chunk - 1 : start : chunk] // chunk * count, count, axis=1)
    of_raws = jnp.where(first >= start, held + first - start, first // chunk * count)
    return jnp.concatenate([of_summaries, of_raws], axis=1)


def read_chunk(
    model: Llama,
    summaries: Float[Array, "B S E"],
    tokens: Int[Array, "B C"],
    begin: Int[Array, "B SC"] | None = None,
    summarise: bool = True,
) -> tuple[Float[Array, "B C E"], Float[Array, "B n E"]]:
    """One chunk behind the summaries of those before it.

    Args:
      begin: first position that each summary and each raw sees; the chunk's own summary sees what its last raw does.
        None: all see everything before them.
      summarise: False reads the raws alone, and gives an empty summary.

    Returns:
      Final hidden states of the raws, before the last norm, and the chunk's summary.
    """
    batch, held = summaries.shape[:2]
    x = [summaries, model.embed(tokens)]
    if summarise:
        own = model.embed_sinks()
        x.append(jnp.broadcast_to(own, (batch, *own.shape[1:])))
        if begin is not None:
            begin = jnp.concatenate([begin, jnp.repeat(begin[:, -1:], own.shape[1], axis=1)], axis=1)
    x = jnp.concatenate(x, axis=1)
    x = model.causal_pass(x, rotary(model.config, jnp.arange(x.shape[1])), begin)
    end = held + tokens.shape[1]
    return x[:, held:end], model.norm(x[:, end:])


def check_summaries(layout: GistLayout) -> None:
    """Raises ValueError for a layout without chunks or without summary tokens."""
    if not layout.chunk or not layout.num_sinks:
        raise ValueError(
            f"AutoCompressors need chunks and summary tokens: gist.chunk={layout.chunk} and "
            f"gist.num_sinks={layout.num_sinks} must be positive; method='autocompressors' sets them"
        )
