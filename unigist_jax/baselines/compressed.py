"""What training-free baselines share: full attention reads the context, most keys are dropped, decoding reads the rest.

Axis legend
  B  batch        N  padded context     H  KV heads (A query heads each, Hq = H * A)     D  head dim
  S  kept slots   M  tail slots         V  vocabulary

A layer's keys are dropped as soon as it has run, so the whole context's keys exist for one layer at a time. What is
read later (a question, generated tokens) is not compressed: it goes to the tail.

  policies that keep as many keys in each head   kept [B, H, S / H, D] | tail     (stored flat, [B, S, D])
  policies that share a layer's budget           kept [B, S, D]: head 0's keys, head 1's, …, of different numbers

So a head that keeps few keys leaves room to the others, and nothing is held that is not read. Slots are allocated in
pages of `PAGE`, so that prompts of nearly the same length share one compiled program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from unigist_jax.layout import GistLayout
from unigist_jax.model import Llama
from unigist_jax.model.attention import full_attention, rotate
from unigist_jax.model.layers import rotary
from unigist_jax.prompts import check_prompts, pad_prompts
from unigist_jax.rows import select_rows

PAGE = 16  # slots of a KV head are allocated in multiples of it
CONTEXT_STEP = 256  # contexts are padded to a multiple of it, unless that passes the capacity


class Policy(NamedTuple):
    """What a training-free method keeps.

    Attributes:
      score: `(q [B, N, Hq, D], k [B, N, H, D], lengths [B]) -> float32 [B, H, N]`, both rotated: the keys of the
        highest scores are kept. Keys at or after a length need no score.
      budgets: `(length, ratio, num_layers) -> keys a head to keep in each layer, on average over its heads`.
      protected: share of each head's budget that is its own; the rest of a layer's goes to its best keys over all
        heads. None: each head keeps its budget.
      renumber: kept keys are turned to the positions 0, 1, …, and what follows continues there.
    """

    score: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    budgets: Callable[[int, int, int], list[int]]
    protected: float | None = None
    renumber: bool = False


def even_budgets(length: int, ratio: int, num_layers: int) -> list[int]:
    """`length / ratio` keys in every layer, rounded down, at least 1."""
    return [max(1, length // ratio)] * num_layers


class KeptKV(NamedTuple):
    """One layer's keys (rotated) and values: those kept of the context, and the tail."""

    k: Float[Array, "B S D"]
    v: Float[Array, "B S D"]
    first: Int32[Array, "B H"]  # slot of each head's first key
    count: Int32[Array, "B H"]  # how many keys each head keeps
    tail_k: Float[Array, "B M H D"]
    tail_v: Float[Array, "B M H D"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompressedCache:
    """A cache of kept keys and a tail.

    Attributes:
      layers: one `KeptKV` a layer; their slots may differ.
      context: raws of each sequence that were read before compression.
      shift: how far positions moved back when keys were renumbered; else 0.
      length: raws seen so far by each sequence.
      even: static; each head has as many slots as the others.
    """

    layers: tuple[KeptKV, ...]
    context: Int32[Array, " B"]
    shift: Int32[Array, " B"]
    length: Int32[Array, " B"]
    even: bool = dataclasses.field(metadata={"static": True})

    @property
    def capacity(self) -> int:
        """Raws that each sequence can hold, those of the longest context at least."""
        return int(jnp.min(self.context)) + self.layers[0].tail_k.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, as allocated."""
        return sum(x.nbytes for layer in self.layers for x in (layer.k, layer.v, layer.tail_k, layer.tail_v))

    def select(self, rows: Sequence[int]) -> CompressedCache:
        """A copy that holds these sequences, in this order; repeats are allowed."""
        return select_rows(self, rows)


def prefill(
    policy: Policy,
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    capacity: int | None = None,
    chunk_size: int | None = None,
    layout: GistLayout | None = None,
) -> tuple[Float[Array, "B V"], CompressedCache]:
    """Reads contexts with full attention and keeps a `1 / ratio` of their keys; errors as for `inference.prefill`.

    Args:
      policy: what to keep.
      capacity: raws that each sequence may reach; those beyond its context go to the tail. None: no tail.
      chunk_size: means nothing here; the context is read at once.
      layout: its `ratio` is the compression ratio; None: the model's.
    """
    ratio = (layout or model.layout).ratio
    lengths = check_prompts(prompts, model.config.vocab_size, capacity)
    longest = int(lengths.max())
    capacity = capacity or longest
    padded = min(-(-longest // CONTEXT_STEP) * CONTEXT_STEP, max(capacity, longest))
    budgets = np.array([policy.budgets(int(n), ratio, model.config.num_layers) for n in lengths], np.int32)
    slots = tuple(min(-(-int(most) // PAGE) * PAGE, padded) for most in budgets.max(0))
    return _read(
        model,
        jnp.asarray(pad_prompts(prompts, padded)),
        jnp.asarray(lengths),
        jnp.asarray(budgets.T),
        policy=policy,
        slots=slots,
        tail=capacity - int(lengths.min()),
    )


@partial(jax.jit, static_argnames=("policy", "slots", "tail"))
def _read(model, tokens, lengths, budgets, *, policy, slots, tail):
    angles = rotary(model.config, jnp.arange(tokens.shape[1]))
    begin = jnp.zeros_like(tokens)
    x, layers = model.embed(tokens), []
    for index in range(model.config.num_layers):

        def attend(q, k, v, index=index):
            held = _keep(policy, policy.score(q, k, lengths), k, v, lengths, budgets[index], slots[index])
            if policy.renumber:
                held = _renumbered(held, model.config)
            nothing = jnp.zeros((k.shape[0], tail, *k.shape[2:]), k.dtype)
            return full_attention(q, k, v, begin), KeptKV(*held[:4], nothing, nothing)

        x, layer = model.layer(index)(x, angles, attend)
        layers.append(layer)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    shift = lengths - budgets[0] if policy.renumber else jnp.zeros_like(lengths)
    context, length = jnp.copy(lengths), jnp.copy(lengths)  # buffers of their own, so that each can be donated
    return model.logits(last)[:, 0], CompressedCache(tuple(layers), context, shift, length, policy.protected is None)


class _Held(NamedTuple):
    """`KeptKV`'s first fields, and the position that each slot's key had."""

    k: Float[Array, "B S D"]
    v: Float[Array, "B S D"]
    first: Int32[Array, "B H"]
    count: Int32[Array, "B H"]
    position: Int32[Array, "B S"]


def _keep(policy, score, k, v, lengths, budget, slots) -> _Held:
    """The keys of the highest scores, head by head and in the order of their positions."""
    heads, length = score.shape[1:]
    score = jnp.where(jnp.arange(length) < lengths[:, None, None], score.astype(jnp.float32), -jnp.inf)
    choose = kept_by_head if policy.protected is None else partial(kept_by_layer, protected=policy.protected)
    index, first, count = choose(score, budget, slots)  # into heads * length
    taken = (jnp.swapaxes(x, 1, 2).reshape(x.shape[0], heads * length, -1) for x in (k, v))
    kept = (jnp.take_along_axis(x, index[..., None], axis=1) for x in taken)
    return _Held(*kept, first, count, index % length)


def kept_by_head(
    score: Float[Array, "B H N"], budget: Int32[Array, " B"], slots: int
) -> tuple[Int32[Array, "B S"], Int32[Array, "B H"], Int32[Array, "B H"]]:
    """The `budget` best keys of each head: indices into [H * N], ascending; each head's first slot and its count."""
    batch, heads, length = score.shape
    _, best = jax.lax.top_k(score, slots)
    best = jnp.sort(jnp.where(jnp.arange(slots) < budget[:, None, None], best, length), axis=-1)
    index = jnp.minimum(best, length - 1) + length * jnp.arange(heads)[:, None]  # what is beyond the budget is not read
    first = jnp.broadcast_to(slots * jnp.arange(heads, dtype=jnp.int32), (batch, heads))
    return index.reshape(batch, -1), first, jnp.broadcast_to(budget[:, None], (batch, heads))


def kept_by_layer(
    score: Float[Array, "B H N"], budget: Int32[Array, " B"], slots: int, protected: float
) -> tuple[Int32[Array, "B S"], Int32[Array, "B H"], Int32[Array, "B H"]]:
    """The `H * budget` best keys over all heads, `protected` of its budget for each head first; as `kept_by_head`."""
    batch, heads, length = score.shape
    _, best = jax.lax.top_k(score, slots)
    safe = jnp.maximum(1, (budget * protected).astype(jnp.int32))  # keys that each head keeps
    rows = jnp.arange(batch)[:, None, None], jnp.arange(heads)[:, None]
    ranked = jnp.where(jnp.arange(slots) < safe[:, None, None], jnp.inf, jnp.take_along_axis(score, best, axis=-1))
    flat = score.at[(*rows, best)].set(ranked).reshape(batch, heads * length)
    _, best = jax.lax.top_k(flat, heads * slots)
    inside = jnp.arange(heads * slots) < heads * budget[:, None]
    index = jnp.sort(jnp.where(inside, best, heads * length), axis=-1)
    count = jnp.sum(index[:, None] // length == jnp.arange(heads)[:, None], axis=-1, dtype=jnp.int32)
    return jnp.minimum(index, heads * length - 1), jnp.cumsum(count, axis=-1) - count, count


def _renumbered(held: _Held, config) -> _Held:
    """The keys turned to positions 0, 1, … of each head."""
    slots, heads = held.k.shape[1], held.first.shape[1]
    new = jnp.arange(slots) % (slots // heads)
    angles = rotary(config, new - held.position)
    return held._replace(k=rotate(held.k[:, :, None], *angles)[:, :, 0])


def decode_logits(
    model: Llama, cache: CompressedCache, tokens: Int32[Array, " B"]
) -> tuple[Float[Array, "B V"], CompressedCache]:
    """Appends one token to the tail of every sequence; float32 logits of the next one."""
    rows, slot = jnp.arange(tokens.shape[0]), cache.length - cache.context
    angles = rotary(model.config, (cache.length - cache.shift)[:, None])
    x, layers = model.embed(tokens[:, None]), []
    for index, held in enumerate(cache.layers):

        def attend(q, k, v, held=held):
            new = held._replace(
                tail_k=held.tail_k.at[rows, slot].set(k[:, 0]), tail_v=held.tail_v.at[rows, slot].set(v[:, 0])
            )
            return kept_attention(q[:, 0], new, slot + 1, cache.even)[:, None], new

        x, layer = model.layer(index)(x, angles, attend)
        layers.append(layer)
    return model.logits(x)[:, 0], dataclasses.replace(cache, layers=tuple(layers), length=cache.length + 1)


def kept_attention(
    q: Float[Array, "B Hq D"], kv: KeptKV, tail_count: Int32[Array, " B"], even: bool
) -> Float[Array, "B Hq D"]:
    """Attention of one query a head over the head's kept keys and the first `tail_count` of the tail.

    Scores are float32. Where heads share slots, a query is multiplied with the slots of all heads and sees its own
    only: more products, but the keys are read once, where they lie.
    """
    heads = kv.first.shape[1]
    grouped = q.reshape(q.shape[0], heads, -1, q.shape[-1])
    slot = jnp.arange(kv.k.shape[1])
    kept_k, kept_v, kept_form = kv.k, kv.v, "bsd"
    if even:
        slot = slot.reshape(heads, len(slot) // heads)
        kept_k, kept_v = (x.reshape(x.shape[0], *slot.shape, x.shape[-1]) for x in (kv.k, kv.v))
        kept_form = "bhsd"
    begin, end = kv.first[..., None], (kv.first + kv.count)[..., None]
    in_tail = jnp.arange(kv.tail_k.shape[1]) < tail_count[:, None]

    def scores(form: str, keys: jax.Array, visible: Bool[Array, "B H keys"]):
        product = jnp.einsum(f"bhad,{form}->bhas", grouped, keys, preferred_element_type=jnp.float32)
        return jnp.where(visible[:, :, None], product * q.shape[-1] ** -0.5, -jnp.inf)

    visible_tail = jnp.broadcast_to(in_tail[:, None], (q.shape[0], heads, in_tail.shape[1]))
    both = [scores(kept_form, kept_k, (begin <= slot) & (slot < end)), scores("bshd", kv.tail_k, visible_tail)]
    weights = jax.nn.softmax(jnp.concatenate(both, axis=-1), axis=-1)
    of_kept, of_tail = (x.astype(q.dtype) for x in jnp.split(weights, [kv.k.shape[1] // (heads if even else 1)], -1))
    out = jnp.einsum(f"bhas,{kept_form}->bhad", of_kept, kept_v, preferred_element_type=jnp.float32)
    out += jnp.einsum("bhas,bshd->bhad", of_tail, kv.tail_v, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype)
