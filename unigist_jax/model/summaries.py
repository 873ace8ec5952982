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
    model: Llama, tokens: Int[Array, "B T"], doc_start: Int[Array, "B U"], layout: GistLayout
) -> Float[Array, "B T E"]:
    """Final hidden states of the raws, before the last norm. Raises ValueError for a layout without chunks or sinks."""
    check_summaries(layout)
    chunk, count = layout.chunk, layout.num_sinks
    first_raw = jnp.repeat(doc_start * layout.ratio, layout.ratio, axis=1)
    # a summary belongs to the document at its chunk's end, and sees that document's earlier ones
    of_summaries = jnp.repeat(first_raw[:, chunk - 1 :: chunk] // chunk * count, count, axis=1)
    summaries = jnp.zeros((tokens.shape[0], 0, model.config.hidden_size), model.config.dtype)
    hidden = []
    for index, start in enumerate(range(0, tokens.shape[1], chunk)):
        if index % CHUNKS_OF_GRADIENT == 0:
            summaries = jax.lax.stop_gradient(summaries)
        held, first = summaries.shape[1], first_raw[:, start : start + chunk]
        begin = jnp.where(first >= start, held + first - start, first // chunk * count)
        is_last = start + chunk >= tokens.shape[1]
        states, summary = read_chunk(
            model,
            summaries,
            tokens[:, start : start + chunk],
            jnp.concatenate([of_summaries[:, :held], begin], axis=1),
            summarise=not is_last,
        )
        hidden.append(states)
        summaries = jnp.concatenate([summaries, summary], axis=1)
    return jnp.concatenate(hidden, axis=1)


def read_chunk(
    model: Llama,
    summaries: Float[Array, "B S E"],
    tokens: Int[Array, "B C"],
    begin: Int[Array, "B SC"],
    summarise: bool = True,
) -> tuple[Float[Array, "B C E"], Float[Array, "B n E"]]:
    """One chunk behind the summaries of those before it.

    Args:
      begin: first position that each summary and each raw sees; the chunk's own summary sees what its last raw does.
      summarise: False reads the raws alone, and gives an empty summary.

    Returns:
      Final hidden states of the raws, before the last norm, and the chunk's summary.
    """
    batch, held = summaries.shape[:2]
    x = [summaries, model.embed(tokens)]
    if summarise:
        own = model.embed_sinks()
        x.append(jnp.broadcast_to(own, (batch, *own.shape[1:])))
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
