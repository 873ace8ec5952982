"""Perplexity and recall, each against a computation of its own."""

import re

import jax
import numpy as np
import pytest

from unigist_jax.data import RecallRecord, Tokenizer, pack_documents
from unigist_jax.evals import recall
from unigist_jax.evals.layouts import check_borders
from unigist_jax.evals.perplexity import border_jump, bucketed, long_documents, losses_by_position, packed_perplexity
from unigist_jax.evals.recall import TASKS, evaluate_recall, make_records, summarize
from unigist_jax.evals.samples import SampleLog
from unigist_jax.evals.scoring import score
from unigist_jax.inference.methods import METHODS
from unigist_jax.layout import GistLayout
from unigist_jax.model import LlamaConfig, init_llama

# --- perplexity -------------------------------------------------------------------------------------------------------

LAYOUT = GistLayout(4, 2, 8)
VOCAB = 300
LENGTH = 24


@pytest.fixture(scope="module")
def model():
    """Random weights, large enough that every visible token matters."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        rope_theta=10_000.0,
        dtype="float32",
    )
    return jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, init_llama(config, LAYOUT, 1))


@jax.jit
def _gist_logits(model, tokens):
    return model(tokens, attention="gist")


@jax.jit
def _full_logits(model, tokens):
    return model(tokens, attention="full")


def one_pass_logits(model, tokens, method):
    """Full logits of one document, in one pass; padded behind, which changes nothing before."""
    padded = np.zeros((1, -len(tokens) % 128 + len(tokens)), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray({"unigist": _gist_logits, "full": _full_logits}[method](model, padded))[0, : len(tokens)]


def losses_alone(model, tokens, method):
    """Loss of each token but the first of one document, float64."""
    logits = one_pass_logits(model, tokens, method).astype(np.float64)[:-1]
    logits -= logits.max(axis=-1, keepdims=True)
    picked = logits[np.arange(len(tokens) - 1), tokens[1:]]
    return np.log(np.exp(logits).sum(axis=-1)) - picked


@pytest.mark.parametrize(("attention", "method"), [("gist", "unigist"), ("full", "full")])
def test_packed_perplexity_is_that_of_the_documents_alone(attention, method, model):
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, VOCAB, size=size) for size in (3, 17, 1, 24, 9, 12, 5)]
    rows = pack_documents(documents, row_length=LENGTH, layout=LAYOUT, pad_id=0)
    assert len(rows) % 3  # the last batch of three is filled up
    result = packed_perplexity(model, rows, attention=attention, batch_size=3)
    losses = np.concatenate([losses_alone(model, document, method) for document in documents])
    assert result["targets"] == len(losses)
    np.testing.assert_allclose(result["loss"], losses.mean(), rtol=2e-6)
    np.testing.assert_allclose(result["perplexity"], np.exp(losses.mean()), rtol=1e-5)


def test_losses_by_position_do_not_know_the_chunks(model):
    documents = np.random.default_rng(1).integers(1, VOCAB, size=(3, LENGTH)).astype(np.int32)
    expected = np.mean([losses_alone(model, document, "unigist") for document in documents], axis=0)
    one_pass = losses_by_position(model, documents, attention="gist", batch_size=2)
    np.testing.assert_allclose(one_pass, expected, rtol=5e-6)
    for chunk in (4, 16):
        chunked = losses_by_position(model, documents, attention="gist", chunk_size=chunk, batch_size=3)
        np.testing.assert_allclose(chunked, one_pass, rtol=5e-6)


def test_losses_by_position_refuse_what_cannot_be(model):
    documents = np.ones((1, LENGTH), np.int32)
    with pytest.raises(ValueError, match="chunk size 6 is not a positive multiple of ratio=4; use 4 or 8"):
        losses_by_position(model, documents, attention="gist", chunk_size=6)
    with pytest.raises(ValueError, match="chunked reading needs attention='gist', not 'full'"):
        losses_by_position(model, documents, attention="full", chunk_size=4)
    with pytest.raises(ValueError, match="num_sinks=3, the weights 2"):
        losses_by_position(model, documents, attention="gist", layout=GistLayout(4, 3, 8))


def test_bucketed_averages_neighbours():
    losses = np.log(np.array([2.0, 8.0, 3.0, 3.0, 5.0]))
    result = bucketed(losses, 2)
    assert result["position"] == [1, 3, 5]
    np.testing.assert_allclose(result["perplexity"], [4, 3, 5])


def test_border_jump_is_after_less_before():
    """20 positions in chunks of 8: borders at 8 and 16; position p costs 1, right after a border more."""
    cost = np.ones(20)
    cost[8:10], cost[16:18] = 4.0, 2.0
    assert border_jump(cost[1:], 8, 2) == pytest.approx((3 + 1) / 2)
    assert border_jump(np.ones(19), 8, 4) == 0
    assert border_jump(np.arange(1.0, 20), 8, 1) == 1


def test_borders_are_those_of_the_method_s_own_chunks():
    layout = GistLayout(4, 2, 60, 64)
    for method, chunk_size in (("autocompressors", 128), ("activation_beacon", 64), ("full", 96)):
        check_borders(method, layout, chunk_size)
    check_borders("unigist", GistLayout(4, 2, 8), 96)
    with pytest.raises(ValueError, match=r"chunk size 96: activation_beacon has chunks of 64 .* use 64 or a multiple"):
        check_borders("activation_beacon", layout, 96)


def test_border_jump_uses_every_border_with_enough_after_it():
    cost = np.ones(16)
    cost[8:] = 3.0
    assert border_jump(cost[1:], 8, 8) == 2.0  # the last 8 of 16 positions are just enough
    with pytest.raises(ValueError, match="16 positions hold no border of chunks of 16; use a smaller chunk"):
        border_jump(cost[1:], 16, 1)


# --- recall -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{number:x}" for number in rng.integers(0, 400, size=100)) for _ in range(20)]
    return Tokenizer.train(texts, VOCAB, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def test_long_documents_are_cut_and_short_ones_left_out(tokenizer):
    texts = ["w1", "w1 w2 w3 " * 10, "w4 " * 30, "w5 w6 " * 20]
    found = long_documents(texts, tokenizer, 12, most=2)
    expected = [tokenizer.encode(text, bos=True)[:12] for text in texts[1:3]]
    np.testing.assert_array_equal(found, expected)
    longest = max(len(tokenizer.encode(text, bos=True)) for text in texts)
    with pytest.raises(ValueError, match=f"no held-out document has 1000 tokens, the longest {longest}; evaluate a sh"):
        long_documents(texts, tokenizer, 1000, most=2)


def record_tokens(tokenizer, record):
    prompt = [*tokenizer.encode(record.context, bos=True), *tokenizer.encode(record.question)]
    return [int(token) for token in prompt], [int(token) for token in tokenizer.encode(record.answer)]


def greedy(model, prompt, count, method, stop):
    """Continues a prompt by one whole pass a token."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        best = int(one_pass_logits(model, tokens, method)[-1].argmax())
        if best == stop:
            break
        tokens.append(best)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("method", ["unigist", "full"])
def test_recall_agrees_with_greedy_decoding_by_whole_passes(method, model, tokenizer, monkeypatch):
    """Some answers are what the model says, some begin like it, some are unlike; the longest has a short context."""
    monkeypatch.setattr(recall, "CAPACITY_STEP", 4)  # the cache has no more room than it must have
    contexts = ["w7 w8", "w1f w2e w3d " * 6]
    records = []
    for context, length in zip(contexts, (20, 2), strict=True):
        prompt, _ = record_tokens(tokenizer, RecallRecord(context, "\nw4:", "", 0.0, "needle"))
        said = tokenizer.decode(greedy(model, prompt, length, method, tokenizer.eos_id)).replace("\ufffd", "")
        records.append(RecallRecord(context, "\nw4:", said, 0.2, "needle"))
        records.append(RecallRecord(context, "\nw4:", said[:1] + " w99", 0.9, "needle"))
    records.append(RecallRecord(contexts[0], "\nw5:", " w1 w2", 0.5, "needle"))
    batches = []
    options = dict(method=method, chunk_size=8, batch_size=3)
    samples = evaluate_recall(model, tokenizer, records, done=batches.append, **options)
    assert [len(batch) for batch in batches] == [3, 2] and batches[0] + batches[1] == samples
    assert evaluate_recall(model, tokenizer, records, skip=3, **options) == samples[3:]
    answers = [record_tokens(tokenizer, record)[1] for record in records]
    for record, sample in zip(records, samples, strict=True):
        prompt, answer = record_tokens(tokenizer, record)
        output = tokenizer.decode(greedy(model, prompt, max(map(len, answers)) + 4, method, tokenizer.eos_id))
        best = one_pass_logits(model, prompt + answer, method)[len(prompt) - 1 : -1].argmax(axis=-1)
        assert sample["output"] == output
        assert sample["correct"] == (record.answer.strip().lower() in output.lower())
        assert sample["token_accuracy"] == pytest.approx(np.mean(best == answer))
        assert (sample["tokens"], sample["depth"]) == (len(prompt), record.depth)
    assert {sample["correct"] for sample in samples} == {True, False}


def test_summary_is_the_mean_over_all_and_by_depth():
    samples = [
        {"depth": depth, "correct": correct, "token_accuracy": accuracy, "distance": 9, "cache_bytes": 40}
        for depth, correct, accuracy in [(0.0, True, 1.0), (0.19, False, 0.5), (0.2, True, 1.0), (1.0, False, 0.25)]
    ]
    summary = summarize(samples)
    assert (summary["samples"], summary["accuracy"], summary["token_accuracy"]) == (4, 0.5, 0.6875)
    assert summary["cache_bytes"] == 40
    got = [(b["depth"], b["samples"], b["accuracy"], b["token_accuracy"]) for b in summary["by_depth"]]
    nothing = 0, None, None
    expected = [(0.1, 2, 0.5, 0.75), (0.3, 1, 1.0, 1.0), (0.5, *nothing), (0.7, *nothing), (0.9, 1, 0.0, 0.25)]
    assert got == [(pytest.approx(depth), *rest) for depth, *rest in expected]


def test_records_spread_their_facts_over_the_depths_and_repeat(tokenizer):
    filler = ["w1 w2 w3 w4 w5\n\nw6 w7 w8 w9"] * 5
    records = make_records(tokenizer, task="needle", length=400, count=3, filler=filler, digits=4)
    assert [record.depth for record in records] == [0.0, 0.5, 1.0]
    for record in records:
        prompt, answer = record_tokens(tokenizer, record)
        assert 350 < len(prompt) + len(answer) <= 400
        assert record.answer.strip() in record.context
    places = [record.context.index("magic") / len(record.context) for record in records]
    assert places[0] < 0.2 < places[1] < 0.8 < places[2] + 0.4 and places == sorted(places)
    assert records == make_records(tokenizer, task="needle", length=400, count=3, filler=filler, digits=4)
    (record,) = make_records(tokenizer, task="mk2", length=400, count=1, values="words")
    assert "magic word for" in record.question and re.fullmatch(r" [a-z]+-[a-z]+", record.answer)
    assert f"magic words for {record.question.split()[7]} is:{record.answer}." in record.context


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_task_makes_records_that_hold_their_answers(task, tokenizer):
    filler = ["w1 w2 w3 w4 w5\n\nw6 w7 w8 w9"] * 5
    options = dict(task=task, length=1200, count=3, filler=filler, digits=4)
    records = make_records(tokenizer, **options)
    assert records == make_records(tokenizer, **options)
    for record in records:
        prompt, answer = record_tokens(tokenizer, record)
        assert 900 < len(prompt) + len(answer) <= 1200
        assert all(record.context.count(text) == 1 for text in record.expected)
    if task == "json_kv":
        asked = [re.findall(r'Key: "(\S+)"\nCorresponding value: (\S+)', record.context) for record in records]
        assert all(len(pairs) == 2 and f'"{key}": "{value}"' in record.context
                   for record, pairs in zip(records, asked, strict=True) for key, value in pairs)  # fmt: skip
        assert all(
            record.question.split('"')[1] not in dict(pairs) for record, pairs in zip(records, asked, strict=True)
        )


def test_scores_are_those_of_one_pass(model):
    """Log probabilities of tokens behind a ragged batch of contexts; the cache stays as it was."""
    rng = np.random.default_rng(3)
    contexts = [rng.integers(1, VOCAB, size).tolist() for size in (5, 14)]
    lists = [rng.integers(1, VOCAB, size).tolist() for size in (6, 2)]
    _, cache = METHODS["unigist"].prefill(model, contexts, capacity=24)
    for _ in range(2):
        scored = score(METHODS["unigist"], model, cache, lists)
        for context, tokens, got in zip(contexts, lists, scored, strict=True):
            losses = losses_alone(model, context + tokens, "unigist")[len(context) :]
            np.testing.assert_allclose(got.log_probs, -losses, rtol=1e-5)
            best = one_pass_logits(model, context + tokens, "unigist")[len(context) : -1].argmax(-1)
            np.testing.assert_array_equal(got.is_best, best == tokens[1:])


def test_samples_go_on_where_they_were_cut_off(tmp_path):
    log = SampleLog(tmp_path / "a" / "log.jsonl", {"ratio": 4})
    log.add([{"x": 1}, {"x": 2}])
    with log.path.open("a") as file:
        file.write('{"x": 3, "cut')
    again = SampleLog(log.path, {"ratio": 4})
    assert again.samples == [{"x": 1}, {"x": 2}]
    again.add([{"x": 3}])
    assert SampleLog(log.path, {"ratio": 4}).samples == [{"x": 1}, {"x": 2}, {"x": 3}]
    with pytest.raises(ValueError, match=r"another setting \(ratio differ\); delete it, or choose another --output"):
        SampleLog(log.path, {"ratio": 8})
