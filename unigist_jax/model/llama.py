"""Llama 3 with gists, in flax.nnx.

Axis legend
  B  batch          L  layers           E  hidden size        V  vocabulary
  T  raws of a row  U  units, T = r*U   P  positions, (r+1)*U, stored gist-shifted [ T raws | U gists ]
  s  sinks          Hkv KV heads        D  head dim

The gist-shifted segment is the layout of the whole network: it is assembled once, at the embedding, and taken apart
once, before the head. The sinks are a stream of their own without a batch axis: each layer computes their keys and
values once for all rows, and gradients reach them summed over the batch.

  tokens --embed--> [ raws | gists ] --layer 0--> … --layer L-1--> raws --norm, head--> logits
                          |  ^ sink K, V
  sink embeddings --------+--+---- layer 0 --> … (the same weights)
"""

from __future__ import annotations

from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import Offloadable, Recompute
from jaxtyping import Array, Float, Int

from pallas_kernels.backends import RESIDUALS
from unigist_jax.context import ONE_DEVICE, Placement
from unigist_jax.layout import GistLayout, assemble_segment, segment_positions, sink_positions, split_segment
from unigist_jax.model.attention import INPUTS, full_attention, placed_attention, sink_attention
from unigist_jax.model.config import Attention, LlamaConfig
from unigist_jax.model.gist_init import initial_embeddings
from unigist_jax.model.layers import GATE, DecoderLayer, RMSNorm, Rotary, head_product, rotary
from unigist_jax.model.summaries import summary_pass
from unigist_jax.sharding import constrain

_named_inputs = jax.checkpoint_policies.save_only_these_names(INPUTS)
_named_residuals = jax.checkpoint_policies.save_only_these_names(RESIDUALS)


def _is_residual(primitive, *args, **params):
    """Whether these are attention's output and log-sum-exp; cuDNN's carry no name, so its primitive tells."""
    return primitive.name.startswith("dot_product_attention_fwd") or _named_residuals(primitive, *args, **params)


def _save_attention(primitive, *args, **params):
    """Keeps what attention's backward pass reads."""
    return _is_residual(primitive, *args, **params) or _named_inputs(primitive, *args, **params)


def _offload_attention(primitive, *args, **params):
    """Moves attention's output and log-sum-exp to the host until the backward pass; what goes in comes anew."""
    return Offloadable("device", "pinned_host") if _is_residual(primitive, *args, **params) else Recompute


_REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": _save_attention,
    "attention_output": _is_residual,
    "attention_offload": _offload_attention,
    "attention_gate": jax.checkpoint_policies.save_from_both_policies(
        _save_attention, jax.checkpoint_policies.save_only_these_names(GATE)
    ),
    "dots": jax.checkpoint_policies.save_from_both_policies(
        _save_attention, jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
}


class Llama(nnx.Module):
    """A Llama 3 decoder with learned sinks and one learned gist embedding. A pytree: pass it to `jax.jit` as it is.

    Attributes:
      config, layout: static. `layout` is what the weights were trained for; methods take another ratio or window.
      embedding [V, E], gist_embedding [E], sink_embedding [s, E], head [E, V] (None if tied), norm.
      layers: one `DecoderLayer` whose parameters have a leading axis L; for inference, a list of L of them.
    """

    def __init__(self, config: LlamaConfig, layout: GistLayout, *, rngs: nnx.Rngs):
        self.config, self.layout = config, layout
        init = nnx.initializers.normal(0.02, dtype=config.param_dtype)
        vocabulary = init(rngs.params(), (config.vocab_size, config.hidden_size))
        self.embedding = nnx.Param(vocabulary)

        def gist_init(*shape):
            by_mean, by_rows = partial(jnp.mean, vocabulary, axis=0), vocabulary.__getitem__
            return initial_embeddings(config, rngs.params(), shape, by_mean, by_rows).astype(config.param_dtype)

        self.gist_embedding = nnx.Param(gist_init(config.hidden_size))
        self.sink_embedding = nnx.Param(gist_init(layout.num_sinks, config.hidden_size))
        self.layers = DecoderLayer(config, (config.num_layers,), rngs=rngs)
        self.norm = RMSNorm(config)
        if config.tie_embeddings:
            self.head = None
        else:
            self.head = nnx.Param(init(rngs.params(), (config.hidden_size, config.vocab_size)))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        doc_start: Int[Array, "B U"] | None = None,
        *,
        attention: Attention | None = None,
        layout: GistLayout | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of the next token at every raw, float32, in one pass. Arguments as for `hidden_states`."""
        return self.logits(self.hidden_states(tokens, doc_start, attention=attention, layout=layout))

    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        doc_start: Int[Array, "B U"] | None = None,
        *,
        attention: Attention | None = None,
        layout: GistLayout | None = None,
        placement: Placement = ONE_DEVICE,
    ) -> Float[Array, "B T E"]:
        """Final hidden states of the raws, before the last norm, in one pass.

        Args:
          tokens: raw tokens of whole units.
          doc_start: first unit of each unit's document, for packed rows; None for one document a row.
          attention: "gist", "full" or "autocompressors" in place of the config's.
          layout: another ratio or window than the model's own (the sinks must be the same).
          placement: of the rows on the mesh's context axis; `tokens` and the result are in placed order, `doc_start`
            is not.

        Raises:
          ValueError: for tokens or document starts of another shape, a T that is not a multiple of the ratio or does
            not cut into the placement's pieces, or an unknown `attention`.
        """
        layout = self.checked_layout(layout)
        attention = attention or self.config.attention
        if attention not in get_args(Attention):
            raise ValueError(f"attention={attention!r} is unknown; choose one of {get_args(Attention)}")
        if tokens.ndim != 2 or not tokens.size or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens have shape {tokens.shape} and dtype {tokens.dtype}, expected integers [B, T], one raw or more"
            )
        units = tokens.shape[0], layout.num_units(tokens.shape[1])
        if doc_start is not None and doc_start.shape != units:
            raise ValueError(f"doc_start has shape {doc_start.shape}, expected one entry a unit: {units}")
        if attention != "gist" and placement.devices > 1:
            raise ValueError(
                f"attention={attention!r} has no context parallelism (context={placement.devices}); use fsdp or tensor"
            )
        if attention == "full":
            return self._full_pass(tokens, doc_start, layout)
        if attention == "autocompressors":
            return summary_pass(self, tokens, doc_start, layout)
        return self._gist_pass(tokens, doc_start, layout, placement)

    def _gist_pass(self, tokens, doc_start, layout, placement):
        units, batch = placement.piece_units(layout, tokens.shape[1]), tokens.shape[0]
        starts = doc_start
        if starts is not None:
            starts = placement.place(starts).reshape(batch, placement.pieces, units)
        positions = segment_positions(layout, units, placement.order * units, starts)
        angles = rotary(self.config, positions.reshape(-1, placement.pieces * positions.shape[-1]))

        def body(streams, layer):
            x, sinks = streams
            sinks, sink_kv = self.sink_layer(layer, sinks)

            def attend(q, k, v):
                backend = self.config.attention_backend
                return placed_attention(q, k, v, sink_kv, layout, placement, doc_start, backend), None

            x, _ = layer(constrain(x, "batch", "positions", None), angles, attend)
            return (x, sinks), None

        # pieces stay an axis of their own: merged with the batch, both would be gathered
        raws = self.embed(tokens.reshape(batch, placement.pieces, -1))
        gists = jnp.broadcast_to(self.embed_gists(1, units), (batch, placement.pieces, units, raws.shape[-1]))
        pieces = assemble_segment(raws, gists, layout, axis=2)
        streams = pieces.reshape(batch, -1, pieces.shape[-1]), self.embed_sinks()
        x, _ = self._through_layers(body, streams)
        raws, _ = split_segment(x.reshape(pieces.shape), layout, axis=2)
        return raws.reshape(batch, -1, x.shape[-1])

    def _full_pass(self, tokens, doc_start, layout):
        begin = None if doc_start is None else jnp.repeat(doc_start * layout.ratio, layout.ratio, axis=1)
        angles = rotary(self.config, jnp.arange(tokens.shape[1]) - (0 if begin is None else begin))
        return self.causal_pass(self.embed(tokens), angles, begin, layout.ratio)

    def causal_pass(
        self, x: Float[Array, "B P E"], angles: Rotary, begin: Int[Array, "B P"] | None = None, unit: int = 1
    ) -> Float[Array, "B P E"]:
        """Embeddings through all layers under causal attention; `begin`, `unit`: see `full_attention`."""

        def body(x, layer):
            x = constrain(x, "batch", None, None)
            return layer(x, angles, lambda q, k, v: (full_attention(q, k, v, begin, unit), None))

        return self._through_layers(body, x)

    def _through_layers(self, body, carry):
        """`(carry, layer) -> (carry, None)` over all layers: a scan over the stack, a loop over layers taken apart."""
        if self.config.remat != "none":
            body = jax.checkpoint(body, policy=_REMAT[self.config.remat], prevent_cse=False)
        if self.is_stacked:
            return jax.lax.scan(body, carry, self.layers)[0]
        for layer in self.layers:
            carry, _ = body(carry, layer)
        return carry

    # --- parts that inference shares with the one-pass forms --------------------------------------------------------

    def checked_layout(self, layout: GistLayout | None) -> GistLayout:
        """`layout`, or the model's own for None. Raises ValueError if it has other sinks than the weights."""
        if layout is not None and layout.num_sinks != self.layout.num_sinks:
            raise ValueError(f"layout has num_sinks={layout.num_sinks}, the weights {self.layout.num_sinks}")
        return layout or self.layout

    def embed(self, tokens: Int[Array, "*B T"]) -> Float[Array, "*B T E"]:
        """Embeddings of raw tokens, in the compute dtype."""
        if not self.is_stacked:  # the table is split by columns (`for_inference`): what is gathered are a few rows
            return constrain(self.embedding[...][tokens].astype(self.config.dtype), "batch", None, None)
        # rows of the table are looked up where they are wanted: the hidden axis is gathered first, as any weight's is
        return constrain(self.embedding[...], "vocab", None)[tokens].astype(self.config.dtype)

    def embed_gists(self, batch: int, units: int) -> Float[Array, "B U E"]:
        """The gist embedding, once a unit."""
        gist = constrain(self.gist_embedding[...], None).astype(self.config.dtype)
        return jnp.broadcast_to(gist, (batch, units, self.config.hidden_size))

    def embed_segment(self, tokens: Int[Array, "B T"], layout: GistLayout) -> Float[Array, "B P E"]:
        """Raws and one gist a unit, gist-shifted."""
        gists = self.embed_gists(tokens.shape[0], layout.num_units(tokens.shape[1]))
        return assemble_segment(self.embed(tokens), gists, layout, axis=1)

    def embed_sinks(self) -> Float[Array, "1 s E"]:
        """The sinks' embeddings, of a stream that all rows share."""
        return self.sink_embedding[...][None].astype(self.config.dtype)

    def sink_layer(self, layer: DecoderLayer, sinks: Float[Array, "1 s E"]):
        """The sinks through one layer: their new hidden states, and their keys and values [s, Hkv, D]."""
        angles = rotary(self.config, sink_positions(self.layout))
        return layer(sinks, angles, lambda q, k, v: (sink_attention(q, k, v), (k[0], v[0])))

    @property
    def is_stacked(self) -> bool:
        """Whether the layers are one module of stacked weights, or a list (`unigist_jax.inference.for_inference`)."""
        return isinstance(self.layers, DecoderLayer)

    def layer(self, index: int) -> DecoderLayer:
        """Layer `index` by itself."""
        return jax.tree.map(lambda stacked: stacked[index], self.layers) if self.is_stacked else self.layers[index]

    def layer_arguments(self, index: int) -> tuple[DecoderLayer, np.int32 | None]:
        """One layer as arguments of a jitted function that takes it up with `taken_layer`: compiled once for all.

        The layer itself, or where layers are stacked the stack and the index in it.
        """
        return (self.layers, np.int32(index)) if self.is_stacked else (self.layers[index], None)

    def logits(self, hidden: Float[Array, "B T E"]) -> Float[Array, "B T V"]:
        """Final norm and head: float32 logits."""
        x = self.norm(hidden)
        head = self.embedding[...].T if self.head is None else self.head[...]
        return head_product(x, head.astype(x.dtype))


def taken_layer(layers: DecoderLayer, index: Int[Array, ""] | None) -> DecoderLayer:
    """The layer that `Llama.layer_arguments` passed."""
    if index is None:
        return layers
    return jax.tree.map(lambda stack: jax.lax.dynamic_index_in_dim(stack, index, keepdims=False), layers)


@partial(jax.jit, static_argnames=("config", "layout"))
def init_llama(config: LlamaConfig, layout: GistLayout, seed: int | Int[Array, ""]) -> Llama:
    """A freshly initialised model from an integer seed."""
    return Llama(config, layout, rngs=nnx.Rngs(params=jax.random.key(seed)))
