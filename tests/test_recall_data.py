"""Recall records: their form, length, depth and reproducibility, for every kind and knob."""

import json
import re
import uuid

import numpy as np
import pytest

from unigist_jax.data.recall import (
    RECALL_KINDS,
    further_questions,
    json_kv_record,
    needle_record,
    paragraphs,
    recall_record,
)

FILLER = [f"Paragraph {i} tells of the sea.\n    It has an indented line." for i in range(5)]


def words(text):
    return len(re.findall(r"\w+|\W", text))


def make(kind, seed=0, num_tokens=2000, count_tokens=words, **options):
    return recall_record(kind, np.random.default_rng(seed), num_tokens=num_tokens, count_tokens=count_tokens, **options)


def length(record, count_tokens=words):
    return sum(map(count_tokens, (record.context, record.question, record.answer)))


@pytest.mark.parametrize("filler", [FILLER, []])
def test_a_needle_is_there_once_and_the_question_asks_for_it(filler):
    record = make("needle", filler=filler)
    key = re.fullmatch(
        r"\n\nWhat is the special magic number for (\S+) mentioned in the provided text\? "
        r"The special magic number for \1 mentioned in the provided text is:",
        record.question,
    )[1]
    needle = f"One of the special magic numbers for {key} is:{record.answer}."
    assert re.fullmatch(r" [1-9]\d{6}", record.answer)
    assert record.context.split("\n").count(needle) == 1
    assert record.context.count(key) == 1
    others = record.context.replace(needle, "")
    assert ("special magic" in others) == (not filler)
    assert ("indented" in others) == bool(filler)


def test_a_haystack_of_needles_has_distinct_keys_even_when_word_pairs_run_out():
    record = make("needle", num_tokens=90_000)
    keys = re.findall(r"numbers for (\S+) is: \d{7}\.", record.context)
    assert len(keys) == len(set(keys)) == len(record.context.split("\n")) > 3000
    assert max(key.count("-") for key in keys) == 2


def test_all_values_of_one_key_are_there_and_asked_for():
    record = make("multi_value", filler=FILLER, digits=5)
    key = re.fullmatch(
        r"\n\nWhat are all the special magic numbers for (\S+) mentioned in the provided text\? "
        r"The special magic numbers for \1 mentioned in the provided text are:",
        record.question,
    )[1]
    found = re.findall(rf"^One of the special magic numbers for {key} is: (\d{{5}})\.$", record.context, re.MULTILINE)
    assert len(found) == 4 and tuple(found) == record.expected and record.answer == " " + ", ".join(found)
    places = [record.context.index(value) / len(record.context) for value in found]
    assert record.depth == pytest.approx(np.mean(places), abs=0.1)
    assert make("needle").expected == (make("needle").answer.strip(),)


@pytest.mark.parametrize("style", ["word", "uuid"])
def test_a_json_record_parses_and_holds_the_pair(style):
    record = make("json_kv", key_style=style, value_style={"word": "numbers", "uuid": "uuids"}[style])
    key = re.fullmatch(r'\n\nKey: "(\S+)"\nCorresponding value:', record.question)[1]
    pairs = json.loads(record.context)
    assert " " + pairs[key] == record.answer
    assert len(pairs) == record.context.count(": ") > 20
    assert all(value.isdigit() == (style == "word") for value in pairs.values())


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_the_fact_lies_at_the_depth_asked_for(depth):
    for filler in (FILLER, []):
        record = make("needle", filler=filler, depth=depth)
        needle = next(line for line in record.context.split("\n") if record.answer in line)
        place = record.context.index(needle) / (len(record.context) - len(needle))
        assert record.depth == depth and place == pytest.approx(depth, abs=0.02)
    record = make("json_kv", depth=depth)
    values = list(json.loads(record.context).values())
    assert values.index(record.answer.strip()) == round(depth * (len(values) - 1))


def test_depths_are_drawn_evenly():
    depths = [make("json_kv", seed, 300).depth for seed in range(200)]
    assert 0 <= min(depths) < 0.1 < 0.4 < np.mean(depths) < 0.6 < 0.9 < max(depths) <= 1


@pytest.mark.parametrize(("num_tokens", "count_tokens"), [(400, words), (1001, words), (1001, len), (9999, len)])
def test_records_fit_their_length_and_nearly_fill_it(num_tokens, count_tokens):
    for kind, options, slack in (
        ("needle", {"filler": FILLER}, 12),
        ("needle", {"filler": ["unbroken" * 10**4, "line\n" * 10**4]}, 45),
        ("needle", {}, 90),
        ("json_kv", {}, 90),
    ):
        record = make(kind, 3, num_tokens, count_tokens, **options)
        assert num_tokens - slack <= length(record, count_tokens) <= num_tokens


def test_the_same_seed_gives_the_same_record_and_another_seed_another():
    for kind in RECALL_KINDS:
        for options in ({}, {"filler": FILLER}):
            assert make(kind, 1, **options) == make(kind, 1, **options)
            assert make(kind, 1, **options).context != make(kind, 2, **options).context


def test_knobs_change_keys_and_values():
    for kind in set(RECALL_KINDS) - {"multi_value"}:
        assert re.fullmatch(r" [1-9]", make(kind, digits=1, value_style="numbers").answer)
        assert re.fullmatch(r" [1-9]\d{29}", make(kind, digits=30, value_style="numbers").answer)
        assert re.fullmatch(r" [a-z]+-[a-z]+", make(kind, value_style="words").answer)
        record = make(kind, key_style="uuid", value_style="uuids")
        assert str(uuid.UUID(record.answer.strip())) == record.answer.strip()
        assert re.search(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", record.question)
    assert "special magic uuid for" in make("needle", value_style="uuids").question
    assert "special magic words for" in make("needle", value_style="words").context


@pytest.mark.parametrize("kind", RECALL_KINDS)
def test_too_short_a_length_names_the_least_that_works(kind):
    with pytest.raises(ValueError, match=r"num_tokens=20 is too short") as error:
        make(kind, num_tokens=20)
    minimum = int(re.search(r"needs (\d+)", str(error.value))[1])
    assert length(make(kind, num_tokens=minimum)) == minimum
    with pytest.raises(ValueError, match=f"num_tokens={minimum - 1} is too short"):
        make(kind, num_tokens=minimum - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"digits": 0}, "digits=0"),
        ({"depth": 1.5}, "depth=1.5"),
        ({"key_style": "number"}, "use one of 'word', 'uuid'"),
        ({"value_style": "letters"}, "use one of 'numbers', 'words', 'uuids'"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    for record in (needle_record, json_kv_record):
        with pytest.raises(ValueError, match=message):
            record(np.random.default_rng(0), num_tokens=2000, count_tokens=words, **options)


def test_unknown_kinds_and_blank_filler_are_refused():
    with pytest.raises(ValueError, match="use one of 'needle', 'multi_key', 'multi_value', 'json_kv'"):
        make("haystack")
    with pytest.raises(ValueError, match="filler holds no words"):
        make("needle", filler=[" ", "\n"])


def test_paragraphs_are_what_lies_between_blank_lines():
    assert paragraphs(["a\nb\n\n  c\n \t\n\nd", "", "\n\ne"]) == ["a\nb", "  c", "d", "e"]


def test_further_questions_ask_for_the_other_facts_of_the_context():
    for kind in ("multi_key", "json_kv"):
        record = make(kind)
        others = further_questions(record, np.random.default_rng(0), 5)
        assert len(dict(others)) == 5 and record.question not in dict(others)
        for question, answer in others:
            key = re.search(r'for (\S+) mentioned|Key: "(\S+)"', question)
            place = record.context.index(key[1] or key[2])
            assert record.context[place:].index(answer.strip()) < 60
    assert further_questions(make("needle", filler=FILLER), np.random.default_rng(0), 5) == []
