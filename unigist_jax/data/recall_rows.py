"""Recall records as rows of tokens to train on, one record a row.

A plain row is what a test is: a context, then a question and its answer, or several. An interleaved row comes in
stretches that grow, each of them followed by questions about what came before, so that one row asks over short and long
distances, among few facts and many: far more to learn from, and easy cases to begin with.

  plain        [ bos | context                       | q a | q a | eos ]
  interleaved  [ bos | stretch | q a | stretch | q a | q a | stretch | q a | eos ]

Context, question and answer are tokenised one by one, as at inference, where the context comes before the question is
known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from unigist_jax.data.pack import PackedRows, pack_documents
from unigist_jax.data.recall import (
    ANSWER,
    NEEDLE,
    NEEDLE_QUESTION,
    RECALL_KINDS,
    VALUE_NOUNS,
    draw_pair,
    further_questions,
    haystack_words,
    paragraphs,
    recall_record,
)
from unigist_jax.data.tokenize import Tokenizer
from unigist_jax.layout import GistLayout

QUESTION_SLACK = 8  # tokens by which questions of one record may differ in length
MOST_QUESTIONS = 3  # behind a short stretch of an interleaved row
GROWTH = 1.3  # of its stretches
FROM_ONE = 0.75  # share of interleaved rows whose first stretch is one fact
PAIRS = "pairs"  # kinds of interleaved rows beside those of `RECALL_KINDS`
REPEATS = "repeats"
DRILLS = (PAIRS, REPEATS)  # what is trained on and not asked in a test
INTERLEAVED_KINDS = ("needle", "multi_key", *DRILLS)
REMEMBERED = 4096  # texts whose tokens are kept while records are made
PAIR_KEYS = (1, 64)  # the fewest and the most keys of a row of pairs
SHORTEST_REPEAT = 4  # tokens of a repeated sequence; the longest is half a row


class Part(NamedTuple):
    """Text of a row, and whether it is an answer."""

    text: str
    is_answer: bool = False


def prepare_recall_rows(
    *,
    tokenizer: Tokenizer,
    layout: GistLayout,
    row_length: int,
    num_records: int,
    seed: int,
    kinds: Sequence[str] = RECALL_KINDS,
    filler: Sequence[str] = (),
    answer_loss_only: bool = False,
    digits: int = 7,
    key_style: str = "word",
    value_style: str = "numbers",
    questions: int = 1,
    interleaved: bool = False,
) -> PackedRows:
    """Recall records as rows, each record nearly filling one: `bos_id`, contexts, questions and answers, `eos_id`.

    Record i depends on the seed, i and the options, not on `num_records`; the kinds take turns.

    Args:
      tokenizer, layout, row_length: as for `pack_documents`.
      num_records: number of records.
      seed: fixes the records.
      kinds: kinds of records, of `RECALL_KINDS`.
      filler: texts whose paragraphs the needles are hidden in; none hides each needle among others.
      answer_loss_only: learn the answers and `eos_id` only, not the context and the questions.
      digits, key_style, value_style: as for `needle_record`, for all kinds.
      questions: at most so many a record, each with its answer. Plain rows ask several only where the context holds so
        many facts ("multi_key" and "json_kv").
      interleaved: rows in stretches, of `INTERLEAVED_KINDS`; a "needle" row has many needles. `DRILLS` are rows of a
        form of their own, that teach what the others need (`pair_parts`, `repeats`).

    Raises:
      ValueError: if `num_records` or `kinds` is empty, `row_length` is too short for a record or not whole units, or a
        kind cannot be interleaved.
    """
    layout.num_units(row_length)
    if num_records < 1 or not kinds:
        raise ValueError(
            f"num_records={num_records} of kinds={tuple(kinds)} is nothing; ask for one record of one kind at least"
        )
    if interleaved and set(kinds) - set(INTERLEAVED_KINDS):
        raise ValueError(f"interleaved rows are of the kinds {INTERLEAVED_KINDS}, not {tuple(kinds)}")
    haystack = paragraphs(filler)
    encode = lru_cache(REMEMBERED)(tokenizer.encode)  # a record's texts are counted first and taken later

    def count_tokens(text: str) -> int:
        return len(encode(text))

    options = dict(filler=haystack, digits=digits, key_style=key_style, value_style=value_style)
    options |= dict(num_tokens=row_length - 2, count_tokens=count_tokens, questions=questions)
    make_parts = interleaved_parts if interleaved else plain_parts
    documents, masks = [], []
    for index in range(num_records):
        rng, kind = np.random.default_rng([seed, index]), kinds[index % len(kinds)]
        if interleaved and kind == REPEATS:
            ids, learned = repeats(rng, row_length - 2, tokenizer)
        else:
            ids, learned = encode_parts(make_parts(kind, rng, **options), encode)
        ids, learned = ids[: row_length - 2], learned[: row_length - 2]
        documents.append(np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]]).astype(np.int32))
        masks.append(np.concatenate([[False], learned, [True]]) | (not answer_loss_only))
    return pack_documents(documents, row_length=row_length, layout=layout, pad_id=tokenizer.pad_id, loss_masks=masks)


def encode_parts(
    parts: Sequence[Part], encode: Callable[[str], Sequence[int]]
) -> tuple[Int32[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Tokens of the parts, each encoded on its own, and which of them are an answer's."""
    encoded = [encode(part.text) for part in parts]
    return np.concatenate(encoded), np.repeat([part.is_answer for part in parts], [len(ids) for ids in encoded])


def plain_parts(
    kind: str,
    rng: np.random.Generator,
    *,
    num_tokens: int,
    count_tokens: Callable[[str], int],
    questions: int,
    **options,
) -> list[Part]:
    """A record's context, and behind it at most `questions` questions with their answers, in `num_tokens` tokens."""
    options["count_tokens"] = count_tokens
    shares = questions if kind in ("multi_key", "json_kv") else 1
    record = recall_record(kind, rng, num_tokens=num_tokens, **options)
    if shares > 1:  # a shorter context leaves room for the other questions
        length = count_tokens(record.question) + count_tokens(record.answer) + QUESTION_SLACK
        room = min((shares - 1) * length, num_tokens // 2)
        record = recall_record(kind, rng, num_tokens=num_tokens - room, **options)
    asked = [(record.question, record.answer), *(further_questions(record, rng, shares - 1) if shares > 1 else ())]
    parts, left = [Part(record.context)], num_tokens - count_tokens(record.context)
    for question, answer in asked:
        left -= count_tokens(question) + count_tokens(answer)
        if left < 0:
            break
        parts += [Part(question), Part(answer, True)]
    return parts


def interleaved_parts(
    kind: str,
    rng: np.random.Generator,
    *,
    num_tokens: int,
    count_tokens: Callable[[str], int],
    filler: Sequence[str],
    questions: int,
    digits: int,
    key_style: str,
    value_style: str,
) -> list[Part]:
    """Stretches that grow while there is room in `num_tokens`, each followed by questions: at most three,
    or a third of its needles.

    Most rows begin with one fact, the others with up to half a row of them. A stretch of the kind "multi_key" is
    nothing but needles, one of the kind "needle" is text as long with fewer of them. Half of the questions are about
    any fact of the row so far, half about those of the stretch before them. There are at most `questions`.
    """
    if kind == PAIRS:
        return pair_parts(rng, num_tokens=num_tokens, count_tokens=count_tokens, digits=digits)
    taken: set[str] = set()

    def draw_fact() -> tuple[str, str]:
        return draw_pair(rng, key_style, value_style, digits, taken)

    def needle(fact: tuple[str, str]) -> str:
        return NEEDLE.format(values=value_style, key=fact[0], value=fact[1])

    def asked(fact: tuple[str, str]) -> list[Part]:
        question = NEEDLE_QUESTION.format(value_noun=VALUE_NOUNS[value_style], key=fact[0])
        return [Part(question), Part(ANSWER.format(value=fact[1]), True)]

    def cost(parts: Sequence[Part]) -> int:
        return sum(count_tokens(part.text) for part in parts)

    example = draw_fact()
    needle_cost, question_cost = (
        count_tokens("\n" + needle(example)) + 2,
        cost(asked(example)) + QUESTION_SLACK,
    )
    most = max(1, num_tokens // 2 // needle_cost)
    size = 1.0 if rng.random() < FROM_ONE else float(most ** rng.random())
    words = haystack_words(rng, filler) if kind == "needle" and filler else None
    facts: list[tuple[str, str]] = []
    parts: list[Part] = []
    left = num_tokens
    while questions and (count := max(not parts, min(round(size), (left - question_cost) // needle_cost))) > 0:
        if words is None:
            new = [draw_fact() for _ in range(count)]
            text = "\n".join(map(needle, new))
        else:
            new = [draw_fact() for _ in range(int(rng.integers(1, 2 + count // 3)))]
            text = _among_words(rng, words, [*map(needle, new)], (count - len(new)) * needle_cost, count_tokens)
        stretch = Part(f"\n\n{text}" if parts else text)
        left -= cost([stretch])
        parts.append(stretch)
        facts += new
        size *= GROWTH
        pool = new if rng.random() < 0.5 else facts
        share = int(rng.integers(1, max(MOST_QUESTIONS, count // 3) + 1))
        for index in rng.permutation(len(pool))[: min(questions, share)]:
            pair = asked(pool[index])
            if cost(pair) > left:
                return parts
            parts += pair
            left -= cost(pair)
            questions -= 1
    return parts


def pair_parts(
    rng: np.random.Generator, *, num_tokens: int, count_tokens: Callable[[str], int], digits: int, **_
) -> list[Part]:
    """Lines `KEY is: VALUE.` of a few keys that come again and again, each with its value: answers from the second on.

    The densest form of recall there is, and the first that a model learns. In each row keys are either nouns or
    adjective and noun, values either numbers or words.
    """
    fewest, most = PAIR_KEYS
    short, value_style = rng.random() < 0.5, str(rng.choice(["numbers", "words"]))
    taken: set[str] = set()
    pairs = [
        draw_pair(rng, "word", value_style, digits, taken)
        for _ in range(round(fewest * (most / fewest) ** rng.random()))
    ]
    if short:
        pairs = list({key.split("-")[-1]: (key.split("-")[-1], value) for key, value in pairs}.values())
    parts: list[Part] = []
    seen: set[int] = set()
    left = num_tokens
    while True:
        index = int(rng.integers(len(pairs)))
        line = [
            Part(f"{'.' if parts else ''}\n{pairs[index][0]} is:"),
            Part(ANSWER.format(value=pairs[index][1]), index in seen),
        ]
        left -= sum(count_tokens(part.text) for part in line)
        if left < 0 and parts:
            return parts
        parts += line
        seen.add(index)


def repeats(
    rng: np.random.Generator, num_tokens: int, tokenizer: Tokenizer
) -> tuple[Int32[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """A sequence of random tokens over and over, and which tokens can be known: all but the first time.

    What stood behind an earlier occurrence of the same tokens is all there is to learn, and every token asks for it:
    how to look things up (an induction head: Olsson et al., arXiv 2209.11895). The sequence has any length from
    `SHORTEST_REPEAT` to half a row, short ones being as frequent as long ones: they are learned first.
    """
    marks = [tokenizer.pad_id, tokenizer.bos_id, *tokenizer.stop_ids]
    vocabulary = np.setdiff1d(np.arange(tokenizer.vocab_size, dtype=np.int32), marks)
    length = round(SHORTEST_REPEAT * (num_tokens / 2 / SHORTEST_REPEAT) ** rng.random())
    return np.resize(rng.choice(vocabulary, length), num_tokens), np.arange(num_tokens) >= length


def _among_words(
    rng: np.random.Generator,
    words: Iterator[str],
    needles: list[str],
    length: int,
    count_tokens: Callable[[str], int],
) -> str:
    """About `length` tokens of words, the needles on lines of their own at random places among them."""
    drawn: list[str] = []
    counted = 0
    while counted < length:
        some = [next(words) for _ in range(max(1, (length - counted) // 8))]
        counted += count_tokens("".join(some))
        drawn += some
    pieces, begin = [], 0
    for text, place in zip(needles, sorted(rng.integers(0, len(drawn) + 1, len(needles))), strict=True):
        pieces += ["".join(drawn[begin:place]).strip("\n"), text]
        begin = place
    return "\n".join(filter(None, [*pieces, "".join(drawn[begin:]).strip("\n")]))
