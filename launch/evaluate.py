"""Evaluates a trained run: held-out perplexity, perplexity by position, recall.

  python -m launch.evaluate --workdir=runs/tiny --suite=perplexity,boundary,recall --method=unigist,full

Writes DIR/SUITE.json (and SUITE.png) with DIR = --output or WORKDIR/eval, and prints the numbers.
"""

from __future__ import annotations

import functools
import json

from absl import flags
from tqdm import tqdm

from launch.flags import define_workdir, output_directory, run_main
from unigist_jax.checkpoints import load_directory
from unigist_jax.data import RECALL_KINDS
from unigist_jax.data.corpus import load_documents
from unigist_jax.data.from_config import recall_filler, spread_rows, text_rows
from unigist_jax.evals import perplexity, plots, recall
from unigist_jax.inference.prefill import check_chunk_size
from unigist_jax.layout import GistLayout

SUITES = ("perplexity", "boundary", "recall")
METHODS = ("unigist", "full")

_WORKDIR = define_workdir()
_SUITE = flags.DEFINE_list("suite", list(SUITES), f"which of {', '.join(SUITES)}, comma-separated")
_METHOD = flags.DEFINE_list("method", ["unigist"], f"which of {', '.join(METHODS)}, comma-separated")
_OUTPUT = flags.DEFINE_string("output", None, "directory of the results (default: WORKDIR/eval)")
_RATIO = flags.DEFINE_integer("ratio", None, "another ratio; the window becomes its next multiple", lower_bound=1)
_ROWS = flags.DEFINE_integer("rows", 64, "perplexity: held-out rows", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 512, "boundary and recall: tokens of a document or record", lower_bound=8)
_DOCUMENTS = flags.DEFINE_integer("documents", 32, "boundary: held-out documents", lower_bound=1)
_CHUNK_SIZE = flags.DEFINE_integer("chunk_size", 128, "boundary and recall: raws of a prefill chunk", lower_bound=1)
_BUCKET = flags.DEFINE_integer("bucket", 16, "boundary: positions averaged in the plot", lower_bound=1)
_RECORDS = flags.DEFINE_integer("records", 32, "recall: records of each kind", lower_bound=1)
_KINDS = flags.DEFINE_list("kinds", None, "recall: kinds of records (default: those of the run)")
_BATCH = flags.DEFINE_integer("batch_size", 8, "sequences at a time", lower_bound=1)


def main(_: list[str]) -> None:
    choices = ("suite", _SUITE.value, SUITES), ("method", _METHOD.value, METHODS), ("kinds", _KINDS.value, RECALL_KINDS)
    for name, chosen, known in choices:
        unknown = sorted(set(chosen or ()) - set(known))
        if unknown:
            raise ValueError(f"--{name}: unknown {unknown}; choose among {sorted(known)}")
    loaded = load_directory(_WORKDIR.value)
    model, own = loaded.model, loaded.model.layout
    ratio = _RATIO.value or own.ratio
    layout = GistLayout(ratio, own.num_sinks, -(-own.window // ratio) * ratio)
    if {"boundary", "recall"} & set(_SUITE.value):
        layout.num_units(_LENGTH.value)
        check_chunk_size(_CHUNK_SIZE.value, layout)
    if "boundary" in _SUITE.value and _LENGTH.value <= _CHUNK_SIZE.value:
        raise ValueError(
            f"--length={_LENGTH.value} holds no border of chunks of --chunk_size={_CHUNK_SIZE.value}; "
            "give a longer length or a smaller chunk"
        )
    directory = output_directory(_OUTPUT.value, _WORKDIR.value, "eval")
    setting = {"workdir": _WORKDIR.value, "step": loaded.step, "ratio": layout.ratio, "window": layout.window}
    suites = {"perplexity": _perplexity, "boundary": _boundary, "recall": _recall}
    for suite in _SUITE.value:
        result = setting | suites[suite](loaded.data, model, loaded.tokenizer, layout, directory)
        (directory / f"{suite}.json").write_text(json.dumps(result, indent=2) + "\n")
        print(f"wrote {directory / suite}.json")


def _attention(method: str) -> str:
    return "full" if method == "full" else "gist"


def _perplexity(data, model, tokenizer, layout, directory) -> dict:
    rows = spread_rows(text_rows(data, layout, tokenizer, "heldout"), _ROWS.value)
    results = {}
    for method in _METHOD.value:
        attention = _attention(method)
        results[method] = perplexity.packed_perplexity(
            model, rows, attention=attention, batch_size=_BATCH.value, layout=layout
        )
        result = results[method]
        print(f"held-out perplexity, {method}: {result['perplexity']:.3f} on {result['targets']:,.0f} tokens")
    return {"methods": results}


def _boundary(data, model, tokenizer, layout, directory) -> dict:
    texts = load_documents(
        data.source, split="heldout", heldout_fraction=data.heldout_fraction, max_documents=data.max_documents
    )["text"]
    documents = perplexity.long_documents(texts, tokenizer, _LENGTH.value, _DOCUMENTS.value)
    chunk, curves, results = _CHUNK_SIZE.value, {}, {}
    for method in _METHOD.value:
        by_position = functools.partial(
            perplexity.losses_by_position,
            model,
            documents,
            attention=_attention(method),
            layout=layout,
            batch_size=_BATCH.value,
        )
        losses = by_position(chunk_size=None if method == "full" else chunk)
        curves[method] = perplexity.bucketed(losses, _BUCKET.value)
        results[method] = curves[method] | {"loss": float(losses.mean())}
        line = f"loss over {len(documents)} documents of {_LENGTH.value} tokens, {method}: {losses.mean():.4f} nats"
        if method != "full":
            jump = perplexity.border_jump(losses, chunk, reach=max(1, min(16, chunk // 2)))
            difference = float(abs(losses - by_position(chunk_size=None)).max())
            results[method] |= {"border_jump": jump, "largest_difference_to_one_pass": difference}
            line += f"; after chunk borders {jump:+.4f}; from one pass at most {difference:.1e}"
        print(line)
    plots.plot_by_position(curves, chunk, directory / "boundary.png")
    return {"chunk_size": chunk, "documents": len(documents), "length": _LENGTH.value, "methods": results}


def _recall(data, model, tokenizer, layout, directory) -> dict:
    filler = recall_filler(data, "heldout")
    results, summaries = {}, {}
    for kind in _KINDS.value or data.recall_kinds.split(","):
        records = recall.make_records(
            tokenizer,
            kind=kind,
            length=_LENGTH.value,
            count=_RECORDS.value,
            filler=filler,
            digits=data.recall_digits,
        )
        for method in _METHOD.value:
            name = f"{kind}, {method}"
            with tqdm(total=len(records), unit="record", desc=name) as bar:
                samples = recall.evaluate_recall(
                    model,
                    tokenizer,
                    records,
                    method=method,
                    layout=layout,
                    chunk_size=_CHUNK_SIZE.value,
                    batch_size=_BATCH.value,
                    progress=lambda done, bar=bar: bar.update(done - bar.n),
                )
            summaries[name] = recall.summarize(samples)
            results[name] = summaries[name] | {"records": samples}
            print(
                f"recall, {name}: {summaries[name]['accuracy']:.3f} of {len(samples)} records, "
                f"{summaries[name]['token_accuracy']:.3f} of their answers' tokens"
            )
    plots.plot_recall(summaries, directory / "recall.png")
    return {"length": _LENGTH.value, "seed": recall.TEST_SEED, "results": results}


if __name__ == "__main__":
    run_main(main)
