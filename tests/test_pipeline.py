"""The pipeline: one order for any number of processes and any resume, the asked-for mix, and rows from texts."""

from pathlib import Path

import numpy as np
import pytest

from unigist_jax.data.pack import PackedRows
from unigist_jax.data.pipeline import (
    TrainData,
    eval_batches,
    load_or_train_tokenizer,
    prepare_rows,
)
from unigist_jax.layout import GistLayout

LAYOUT = GistLayout(ratio=4, num_sinks=2, window=8)


def numbered_rows(count, first=0, row_length=8):
    """Rows whose tokens, starts and masks all tell the row's number."""
    number = np.arange(first, first + count, dtype=np.int32)[:, None]
    return PackedRows(
        tokens=np.tile(number, row_length),
        doc_start=np.tile(-number, row_length // 4),
        loss_mask=np.tile(number % 2 == 0, row_length),
    )


def two_sources(second_weight, batch_size, seed):
    return TrainData([numbered_rows(20), numbered_rows(6, 100)], [1 - second_weight, second_weight], batch_size, seed)


def numbers(batch):
    """The row numbers of a batch, once its three parts agree on them."""
    number = batch["tokens"][:, 0]
    assert (batch["tokens"] == number[:, None]).all() and (batch["doc_start"] == -number[:, None]).all()
    assert (batch["loss_mask"] == (number % 2 == 0)[:, None]).all()
    return number.tolist()


def order(data, steps):
    return [number for step in steps for number in numbers(data.batch(step))]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for index in range(30):
        words = [f"w{number:x}" for number in rng.integers(0, 400, size=rng.integers(5, 300))]
        (folder / f"{index}.txt").write_text(f"document {index}\n\n" + " ".join(words) + "\n")
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer(corpus, tmp_path_factory):
    return load_or_train_tokenizer(tmp_path_factory.mktemp("work"), corpus, 320)


@pytest.mark.parametrize("recall_weight", [0.0, 0.3, 1.0])
def test_processes_share_one_order(recall_weight):
    data = two_sources(recall_weight, 8, seed=5)
    for step in (0, 3, 1000):
        whole = data.batch(step)
        for count in (1, 2, 4):
            parts = [data.local_batch(step, index, count) for index in range(count)]
            assert {len(part["tokens"]) for part in parts} == {8 // count}
            for name, array in whole.items():
                np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)


def test_resuming_at_any_step_continues_the_run():
    def new():
        return two_sources(0.3, 4, seed=5)

    through = [numbers(new().batch(step)) for step in range(25)]
    data = new()
    assert [numbers(data.batch(step)) for step in range(11, 25)] == through[11:]
    assert numbers(data.batch(2)) == through[2]  # and back again


def test_every_row_comes_once_an_epoch_in_another_order_each_time():
    data = TrainData([numbered_rows(20)], [1.0], 4, seed=5)
    epochs = [order(data, range(5 * epoch, 5 * epoch + 5)) for epoch in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(20))] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] and epochs[0] != sorted(epochs[0])
    assert order(TrainData([numbered_rows(20)], [1.0], 4, seed=6), range(5)) != epochs[0]
    assert sorted(order(TrainData([numbered_rows(3)], [1.0], 8, seed=5), range(3))) == sorted([0, 1, 2] * 8)


@pytest.mark.parametrize("recall_weight", [0.0, 0.25, 0.6, 1.0])
def test_recall_rows_come_with_their_weight(recall_weight):
    data = two_sources(recall_weight, 10, seed=0)
    drawn = np.array(order(data, range(30)))
    recall = drawn[drawn >= 100]
    assert len(recall) == pytest.approx(300 * recall_weight, abs=1)
    if len(recall):
        counts = np.bincount(recall - 100, minlength=6)
        assert counts.max() - counts.min() <= 1
    assert set(drawn[drawn < 100]) == (set(range(20)) if recall_weight < 1 else set())


@pytest.mark.parametrize("batch_size", [1, 3, 7, 16])
def test_evaluation_sees_every_row_once(batch_size):
    batches = list(eval_batches(numbered_rows(7), batch_size))
    assert all(batch["tokens"].shape == (batch_size, 8) for batch in batches)
    assert all(batch["doc_start"].shape == (batch_size, 2) for batch in batches)
    tokens, mask = (np.concatenate([batch[name] for batch in batches]) for name in ("tokens", "loss_mask"))
    np.testing.assert_array_equal(tokens[:7, 0], np.arange(7))
    np.testing.assert_array_equal(mask[:7], numbered_rows(7).loss_mask)
    assert not mask[7:].any() and len(tokens) - 7 < batch_size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"weights": [1.0]}, "one for each of 2 sources"),
        ({"weights": [0.0, 0.0]}, "not all 0"),
        ({"sources": [numbered_rows(3), numbered_rows(2, row_length=12)]}, "same row_length"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_unusable_settings_are_refused(change, message):
    settings = {"sources": [numbered_rows(3), numbered_rows(2)], "weights": [1.0, 1.0], "batch_size": 4}
    with pytest.raises(ValueError, match=message):
        TrainData(**{**settings, "seed": 0, **change})


def test_unusable_requests_are_refused():
    data = TrainData([numbered_rows(3)], [1.0], 4, seed=0)
    with pytest.raises(ValueError, match="does not divide among 3"):
        data.local_batch(0, 0, 3)
    with pytest.raises(ValueError, match="process_index=2"):
        data.local_batch(0, 2, 2)
    with pytest.raises(ValueError, match="step=-1"):
        data.batch(-1)
    with pytest.raises(ValueError, match="batch_size=0"):
        next(eval_batches(numbered_rows(3), 0))


def test_rows_hold_the_split_documents(corpus, tokenizer):
    decoded = {}
    for split in ("train", "heldout"):
        rows = prepare_rows(
            source=corpus, split=split, tokenizer=tokenizer, layout=LAYOUT, row_length=2048, heldout_fraction=0.3
        )
        decoded[split] = []
        for row, starts in zip(rows.tokens, rows.doc_start, strict=True):
            for unit in np.unique(starts):
                ids = row.reshape(-1, 4)[starts == unit].ravel()
                ids = ids[ids != tokenizer.pad_id]
                if len(ids):
                    assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
                    decoded[split].append(tokenizer.decode(ids))
    assert len(decoded["train"]) > len(decoded["heldout"]) > 0
    texts = [path.read_text() for path in Path(corpus).iterdir()]
    assert sorted(decoded["train"] + decoded["heldout"]) == sorted(texts)


def test_the_tokenizer_of_a_work_directory_is_trained_once(corpus, tmp_path):
    first = load_or_train_tokenizer(tmp_path / "new", corpus, 320)
    file = tmp_path / "new" / "tokenizer.model"
    written = file.stat().st_mtime_ns
    assert load_or_train_tokenizer(tmp_path / "new", "no such corpus", 320).fingerprint == first.fingerprint
    assert [path.name for path in file.parent.iterdir()] == ["tokenizer.model"] and file.stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="vocab_size=320, not 321; use that size, delete the file"):
        load_or_train_tokenizer(tmp_path / "new", corpus, 321)
