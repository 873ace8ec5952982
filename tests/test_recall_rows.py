"""Recall records as rows of tokens: whole, reproducible, the loss where it belongs, questions anywhere."""

import re

import numpy as np
import pytest

from unigist_jax.data import Tokenizer, prepare_recall_rows
from unigist_jax.layout import GistLayout

LAYOUT = GistLayout(ratio=4, num_sinks=2, window=8)
WORDS = [f"w{number:x}" for number in range(400)]
QUESTION = re.compile(r"magic number for (\S+) mentioned in the provided text is: (\d+)")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.train([" ".join(WORDS)], 300, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.mark.parametrize("filler", [[], ["Some text.\n\nMore of it,\nand more."]])
def test_recall_rows_are_records_and_learn_the_answer(tokenizer, filler):
    def prepare(num_records, answer_loss_only):
        return prepare_recall_rows(
            tokenizer=tokenizer,
            layout=LAYOUT,
            row_length=512,
            num_records=num_records,
            seed=3,
            filler=filler,
            kinds=("needle", "json_kv"),
            digits=4,
            answer_loss_only=answer_loss_only,
        )

    rows, answers = prepare(6, False), prepare(6, True)
    np.testing.assert_array_equal(rows.tokens, answers.tokens)
    np.testing.assert_array_equal(rows.tokens[:3], prepare(3, False).tokens)
    assert len({tuple(row) for row in rows.tokens}) == 6
    for index in range(6):
        row = rows.tokens[index]
        length = int((row != tokenizer.pad_id).sum())
        assert 450 < length <= 512 and row[0] == tokenizer.bos_id and row[length - 1] == tokenizer.eos_id
        np.testing.assert_array_equal(rows.loss_mask[index], np.arange(512) < length - 1)
        learned = row[1:][answers.loss_mask[index, :-1]]
        assert learned[-1] == tokenizer.eos_id
        text, answer = tokenizer.decode(row), tokenizer.decode(learned)
        assert text.endswith(":" + answer) and len(answer) == 5 and answer.strip().isdigit()
        assert text.count(answer.strip()) >= 2
        assert ("magic" in text, '"' in text) == (index % 2 == 0, index % 2 == 1)


def test_unusable_recall_settings_are_refused(tokenizer):
    settings = {"tokenizer": tokenizer, "layout": LAYOUT, "seed": 0}
    with pytest.raises(ValueError, match="num_tokens=30 is too short"):
        prepare_recall_rows(row_length=32, num_records=1, **settings)
    with pytest.raises(ValueError, match="not a multiple of ratio=4"):
        prepare_recall_rows(row_length=510, num_records=1, **settings)
    for num_records, kinds in ((0, ("needle",)), (1, ())):
        with pytest.raises(ValueError, match="at least"):
            prepare_recall_rows(row_length=512, num_records=num_records, kinds=kinds, **settings)


def test_recall_rows_may_ask_several_questions(tokenizer):
    """Each is followed by its answer, and the answers alone are learned."""
    options = dict(tokenizer=tokenizer, layout=LAYOUT, row_length=1024, num_records=2, seed=3, digits=4, questions=3)
    rows = prepare_recall_rows(kinds=("multi_key",), answer_loss_only=True, **options)
    for row, mask in zip(rows.tokens, rows.loss_mask, strict=True):
        text = tokenizer.decode(row[row != tokenizer.pad_id])
        answers = re.findall(r"magic number for (\S+) mentioned in the provided text is: (\d{4})", text)
        assert len(dict(answers)) == 3
        assert all(text.count(f"numbers for {key} is: {value}.") == 1 for key, value in answers)
        assert tokenizer.decode(row[1:][mask[:-1]]).split() == [value for _, value in answers]
        assert (row != tokenizer.pad_id).sum() > 800


@pytest.mark.parametrize("kind", ["multi_key", "needle"])
def test_interleaved_rows_ask_all_along_for_what_came_before(tokenizer, kind):
    options = dict(tokenizer=tokenizer, layout=LAYOUT, row_length=2048, seed=1, digits=4, questions=9)
    options |= dict(kinds=(kind,), filler=["Some text.\n\nMore of it,\nand more."], answer_loss_only=True)
    rows = prepare_recall_rows(num_records=8, interleaved=True, **options)
    fewer = prepare_recall_rows(num_records=3, interleaved=True, **options)
    np.testing.assert_array_equal(rows.tokens[:3], fewer.tokens)
    facts_before_first_question = []
    for row, mask in zip(rows.tokens, rows.loss_mask, strict=True):
        text = tokenizer.decode(row[row != tokenizer.pad_id])
        asked = list(QUESTION.finditer(text))
        assert 1 <= len(asked) <= 9
        for match in asked:
            assert text[: match.start()].count(f"numbers for {match[1]} is: {match[2]}.") == 1
        assert tokenizer.decode(row[1:][mask[:-1]]).split() == [match[2] for match in asked]
        facts_before_first_question.append(text[: asked[0].start()].count("numbers for"))
    assert min(facts_before_first_question) == 1 < max(facts_before_first_question)
    with pytest.raises(ValueError, match="interleaved rows are of the kinds"):
        prepare_recall_rows(num_records=1, interleaved=True, **options | {"kinds": ("json_kv",)})


def test_rows_of_pairs_learn_what_a_key_had_before(tokenizer):
    options = dict(tokenizer=tokenizer, layout=LAYOUT, row_length=1024, num_records=4, seed=1, kinds=("pairs",))
    rows = prepare_recall_rows(interleaved=True, answer_loss_only=True, digits=4, **options)
    for row, mask in zip(rows.tokens, rows.loss_mask, strict=True):
        text = tokenizer.decode(row[row != tokenizer.pad_id])
        values: dict[str, str] = {}
        repeated = []
        for key, value in re.findall(r"(\S+) is: ([\w-]+)", text):
            repeated += [values[key]] if key in values else []
            assert values.setdefault(key, value) == value
        learned = tokenizer.decode(row[1:][mask[:-1]]).split()
        assert len(learned) > 5 and learned == repeated


def test_rows_of_repeats_learn_all_but_the_first_time(tokenizer):
    options = dict(tokenizer=tokenizer, layout=LAYOUT, row_length=64, num_records=32, seed=1, kinds=("repeats",))
    rows = prepare_recall_rows(interleaved=True, answer_loss_only=True, **options)
    periods = []
    for row, mask in zip(rows.tokens, rows.loss_mask, strict=True):
        body, learned = row[1:-1], np.flatnonzero(mask[:-2])
        period = learned[0]
        assert row[0] == tokenizer.bos_id and row[-1] == tokenizer.eos_id and not set(body) & {row[0], row[-1]}
        np.testing.assert_array_equal(learned, np.arange(period, len(body)))
        np.testing.assert_array_equal(body[period:], body[:-period])
        periods.append(period)
    assert 4 <= min(periods) <= 6 and 24 <= max(periods) <= 31
