"""The repository's trained checkpoint answers from a compressed cache what its documents say, whatever that is."""

import re

import pytest
from command_line import ROOT

from unigist_jax.checkpoints import load_directory
from unigist_jax.data.recall import NEEDLE_QUESTION
from unigist_jax.inference import for_inference, generate, prefill

CHECKPOINT = ROOT / "checkpoints" / "unigist-8m-r4"
FACT = re.compile(r"(ancient-raven is: )\d+")
QUESTION = NEEDLE_QUESTION.format(value_noun="number", key="ancient-raven")


@pytest.fixture(scope="module")
def checkpoint():
    loaded = load_directory(CHECKPOINT, param_dtype="float32", dtype="float32")
    return for_inference(loaded.model), loaded.tokenizer


def test_a_fact_is_recalled_from_gists_alone(checkpoint):
    model, tokenizer = checkpoint
    text = (CHECKPOINT / "needle.txt").read_text()
    fact = FACT.search(text)
    text = text[fact.start() - 200 : fact.end() + 250]
    values = ["845", "273", "690"]
    documents = [tokenizer.encode(FACT.sub(rf"\g<1>{value}", text), bos=True).tolist() for value in values]
    behind = len(tokenizer.encode(text[FACT.search(text).end() :]))
    assert behind > model.layout.window + model.layout.ratio

    _, cache = prefill(model, documents, capacity=256, chunk_size=64)
    question = tokenizer.encode(QUESTION).tolist()
    answers = generate(model, [question] * len(values), max_new_tokens=4, cache=cache).tokens

    assert [tokenizer.decode(answer) for answer in answers] == [f" {value}" for value in values]


def test_which_of_many_facts_is_meant_is_recalled(checkpoint):
    model, tokenizer = checkpoint
    text = (CHECKPOINT / "facts.txt").read_text()
    facts = re.findall(r"for (\S+) is: (\d+)\.", text)
    assert len(facts) == 26 == text.count("magic")

    _, cache = prefill(model, [tokenizer.encode(text, bos=True).tolist()], capacity=512, chunk_size=256)
    texts = [NEEDLE_QUESTION.format(value_noun="number", key=key) for key, _ in facts]
    questions = [tokenizer.encode(question).tolist() for question in texts]
    answers = generate(model, questions, max_new_tokens=4, cache=cache.select([0] * len(facts))).tokens

    right = [tokenizer.decode(answer) == f" {value}" for answer, (_, value) in zip(answers, facts, strict=True)]
    assert sum(right) >= 24, right
