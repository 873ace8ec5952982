"""Packing, against its definition: token ids that carry their document and place say what each row should hold."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unigist_jax.data.pack import pack_documents, packing_report
from unigist_jax.layout import GistLayout

PAD = 0
STRIDE = 1000  # token j of document k is k * STRIDE + j + 1


def documents_of(lengths):
    return [np.arange(length) + k * STRIDE + 1 for k, length in enumerate(lengths)]


def pack(lengths, row_length, ratio, **options):
    layout = GistLayout(ratio=ratio, num_sinks=0, window=0)
    return pack_documents(documents_of(lengths), row_length=row_length, layout=layout, pad_id=PAD, **options)


def pieces_of(rows, ratio):
    """The runs of consecutive tokens of one document that begin with a unit, as (row, first raw, tokens)."""
    for n, row in enumerate(rows.tokens.tolist()):
        begin = 0
        while begin < len(row) and row[begin] != PAD:
            end = begin + 1
            while end < len(row) and row[end] == row[end - 1] + 1:
                end += 1
            yield n, begin, row[begin:end]
            begin = -(-end // ratio) * ratio


cases = st.integers(1, 5).flatmap(
    lambda ratio: st.tuples(st.just(ratio), st.integers(1, 8).map(lambda units: units * ratio))
)
lengths = st.lists(st.integers(0, 60), min_size=1, max_size=30).filter(any)


@given(case=cases, lengths=lengths)
def test_no_token_is_lost_doubled_or_reordered(case, lengths):
    ratio, row_length = case
    rows = pack(lengths, row_length, ratio)
    assert rows.tokens.dtype == rows.doc_start.dtype == np.int32 and rows.loss_mask.dtype == bool
    assert rows.tokens.shape == rows.loss_mask.shape == (len(rows), row_length)
    assert rows.doc_start.shape == (len(rows), row_length // ratio)
    held = sorted(rows.tokens[rows.tokens != PAD].tolist())
    assert held == sorted(np.concatenate(documents_of(lengths)).tolist())
    pieces = [piece for _, _, piece in pieces_of(rows, ratio)]
    assert sum(map(len, pieces)) == len(held)  # every token lies in a run that begins with a unit
    for first in (piece[0] for piece in pieces):  # a document begins anew only where a row's length ends
        assert (first - 1) % STRIDE % row_length == 0


@given(case=cases, lengths=lengths)
def test_doc_start_is_the_first_unit_of_the_piece_and_padding_goes_with_the_last(case, lengths):
    ratio, row_length = case
    rows = pack(lengths, row_length, ratio)
    expected = np.full(rows.doc_start.shape, -1)
    for n, begin, piece in pieces_of(rows, ratio):
        expected[n, begin // ratio : -(-(begin + len(piece)) // ratio)] = begin // ratio
    padding = expected < 0
    np.testing.assert_array_equal(rows.doc_start[~padding], expected[~padding])
    for n in range(len(rows)):
        if padding[n].any():
            assert padding[n].argmax() == (~padding[n]).sum()  # padding comes last
            assert (rows.doc_start[n][padding[n]] == expected[n][~padding[n]][-1]).all()


@given(case=cases, lengths=lengths, seed=st.integers(0, 99))
def test_the_loss_mask_is_its_definition(case, lengths, seed):
    ratio, row_length = case
    rng = np.random.default_rng(seed)
    learned = [rng.random(length) < 0.5 for length in lengths]
    for masks in (None, learned):
        rows = pack(lengths, row_length, ratio, loss_masks=masks)
        for n, row in enumerate(rows.tokens):
            for i in range(row_length):
                same_piece = i + 1 < row_length and PAD not in row[i : i + 2] and row[i + 1] == row[i] + 1
                starts_piece = i + 1 < row_length and (row[i + 1] - 1) % STRIDE % row_length == 0
                expected = same_piece and not starts_piece
                if expected and masks is not None:
                    document, place = divmod(int(row[i + 1]) - 1, STRIDE)
                    expected = learned[document][place]
                assert rows.loss_mask[n, i] == expected


def test_a_small_example():
    rows = pack([5, 3, 9, 1], 8, 2)
    tokens = [[1, 2, 3, 4, 5, 0, 2009, 0], [1001, 1002, 1003, 0, 3001, 0, 0, 0]]
    tokens.append([2001, 2002, 2003, 2004, 2005, 2006, 2007, 2008])
    np.testing.assert_array_equal(rows.tokens, tokens)
    np.testing.assert_array_equal(rows.doc_start, [[0, 0, 0, 3], [0, 0, 2, 2], [0, 0, 0, 0]])
    np.testing.assert_array_equal(rows.documents, [[0, 0, 0, 2], [1, 1, 3, 3], [2, 2, 2, 2]])
    targets = [[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 0]]
    np.testing.assert_array_equal(rows.loss_mask, np.array(targets, bool))
    report = packing_report(rows)
    assert report == {"rows": 3, "documents": 5, "tokens": 18, "targets": 13, "padding_share": 0.25}


def test_documents_may_hold_the_id_that_fills_rows():
    """As Llama 3's do, whose tokenizer has no mark for padding: the end of a text is a target, what fills is none."""
    documents = [np.array([5, 6, PAD]), np.array([7, PAD])]
    rows = pack_documents(documents, row_length=8, layout=GistLayout(2, 0, 0), pad_id=PAD)
    np.testing.assert_array_equal(rows.tokens, [[5, 6, PAD, PAD, 7, PAD, PAD, PAD]])
    np.testing.assert_array_equal(rows.loss_mask, np.array([[1, 1, 0, 0, 1, 0, 0, 0]], bool))
    report = packing_report(rows)
    assert report == {"rows": 1, "documents": 2, "tokens": 5, "targets": 3, "padding_share": 0.375}


def test_packing_wastes_little_and_is_repeatable():
    rng = np.random.default_rng(0)
    lengths = rng.geometric(1 / 100, size=800).clip(1, STRIDE - 1)
    rows, again = (pack(lengths, 256, 4) for _ in range(2))
    assert packing_report(rows)["padding_share"] < 0.08
    for name in ("tokens", "doc_start", "loss_mask"):
        np.testing.assert_array_equal(getattr(rows, name), getattr(again, name))


def test_unusable_input_is_refused():
    with pytest.raises(ValueError, match="no document with tokens to pack; check the corpus"):
        pack([0, 0], 8, 2)
    with pytest.raises(ValueError, match="not a multiple of ratio=4; pad it to 12"):
        pack([3], 10, 4)
    with pytest.raises(ValueError, match="row_length=0"):
        pack([3], 0, 4)
    options = {"row_length": 8, "layout": GistLayout(4, 0, 0), "pad_id": PAD}
    with pytest.raises(ValueError, match="document 0 has the shape"):
        pack_documents([np.array([[1]])], **options)
    with pytest.raises(TypeError, match="document 0 holds float64"):
        pack_documents([np.array([1.0])], **options)
    with pytest.raises(ValueError, match="document 0 has 2 tokens, but its loss mask"):
        pack_documents([np.array([1, 2])], loss_masks=[np.ones(3, bool)], **options)
    with pytest.raises(ValueError, match="shorter"):
        pack_documents([np.array([1, 2])] * 2, loss_masks=[np.ones(2, bool)], **options)
