"""Synthetic recall of any length: facts hidden in a long context, each record drawn from a seeded generator.

A `needle` record hides one sentence in local text (RULER's single needle) or, without such filler, among other
sentences of the same form; `multi_key` always does the latter (RULER's multi-key needles). A `multi_value` record hides
several values of one key and asks for all. A `json_kv` record is a JSON object and asks for the value of one key. In
all of them `context + question + answer` is the whole text. Its length is counted part by part: the context is
compressed before the question is known, and is therefore tokenised on its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

NEEDLE = "One of the special magic {values} for {key} is: {value}."
NEEDLE_QUESTION = (
    "\n\nWhat is the special magic {value_noun} for {key} mentioned in the provided text? "
    "The special magic {value_noun} for {key} mentioned in the provided text is:"
)
VALUES_QUESTION = (
    "\n\nWhat are all the special magic {values} for {key} mentioned in the provided text? "
    "The special magic {values} for {key} mentioned in the provided text are:"
)
JSON_QUESTION = '\n\nKey: "{key}"\nCorresponding value:'
ANSWER = " {value}"

RECALL_KINDS = ("needle", "multi_key", "multi_value", "json_kv")
KEY_STYLES = ("word", "uuid")
VALUE_NOUNS = {"numbers": "number", "words": "word", "uuids": "uuid"}  # value style -> its name in the singular

_ADJECTIVES = """
    amber ancient blue bold brief broad calm cold cosmic crisp dark deep dusty early empty famous fierce flat gentle
    giant grand happy heavy hollow icy idle kind large lazy lively long lucky misty modest noble odd patient polite
    proud quiet rare red round royal sandy shy silent simple small smooth solid sour steep strong sunny swift tame
    tender tidy tiny vivid white wide wise
"""
_NOUNS = """
    acorn apple badger barrel beacon bell boat branch brook button camel canyon cedar cherry clock clover copper
    cradle crow dolphin dragon eagle falcon fern fiddle forest garden hammer harp heron horse ivy kettle lake
    lantern leopard lion market mirror moth needle ocean orchard owl parrot pepper planet quarry raven river rose
    sailor shell spoon stone swan temple thunder tower tulip valley wagon whale window
"""
ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())


@dataclasses.dataclass(frozen=True)
class RecallRecord:
    """One question about one fact of one context.

    Attributes:
      context: the text that is compressed.
      question: what follows it, ready to be appended; ends where the answer begins.
      answer: the answer with the space before it.
      depth: where in the context the fact lies, as asked for or drawn: 0 at its beginning, 1 at its end.
      kind: one of `RECALL_KINDS`.
      values: what the answer must hold, where that is several strings; see `expected`.
    """

    context: str
    question: str
    answer: str
    depth: float
    kind: str
    values: tuple[str, ...] = ()

    @property
    def expected(self) -> tuple[str, ...]:
        """Every string that a right answer holds."""
        return self.values or (self.answer.strip(),)


def recall_record(kind: str, rng: np.random.Generator, *, filler: Sequence[str] = (), **options: Any) -> RecallRecord:
    """A record of one of `RECALL_KINDS`; `filler` is what needles hide in, `options` are those of every generator.

    Raises:
      ValueError: if the kind is unknown, and whatever the generators raise.
    """
    if kind in ("needle", "multi_key"):
        record = needle_record(rng, filler=filler if kind == "needle" else (), **options)
        return dataclasses.replace(record, kind=kind)
    if kind == "multi_value":
        return multi_value_record(rng, filler=filler, **options)
    if kind == "json_kv":
        return json_kv_record(rng, **options)
    raise ValueError(f"kind={kind!r} is not a recall record; use one of {', '.join(map(repr, RECALL_KINDS))}")


def needle_record(
    rng: np.random.Generator,
    *,
    num_tokens: int,
    count_tokens: Callable[[str], int],
    filler: Sequence[str] = (),
    depth: float | None = None,
    digits: int = 7,
    key_style: str = "word",
    value_style: str = "numbers",
) -> RecallRecord:
    """A needle, on a line of its own, in as much text as fits.

    Args:
      rng: source of every choice; the same state gives the same record.
      num_tokens: length that context, question and answer together come as close to as they can without passing it.
      count_tokens: number of tokens of a text.
      filler: paragraphs to hide the needle in, word by word from a random one on, over again if they are too few.
        Empty: the needle hides among needles with other keys.
      depth: place of the needle among the words or the other needles, 0 to 1; None draws it.
      digits: length of a number.
      key_style: "word" for adjective-noun, "uuid" for 128 random bits.
      value_style: "numbers", "words" (adjective-noun) or "uuids".

    Raises:
      ValueError: if an argument is out of range, or `num_tokens` is too small for the needle alone.
    """
    depth = _check_and_draw_depth(rng, depth, digits, key_style, value_style)
    taken: set[str] = set()
    key, value = draw_pair(rng, key_style, value_style, digits, taken)
    needle = NEEDLE.format(values=value_style, key=key, value=value)
    question = NEEDLE_QUESTION.format(value_noun=VALUE_NOUNS[value_style], key=key)
    answer = ANSWER.format(value=value)

    def context(pieces: list[str]) -> str:
        place = round(depth * len(pieces))
        before, after = ("".join(part).strip("\n") for part in (pieces[:place], pieces[place:]))
        return "\n".join(filter(None, (before, needle, after)))

    pieces = _haystack(rng, filler, key_style, value_style, digits, taken)
    text = _longest_context(context, pieces, num_tokens, count_tokens, question, answer)
    return RecallRecord(text, question, answer, depth, "needle")


def multi_value_record(
    rng: np.random.Generator,
    *,
    num_tokens: int,
    count_tokens: Callable[[str], int],
    filler: Sequence[str] = (),
    depth: float | None = None,
    digits: int = 7,
    key_style: str = "word",
    value_style: str = "numbers",
    num_values: int = 4,
) -> RecallRecord:
    """Several needles of one key; the answer is all their values, in the order of the text.

    Args:
      rng, num_tokens, count_tokens, filler, digits, key_style, value_style: as for `needle_record`.
      depth: place of the first needle in order of drawing; the others are drawn. The record's depth is their mean.
      num_values: needles of the key.

    Raises:
      ValueError: if an argument is out of range, or `num_tokens` is too small for the needles alone.
    """
    depth = _check_and_draw_depth(rng, depth, digits, key_style, value_style)
    depths = sorted([depth, *rng.random(num_values - 1).tolist()])
    taken: set[str] = set()
    key, _ = draw_pair(rng, key_style, value_style, digits, taken)
    values = tuple(draw_pair(rng, key_style, value_style, digits, set())[1] for _ in depths)
    question = VALUES_QUESTION.format(values=value_style, key=key)
    answer = ANSWER.format(value=", ".join(values))
    pieces = _haystack(rng, filler, key_style, value_style, digits, taken)

    def context(drawn: list[str]) -> str:
        places = [round(place * len(drawn)) for place in depths]
        parts = []
        for begin, end, value in zip([0, *places], [*places, len(drawn)], [*values, None], strict=True):
            parts.append("".join(drawn[begin:end]).strip("\n"))
            parts.append(NEEDLE.format(values=value_style, key=key, value=value) if value else "")
        return "\n".join(filter(None, parts))

    text = _longest_context(context, pieces, num_tokens, count_tokens, question, answer)
    return RecallRecord(text, question, answer, float(np.mean(depths)), "multi_value", values)


def json_kv_record(
    rng: np.random.Generator,
    *,
    num_tokens: int,
    count_tokens: Callable[[str], int],
    depth: float | None = None,
    digits: int = 7,
    key_style: str = "uuid",
    value_style: str = "uuids",
) -> RecallRecord:
    """A JSON object of as many pairs as fit, a pair on a line, and the question for one of them.

    Args:
      rng, num_tokens, count_tokens, digits, key_style, value_style: as for `needle_record`.
      depth: place of the pair asked for among the pairs, 0 to 1; None draws it.

    Raises:
      ValueError: if an argument is out of range, or `num_tokens` is too small for one pair.
    """
    depth = _check_and_draw_depth(rng, depth, digits, key_style, value_style)
    taken: set[str] = set()
    key, value = draw_pair(rng, key_style, value_style, digits, taken)
    others = (draw_pair(rng, key_style, value_style, digits, taken) for _ in itertools.count())

    def context(pairs: list[tuple[str, str]]) -> str:
        place = round(depth * len(pairs))
        return json.dumps(dict([*pairs[:place], (key, value), *pairs[place:]]), separators=(",\n ", ": "))

    question, answer = JSON_QUESTION.format(key=key), ANSWER.format(value=value)
    text = _longest_context(context, others, num_tokens, count_tokens, question, answer)
    return RecallRecord(text, question, answer, depth, "json_kv")


def further_questions(record: RecallRecord, rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """Up to `count` further facts of the record's context, as questions and answers in a drawn order.

    A needle in a text is the only one there: such a record has no others.
    """
    if record.kind == "json_kv":
        facts = [(JSON_QUESTION.format(key=key), value) for key, value in json.loads(record.context).items()]
    else:
        pattern = NEEDLE.format(values=r"(\w+)", key=r"(\S+)", value=r"(\S+)").replace(".", r"\.")
        facts = [
            (NEEDLE_QUESTION.format(value_noun=VALUE_NOUNS[noun], key=key), value)
            for noun, key, value in re.findall(pattern, record.context)
        ]
    others = [(question, ANSWER.format(value=value)) for question, value in facts if question != record.question]
    return [others[index] for index in rng.permutation(len(others))[:count]]


def paragraphs(texts: Iterable[str]) -> list[str]:
    """The paragraphs of all texts, as filler: what lies between blank lines, in order, none of them blank."""
    return [part for text in texts for part in re.split(r"\n\s*\n", text) if part.strip()]


def _haystack(
    rng: np.random.Generator, filler: Sequence[str], key_style: str, value_style: str, digits: int, taken: set[str]
) -> Iterator[str]:
    """Endless pieces of text to hide needles among: words of the filler, or needles of other keys."""
    if filler:
        yield from haystack_words(rng, filler)
    while True:
        key, value = draw_pair(rng, key_style, value_style, digits, taken)
        yield "\n" + NEEDLE.format(values=value_style, key=key, value=value)


def haystack_words(rng: np.random.Generator, filler: Sequence[str]) -> Iterator[str]:
    """The words of paragraphs without end, from a drawn one on, each with the white space before it.

    Raises:
      ValueError: if the paragraphs hold no words.
    """
    if not any(paragraph.strip() for paragraph in filler):
        raise ValueError("the filler holds no words; give paragraphs of text, or none for a haystack of needles")
    for index in itertools.count(int(rng.integers(len(filler)))):
        yield from re.findall(r"\s*\S{1,40}", "\n\n" + filler[index % len(filler)].strip("\n"))


def _longest_context(
    context: Callable[[list], str],
    pieces: Iterator,
    num_tokens: int,
    count_tokens: Callable[[str], int],
    question: str,
    answer: str,
) -> str:
    """`context` of as many of the first `pieces` as fit into `num_tokens` beside the question and the answer."""
    budget = num_tokens - count_tokens(question) - count_tokens(answer)
    drawn: list = []

    def build(count: int) -> str:
        drawn.extend(itertools.islice(pieces, max(0, count - len(drawn))))
        return context(drawn[:count])

    def fits(count: int) -> bool:
        return count_tokens(build(count)) <= budget

    if not fits(0):
        minimum = num_tokens - budget + count_tokens(build(0))
        raise ValueError(
            f"num_tokens={num_tokens} is too short for a recall record; this one needs {minimum} at least: raise "
            "data.row_length for training, --lengths for an evaluation"
        )
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return build(low)


def _check_and_draw_depth(
    rng: np.random.Generator, depth: float | None, digits: int, key_style: str, value_style: str
) -> float:
    if digits < 1:
        raise ValueError(f"digits={digits} must be at least 1")
    if key_style not in KEY_STYLES:
        raise ValueError(f"key_style={key_style!r} is unknown; use one of {', '.join(map(repr, KEY_STYLES))}")
    if value_style not in VALUE_NOUNS:
        raise ValueError(f"value_style={value_style!r} is unknown; use one of {', '.join(map(repr, VALUE_NOUNS))}")
    if depth is None:
        return float(rng.random())
    if not 0 <= depth <= 1:
        raise ValueError(f"depth={depth} must lie between 0, the beginning of the context, and 1, its end")
    return depth


def draw_pair(
    rng: np.random.Generator, key_style: str, value_style: str, digits: int, taken: set[str]
) -> tuple[str, str]:
    """A key that is not in `taken`, which it then joins, and a value."""
    while True:
        # A second adjective once half of the short keys are in use, so that a free key is always found soon.
        adjectives = 1 if 2 * len(taken) < len(ADJECTIVES) * len(NOUNS) else 2
        key = _draw_uuid(rng) if key_style == "uuid" else _draw_words(rng, adjectives)
        if key not in taken:
            break
    taken.add(key)
    if value_style == "uuids":
        return key, _draw_uuid(rng)
    if value_style == "words":
        return key, _draw_words(rng, adjectives=1)
    return key, str(rng.integers(1, 10)) + "".join(map(str, rng.integers(0, 10, size=digits - 1)))


def recall_sentences(seed: int, count: int, digits: int) -> Iterator[str]:
    """Needles and questions, for a tokenizer that is to know their words."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        key, value = draw_pair(rng, "word", "numbers", digits, set())
        yield NEEDLE.format(values="numbers", key=key, value=value)
        yield NEEDLE_QUESTION.format(value_noun="number", key=key) + ANSWER.format(value=value)


def _draw_uuid(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16)))


def _draw_words(rng: np.random.Generator, adjectives: int) -> str:
    words = [ADJECTIVES[rng.integers(len(ADJECTIVES))] for _ in range(adjectives)]
    return "-".join([*words, NOUNS[rng.integers(len(NOUNS))]])
