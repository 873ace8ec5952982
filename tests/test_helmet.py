"""HELMET's reader and metrics on hand-made records, and the harness's model class on a local task."""

import importlib.util
import json
import math
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from chat_tokenizer import write_chat_tokenizer

from unigist_jax.data import Tokenizer
from unigist_jax.evals import metrics
from unigist_jax.evals.helmet import CATEGORIES, encoded, mean_score, read_helmet, source, table
from unigist_jax.layout import GistLayout
from unigist_jax.model import LlamaConfig, init_llama


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_records_of_every_category_are_read(tmp_path):
    rag = {"question": "Who?", "answers": ["Ada Lovelace"], "ctxs": [{"title": "T", "text": "Ada wrote."}]}
    (record,) = read_helmet(lines(tmp_path / "rag", rag), "rag")
    assert record.context.endswith("Document (Title: T): Ada wrote.") and "Who?" not in record.context
    assert record.question == "\n\nQuestion: Who?\nAnswer:"
    assert CATEGORIES["rag"].score("It was the ada lovelace!", record) == 1

    rerank = {"qid": "q", "query": "sea", "ctxs": [{"id": i, "label": i, "text": f"text {i}"} for i in range(3)]}
    (record,) = read_helmet(lines(tmp_path / "rerank", rerank), "rerank")
    assert "[id: 2] text 2" in record.context and record.labels == {"0": 0.0, "1": 1.0, "2": 2.0}
    assert CATEGORIES["rerank"].score("Ranking: 2 > 1 > 0", record) == 1

    demos = [{"question": "Key: a", "answer": "b"}]
    recall = {"context": "{}", "question": "Key: k", "answer": ["11", "22"], "demos": demos}
    (record,) = read_helmet(lines(tmp_path / "recall", recall), "recall")
    assert record.context.endswith("Key: a\nb\n\n{}") and record.question == "\n\nKey: k"
    assert CATEGORIES["recall"].score("it is 22", record) == 0.5

    for category, answer, output in (
        ("longqa", "the red fox", "a red fox"),
        ("choice", "B", "B. sea"),
        ("icl", 3, " 3\nx"),
    ):
        plain = {"context": "c", "question": "q", "answer": answer}
        records = read_helmet(lines(tmp_path / category, plain, plain), category, most=1)
        assert len(records) == 1 and 0.6 < CATEGORIES[category].score(output, records[0]) <= 1
    (record,) = read_helmet(lines(tmp_path / "summary", {"context": "c", "answer": "One. Two."}), "summary")
    assert CATEGORIES["summary"].score("One. Two.", record) == 1
    assert mean_score([{"score": 1.0}, {"score": 0.5}]) == 75


def test_bad_records_are_named(tmp_path):
    with pytest.raises(ValueError, match="choose one of rag, rerank"):
        read_helmet(tmp_path, "niah")
    with pytest.raises(ValueError, match=r"x, line 2: lacks 'ctxs'; a rag record"):
        good = {"question": "q", "answers": [], "ctxs": []}
        read_helmet(lines(tmp_path / "x", good, {"question": "q", "answers": []}), "rag")
    with pytest.raises(ValueError, match="holds no record"):
        read_helmet(lines(tmp_path / "y"), "rag")


def test_sources_are_checked_before_any_work(tmp_path, monkeypatch):
    file = lines(tmp_path / "z", {"context": "c", "answer": "x"})
    assert source(f"summary={file}") == ("summary", file)
    with pytest.raises(ValueError, match="line 1: lacks 'ctxs'"):
        source(f"rag={file}")
    with pytest.raises(FileNotFoundError, match="absent"):
        source(f"rag={tmp_path}/absent")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs rouge_score; pip install -r requirements-eval\.txt"):
        source(f"summary={file}")


def test_the_table_has_the_mean_of_each_category_s_files():
    scores = {"a": {"choice": 50, "rag": 20}, "b": {"choice": 10, "rag": 30}}
    results = [{"method": m, "category": c, "score": score} for m, of in scores.items() for c, score in of.items()]
    results += [{"method": method, "category": "longqa", "score": 30} for method in scores]
    assert table(results).splitlines() == [
        "| method | RAG | long QA | average |",
        "| --- | --- | --- | --- |",
        "| a | 20.0 | 40.0 | 30.0 |",
        "| b | 30.0 | 20.0 | 25.0 |",
    ]


def test_a_chat_record_is_one_message_that_the_question_ends(tmp_path):
    write_chat_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    (record,) = read_helmet(lines(tmp_path / "x", {"context": "A story.", "question": "Who?", "answer": "x"}), "longqa")
    context, question = encoded(record, tokenizer, chat=True)
    whole = tokenizer.encode_chat([{"role": "user", "content": record.context + record.question}])
    assert tokenizer.decode(context + question) == tokenizer.decode(whole)
    assert tokenizer.decode(context).endswith("A story.") and tokenizer.decode(question).startswith(record.question)
    assert context[:2] == whole[:2].tolist() and question[-2:] == whole[-2:].tolist()
    plain = encoded(record, tokenizer, chat=False)
    assert [tokenizer.decode(part) for part in plain] == [record.context, record.question]


def test_metrics():
    assert metrics.normalised("The  Cat, a dog!") == "cat dog"
    assert (
        metrics.substring_match("I saw the U.S.A. flag", ["USA"]) == 1 and metrics.substring_match("x", ["y", "z"]) == 0
    )
    assert metrics.exact_label("Label: joy\nmore", ["joy"]) == 1 and metrics.exact_label("joyful", ["joy"]) == 0
    assert metrics.choice("The answer is C.", ["C"]) == 1 and metrics.choice("none", ["A"]) == 0
    assert metrics.rouge("the cat sat", ["the cat sat on a mat"], "rougeL", "recall") == pytest.approx(0.5)
    assert metrics.rouge("x", ["y", "x"], "rougeLsum", "fmeasure") == 1


def test_ranking_is_scored_by_hand_and_ids_left_out_gain_nothing():
    labels = {"a": 3.0, "b": 0.0, "c": 1.0}
    ideal = 3 + 1 / math.log2(3)
    assert metrics.ranking_ndcg("first x > y, then b > a > c", labels, 5) == pytest.approx(
        (3 / math.log2(3) + 1 / 2) / ideal
    )
    assert metrics.ranking_ndcg("c > b > c", labels, 5) == pytest.approx(1 / ideal)
    assert metrics.ranking_ndcg("no ranking", labels, 5) == 0
    assert metrics.ranking_ndcg("b > c > a", labels, 2) == pytest.approx(1 / math.log2(3) / ideal)


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed (requirements-eval.txt)"
)
def test_the_harness_scores_a_local_task(tmp_path):
    import lm_eval
    from lm_eval.tasks import TaskManager

    from unigist_jax.evals.harness import HarnessModel

    texts = [" ".join(f"w{number:x}" for number in np.random.default_rng(0).integers(0, 400, size=100))] * 20
    tokenizer = Tokenizer.train(texts, 300, tmp_path / "tokenizer.model")
    model = init_llama(LlamaConfig(300, 16, 24, 1, 2, 1, 8, dtype="float32"), GistLayout(4, 2, 8), 0)
    lines(tmp_path / "data.jsonl", *({"q": f"w{i} w{i + 1}", "a": ["w1", "w2 w3"], "gold": i % 2} for i in range(4)))
    (tmp_path / "local.yaml").write_text(
        f"task: local\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {tmp_path}/data.jsonl}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{a}}'\n"
        "doc_to_target: gold\nmetric_list:\n  - metric: acc\n"
    )
    harness = HarnessModel(model, tokenizer, batch_size=3, progress=False)
    result = lm_eval.simple_evaluate(
        harness, tasks=["local"], task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False)
    )
    assert 0 <= result["results"]["local"]["acc,none"] <= 1 and len(result["samples"]["local"]) == 4
    for sample in result["samples"]["local"]:
        for (text, choice), ((value, _),) in zip(
            [(sample["doc"]["q"], " " + choice) for choice in sample["doc"]["a"]], sample["resps"], strict=True
        ):
            prompt = tokenizer.encode(text, bos=True).tolist()
            whole = tokenizer.encode(text + choice, bos=True).tolist()
            padded = np.zeros((1, 32), np.int32)
            padded[0, : len(whole)] = whole
            logits = np.asarray(model(jnp.asarray(padded)))[0].astype(np.float64)
            logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
            expected = sum(logits[i - 1, whole[i]] for i in range(len(prompt), len(whole)))
            assert float(value) == pytest.approx(expected, rel=1e-4)

    def greedy(text, count):
        tokens = tokenizer.encode(text, bos=True).tolist()
        begin = len(tokens)
        while len(tokens) < begin + count:
            padded = np.zeros((1, 32), np.int32)
            padded[0, : len(tokens)] = tokens
            tokens.append(int(model(jnp.asarray(padded))[0, len(tokens) - 1].argmax()))
        return tokenizer.decode(tokens[begin:])

    whole = greedy("w1 w2", 6)
    stop = whole[len(whole) // 2]
    asked = [
        ("w1 w2", {"max_gen_toks": 6}),
        ("w1 w2", {"max_gen_toks": 6, "until": [stop]}),
        ("w3", {"max_gen_toks": 2}),
    ]
    texts = harness.generate_until([SimpleNamespace(args=args) for args in asked])
    assert texts == [whole, whole[: whole.index(stop)], greedy("w3", 2)]
    with pytest.raises(ValueError, match="generation is greedy here"):
        harness.generate_until([SimpleNamespace(args=("w1", {"do_sample": True, "temperature": 0.7}))])
