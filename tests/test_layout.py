"""GistLayout and its closed forms against the paper's definition in causal (interleaved) order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brute_force import causal_order, interleaved_mask, interleaved_positions
from hypothesis import given
from hypothesis import strategies as st

from unigist_jax.layout import (
    GistLayout,
    assemble_segment,
    document_starts,
    segment_positions,
    segment_ranges,
    sink_positions,
    split_segment,
    unit_starts,
)


@st.composite
def layouts(draw):
    ratio = draw(st.integers(1, 5))
    return GistLayout(ratio, draw(st.integers(0, 3)), ratio * draw(st.integers(0, 3)))


documents = st.lists(st.integers(0, 3), min_size=1, max_size=8).map(np.array)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(ratio=0), r"ratio=0.*ratio >= 1"),
        (dict(ratio=4, window=6), r"window=6 .*ratio=4.*nearest legal window is 8"),
        (dict(window=-4), r"window=-4"),
        (dict(num_sinks=-1), r"num_sinks=-1.*0 for no sinks"),
    ],
)
def test_layout_rejects_bad_sizes(fields, message):
    with pytest.raises(ValueError, match=message):
        GistLayout(**fields)


def test_layout_rejects_fractions():
    with pytest.raises(TypeError, match="ratio"):
        GistLayout(ratio=4.0)


def test_lengths_that_do_not_divide_are_named():
    layout = GistLayout(4, 0, 8)
    assert layout.num_units(12) == 3
    with pytest.raises(ValueError, match="10 raw tokens is not a multiple of ratio=4; pad it to 12"):
        layout.num_units(10)
    with pytest.raises(ValueError, match=r"12 positions.*multiple of ratio \+ 1 = 5"):
        layout.segment_units(12)


@given(layouts(), documents)
def test_ranges_are_the_interleaved_mask(layout, ids):
    """The closed forms, reordered to causal order, are exactly Eq. 3's visible sets."""
    units, s, r = len(ids), layout.num_sinks, layout.ratio
    doc_start = document_starts(ids)
    document = np.cumsum(np.concatenate([[0], ids[1:] != ids[:-1]]))
    expected = interleaved_mask(r, s, layout.window, units, document)[s:]
    order = causal_order(layout, units)
    ranges = segment_ranges(layout, units, 0, unit_starts(layout, units, 0, doc_start))
    column = np.arange(units * r)
    raws = (column >= ranges.raw_lo[:, None]) & (column < ranges.raw_hi[:, None])
    gists = (column[:units] >= ranges.gist_lo[:, None]) & (column[:units] < ranges.gist_hi[:, None])
    seen = np.concatenate([raws, gists], axis=1)[order][:, order]
    np.testing.assert_array_equal(seen, expected[:, s:])
    assert expected[:, :s].all()


@given(layouts(), documents)
def test_positions_are_the_interleaved_positions(layout, ids):
    units, s = len(ids), layout.num_sinks
    document = np.cumsum(np.concatenate([[0], ids[1:] != ids[:-1]]))
    expected = interleaved_positions(layout.ratio, s, units, document)
    positions = segment_positions(layout, units, 0, document_starts(ids))
    np.testing.assert_array_equal(positions[causal_order(layout, units)], expected[s:])
    np.testing.assert_array_equal(sink_positions(layout), expected[:s])


@given(layouts(), documents, st.integers(0, 8))
def test_a_later_segment_continues_the_whole(layout, ids, cut):
    """Positions and ranges of a segment at any first unit are that part of the whole context's."""
    units = len(ids)
    cut = min(cut, units)
    doc_start = document_starts(ids)
    whole = segment_ranges(layout, units, 0, unit_starts(layout, units, 0, doc_start))
    part_starts = unit_starts(layout, units - cut, cut, doc_start[cut:])
    part = segment_ranges(layout, units - cut, cut, part_starts)
    for full, piece in zip(whole, part, strict=True):
        raws, gists = split_segment(full, layout, axis=-1)
        np.testing.assert_array_equal(piece, np.concatenate([raws[cut * layout.ratio :], gists[cut:]]))
    raws, gists = split_segment(segment_positions(layout, units, 0, doc_start), layout, axis=-1)
    piece = segment_positions(layout, units - cut, cut, doc_start[cut:])
    np.testing.assert_array_equal(piece, np.concatenate([raws[cut * layout.ratio :], gists[cut:]]))


@given(layouts(), st.lists(documents.filter(lambda x: len(x) == 4), min_size=2, max_size=2))
def test_numpy_and_traced_jax_agree(layout, ids):
    ids = np.stack(ids)

    @jax.jit
    def traced(ids, first_unit):
        doc_start = document_starts(ids)
        starts = unit_starts(layout, 4, first_unit, doc_start)
        return (
            doc_start,
            segment_ranges(layout, 4, first_unit, starts),
            segment_positions(layout, 4, first_unit, doc_start),
        )

    doc_start = document_starts(ids)
    expected = (
        doc_start,
        segment_ranges(layout, 4, 0, unit_starts(layout, 4, 0, doc_start)),
        segment_positions(layout, 4, 0, doc_start),
    )
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(expected))
    jax.tree.map(np.testing.assert_array_equal, traced(jnp.asarray(ids), jnp.int32(0)), expected)


def test_assemble_and_split_are_inverse():
    layout = GistLayout(3, 0, 3)
    raws, gists = np.arange(12).reshape(2, 6), 100 + np.arange(4).reshape(2, 2)
    segment = assemble_segment(raws, gists, layout, axis=-1)
    assert segment.shape == (2, 8)
    for got, want in zip(split_segment(segment, layout, axis=-1), (raws, gists), strict=True):
        np.testing.assert_array_equal(got, want)
    with pytest.raises(ValueError, match="6 raws make 2 units at ratio=3, but 3 gists"):
        assemble_segment(raws, np.zeros((2, 3)), layout, axis=-1)
