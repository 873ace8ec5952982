"""Gist attention: the oracle against the interleaved brute force, and `blocked` against the oracle."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brute_force import causal_order, dense_attention, interleaved_mask
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from pallas_kernels import GistKV, blocked, decode_attention, gist_attention
from pallas_kernels.blocked import BlockSizes, causal_attention
from unigist_jax.layout import GistLayout, assemble_segment, document_starts, split_segment, unit_starts

DIM = 8


def random_case(seed, layout, units, batch=1, num_heads=2, num_kv_heads=1, dtype=np.float32):
    """q of a whole context and its own KV, all float32 normal."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    q = normal(batch, layout.segment_length(units), num_heads, DIM)
    sinks = [normal(layout.num_sinks, num_kv_heads, DIM) for _ in range(2)]
    gists = [normal(batch, units, num_kv_heads, DIM) for _ in range(2)]
    raws = [normal(batch, units * layout.ratio, num_kv_heads, DIM) for _ in range(2)]
    return q, GistKV(*sinks, *gists, *raws)


# One compilation a shape; hypothesis draws the shape, the numbers, the documents and the cut.
SHAPES = [  # ratio, sinks, window, units, batch, query heads, KV heads, block sizes
    (1, 0, 0, 1, 1, 1, 1, (4, 4)),
    (1, 1, 3, 7, 2, 2, 1, (3, 5)),
    (2, 5, 4, 9, 1, 2, 2, (4, 4)),
    (3, 0, 9, 5, 2, 3, 1, (16, 8)),
    (4, 5, 0, 6, 1, 4, 2, (3, 5)),
    (8, 1, 8, 4, 2, 2, 2, (5, 16)),
]


class Case(NamedTuple):
    layout: GistLayout
    units: int
    block: BlockSizes
    q: jax.Array
    kv: GistKV
    doc_start: jax.Array


@st.composite
def cases(draw, shapes=SHAPES):
    ratio, sinks, window, units, batch, num_heads, num_kv_heads, block = draw(st.sampled_from(shapes))
    layout = GistLayout(ratio, sinks, window)
    ids = draw(st.lists(st.integers(0, 2), min_size=batch * units, max_size=batch * units))
    doc_start = jnp.asarray(document_starts(np.array(ids).reshape(batch, units)))
    q, kv = random_case(draw(st.integers(0, 99)), layout, units, batch, num_heads, num_kv_heads)
    return Case(layout, units, BlockSizes(*block), q, kv, doc_start)


@functools.cache
def compiled(layout, block=None, with_gradient=False):
    """`blocked` at a block size, or the oracle for block=None; with the gradients of its product with `weight`."""

    def attend(q, kv, first_unit, first_raw_unit, doc_start):
        if block is None:
            return gist_attention(q, kv, layout, first_unit, first_raw_unit, doc_start, backend="reference")
        num_units = layout.segment_units(q.shape[1])
        part = jax.lax.dynamic_slice_in_dim(doc_start, first_unit, num_units, axis=1)
        starts = unit_starts(layout, num_units, first_unit, part)
        return blocked.attend(q, kv, layout, first_unit, first_raw_unit, starts, block)

    def loss(q, kv, weight, *rest):
        out = attend(q, kv, *rest)
        return jnp.sum(out * weight), out

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True) if with_gradient else attend)


def dense_by_definition(case):
    """Brute force in causal order, back in stored order."""
    layout, units, _, q, kv, doc_start = case
    s, order = layout.num_sinks, causal_order(layout, units)
    outputs = []
    for b in range(q.shape[0]):
        mask = interleaved_mask(layout.ratio, s, layout.window, units, np.asarray(doc_start[b]))[s:]
        segment_k = assemble_segment(kv.raw_k[b], kv.gist_k[b], layout, axis=0)[order]
        segment_v = assemble_segment(kv.raw_v[b], kv.gist_v[b], layout, axis=0)[order]
        k, v = np.concatenate([kv.sink_k, segment_k]), np.concatenate([kv.sink_v, segment_v])
        out = np.zeros(q.shape[1:])
        out[order] = dense_attention(q[b][order], k, v, mask)
        outputs.append(out)
    return np.stack(outputs)


@given(cases())
def test_reference_is_the_definition(case):
    out = compiled(case.layout)(case.q, case.kv, 0, 0, case.doc_start)
    np.testing.assert_allclose(out, dense_by_definition(case), rtol=2e-5, atol=2e-6)


@given(cases())
def test_blocked_is_the_reference_forward_and_gradients(case):
    weight = jnp.asarray(np.random.default_rng(1).standard_normal(case.q.shape), jnp.float32)
    arguments = case.q, case.kv, weight, 0, 0, case.doc_start
    grads, out = compiled(case.layout, case.block, with_gradient=True)(*arguments)
    expected_grads, expected = compiled(case.layout, with_gradient=True)(*arguments)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=2e-6)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@given(case=cases(SHAPES[1:]), late=st.booleans())
def test_a_chunk_against_the_cache_is_that_part_of_one_pass(backend, case, late):
    """Rows 2 and 3 of the op's table: queries of later units, gists at capacity, raws from k units before."""
    layout, units, block, q, kv, doc_start = case
    cut = units - 1 if late else units // 2
    whole = split_segment(compiled(layout)(q, kv, 0, 0, doc_start), layout, axis=1)
    raw_q, gist_q = split_segment(q, layout, axis=1)
    chunk_q = assemble_segment(raw_q[:, cut * layout.ratio :], gist_q[:, cut:], layout, axis=1)
    first_raw_unit = max(0, cut - layout.window_units)

    def with_garbage(x):  # a cache has room for gists that are not there yet
        return jnp.pad(x, [(0, 0), (0, 3), (0, 0), (0, 0)], constant_values=1e9)

    chunk_kv = kv._replace(
        gist_k=with_garbage(kv.gist_k),
        gist_v=with_garbage(kv.gist_v),
        raw_k=kv.raw_k[:, first_raw_unit * layout.ratio :],
        raw_v=kv.raw_v[:, first_raw_unit * layout.ratio :],
    )
    attend = compiled(layout, block if backend == "blocked" else None)
    out = attend(chunk_q, chunk_kv, cut, first_raw_unit, jnp.pad(doc_start, [(0, 0), (0, 3)]))
    raws, gists = split_segment(out, layout, axis=1)
    np.testing.assert_allclose(raws, whole[0][:, cut * layout.ratio :], rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(gists, whole[1][:, cut:], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("window", "spare"), [(0, 0), (4, 0), (8, 3)])
def test_decode_is_the_last_row_of_one_pass(window, spare):
    """Row 4: every raw (and the gist it completes) from the ring equals that row of the whole context."""
    layout, units = GistLayout(2, 3, window), 9
    q, kv = random_case(0, layout, units, num_heads=4, num_kv_heads=2)
    raws, gists = split_segment(gist_attention(q, kv, layout, backend="reference"), layout, axis=1)
    raw_q, gist_q = split_segment(q, layout, axis=1)
    slots = window + layout.ratio + spare
    ring_k, ring_v = jnp.full((2, 1, slots, 2, DIM), 1e9)
    decode = jax.jit(functools.partial(decode_attention, layout=layout))
    for i in range(units * layout.ratio):
        unit = i // layout.ratio
        ring_k = ring_k.at[:, i % slots].set(kv.raw_k[:, i])
        ring_v = ring_v.at[:, i % slots].set(kv.raw_v[:, i])
        queries = jnp.stack([raw_q[:, i], gist_q[:, unit]], axis=1)
        out = decode(q=queries, kv=kv._replace(raw_k=ring_k, raw_v=ring_v), raw_index=jnp.array([i], jnp.int32))
        np.testing.assert_allclose(out[:, 0], raws[:, i], rtol=1e-5, atol=2e-6)
        if i % layout.ratio == layout.ratio - 1:
            np.testing.assert_allclose(out[:, 1], gists[:, unit], rtol=1e-5, atol=2e-6)


def test_chunk_windows_replace_the_sliding_window():
    """With raw_start = the chunk's first unit, a raw sees its whole chunk and nothing raw before it."""
    layout, units, chunk = GistLayout(2, 1, 2), 6, 3
    q, kv = random_case(3, layout, units)
    raw_start = jnp.asarray(np.arange(units) // chunk * chunk)[None]
    out = gist_attention(q, kv, layout, raw_start=raw_start, backend="blocked")
    wide = gist_attention(q, kv, GistLayout(2, 1, 2 * units), backend="reference")
    np.testing.assert_allclose(out[:, : chunk * 2], wide[:, : chunk * 2], rtol=1e-5, atol=2e-6)
    moved = kv._replace(raw_v=kv.raw_v.at[:, : chunk * 2].add(100.0))
    later = gist_attention(q, moved, layout, raw_start=raw_start, backend="blocked")
    np.testing.assert_allclose(later[:, chunk * 2 : units * 2], out[:, chunk * 2 : units * 2], rtol=1e-6)
    assert np.abs(later[:, : chunk * 2] - out[:, : chunk * 2]).min() > 1


def test_blocked_passes_check_grads():
    layout = GistLayout(2, 2, 2)
    q, kv = random_case(5, layout, 4, num_heads=2)
    starts = unit_starts(layout, 4)

    def attend(q, kv):
        q, kv = jax.tree.map(jnp.asarray, (q, kv))  # check_grads perturbs in NumPy
        return blocked.attend(q, kv, layout, 0, 0, starts, BlockSizes(4, 4))

    check_grads(jax.jit(attend), (q, kv), order=1, modes=["rev"], rtol=2e-2, atol=2e-3)


def test_causal_attention_keeps_documents_apart():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 11, heads, DIM)), jnp.float32) for heads in (4, 2, 2))
    begin = np.array([0] * 4 + [4] * 7)
    mask = (np.arange(11) <= np.arange(11)[:, None]) & (np.arange(11) >= begin[:, None])
    out = causal_attention(q, k, v, jnp.asarray(begin)[None], BlockSizes(4, 4))
    np.testing.assert_allclose(out[0], dense_attention(q[0], k[0], v[0], mask), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("with_gradient", [False, True])
def test_blocked_memory_grows_with_length_not_its_square(with_gradient):
    """Temporaries of the compiled op, from XLA's own accounting: twice the length, at most about twice the bytes."""
    layout = GistLayout(4, 4, 16)

    def temporary_bytes(units):
        q, kv = jax.eval_shape(lambda: random_case(0, layout, units, num_heads=2, num_kv_heads=1))

        def attend(q, kv):
            return jnp.sum(gist_attention(q, kv, layout, backend="blocked"))

        function = jax.grad(attend, (0, 1)) if with_gradient else attend
        return jax.jit(function).lower(q, kv).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary_bytes(4096), temporary_bytes(8192)
    assert large < 2.2 * small
    raws = 8192 * 4
    assert large < raws * raws // 16


def test_bad_arguments_are_named():
    layout = GistLayout(2, 1, 2)
    q, kv = random_case(0, layout, 3)
    with pytest.raises(ValueError, match=r"unknown attention backend 'flash'.*blocked.*reference"):
        gist_attention(q, kv, layout, backend="flash")
    with pytest.raises(ValueError, match=r'backend="hopper" needs .*; here "blocked", "reference" or None can be used'):
        gist_attention(q, kv, layout, backend="hopper")
    with pytest.raises(ValueError, match=r"8 positions.*ratio \+ 1 = 3"):
        gist_attention(q[:, :8], kv, layout)
    with pytest.raises(ValueError, match="kv holds 1 sinks, the layout has num_sinks=4"):
        gist_attention(q, kv, GistLayout(2, 4, 2))
    with pytest.raises(ValueError, match="units 1 … 3 queried, but kv holds 3 gists"):
        gist_attention(q, kv, layout, first_unit=1)
    with pytest.raises(ValueError, match="units 1 … 3 given, but the segment sees units 0 … 2"):
        gist_attention(q, kv, layout, first_raw_unit=1)
    with pytest.raises(ValueError, match=r"doc_start has shape \(1, 2\)"):
        gist_attention(q, kv, layout, doc_start=jnp.zeros((1, 2), jnp.int32))
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2"):
        wide = jax.tree.map(lambda x: jnp.concatenate([x, x], axis=-2), kv)
        gist_attention(jnp.concatenate([q, q[:, :, :1]], axis=2), wide, layout)
    with pytest.raises(ValueError, match="units -1 … 1 queried"):
        gist_attention(q, kv, layout, first_unit=-1)
    assert gist_attention(q[:, :0], kv, layout).shape == (1, 0, 2, DIM)
    with pytest.raises(ValueError, match=r"ring has 3 slots.*window \+ ratio = 4"):
        short = kv._replace(raw_k=kv.raw_k[:, :3], raw_v=kv.raw_v[:, :3])
        decode_attention(q[:, :2], short, layout, jnp.zeros(1, jnp.int32))
