"""The repository's trained checkpoint answers from a compressed cache what its document says, whatever that is."""

import re

from command_line import ROOT

from unigist_jax.checkpoints import load_directory
from unigist_jax.inference import for_inference, generate, prefill

CHECKPOINT = ROOT / "checkpoints" / "unigist-8m-r4"
FACT = re.compile(r"(ancient-raven is: )\d+")
QUESTION = "\nThe special magic number for ancient-raven mentioned in the provided text is:"


def test_a_fact_is_recalled_from_gists_alone():
    loaded = load_directory(CHECKPOINT, param_dtype="float32", dtype="float32")
    model, tokenizer = for_inference(loaded.model), loaded.tokenizer
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
