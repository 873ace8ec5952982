"""Evaluates a trained run or a Hugging Face Llama: held-out perplexity, perplexity by position, recall.

  python -m launch.evaluate --workdir=runs/tiny --suite=perplexity,boundary,recall --method=unigist,full
  python -m launch.evaluate --workdir=runs/full --suite=recall --method=snapkv,adakv --ratio=4 --tasks=needle,mk2 \\
      --lengths=1024,2048
  python -m launch.evaluate --workdir=path/to/hf_llama --suite=helmet --helmet=rag=data/kilt/nq.jsonl --method=snapkv

Prints the numbers, and writes DIR/SUITE.json, tables (recall.md, helmet.md), plots (boundary.png, recall.png) and
DIR/samples/*.jsonl, DIR = --output or WORKDIR/eval.
Run again, it goes on behind the samples that are there.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from absl import flags
from tqdm import tqdm

from launch.flags import define_workdir, output_folder, run_main, whole_numbers
from unigist_jax.checkpoints import Loaded, load_directory
from unigist_jax.data.from_config import heldout_rows, recall_filler, texts
from unigist_jax.evals import helmet, perplexity, plots, recall
from unigist_jax.evals.layouts import check_borders, evaluation_layout, one_pass_attention
from unigist_jax.evals.samples import SampleLog
from unigist_jax.inference.methods import METHODS, ROUNDED, trained_method
from unigist_jax.inference.prefill import check_chunk_size
from unigist_jax.layout import GistLayout

SUITES = ("perplexity", "boundary", "recall", "helmet")
CHUNK_SIZE = 128  # raws of a prefill chunk, where the model was trained without chunks

_WORKDIR = define_workdir()
_SUITE = flags.DEFINE_list("suite", list(SUITES[:3]), f"which of {', '.join(SUITES)}, comma-separated")
_METHOD = flags.DEFINE_list("method", None, f"which of {', '.join(METHODS)} (default: as the model was trained)")
_OUTPUT = flags.DEFINE_string("output", None, "directory of the results (default: WORKDIR/eval)")
_RATIO = flags.DEFINE_integer("ratio", None, "another ratio; the window becomes its next multiple", lower_bound=1)
_ROWS = flags.DEFINE_integer("rows", 64, "perplexity: held-out rows", lower_bound=1)
_LENGTHS = flags.DEFINE_list("lengths", ["512"], "recall: tokens of records; boundary: of documents, the longest")
_DOCUMENTS = flags.DEFINE_integer("documents", 32, "boundary: held-out documents", lower_bound=1)
_CHUNK_SIZE = flags.DEFINE_integer(
    "chunk_size", None, "boundary, recall, helmet: raws of a prefill chunk (default: as trained, or 128)", lower_bound=1
)
_BUCKET = flags.DEFINE_integer("bucket", 16, "boundary: positions averaged in the plot", lower_bound=1)
_RECORDS = flags.DEFINE_integer("records", 32, "recall: records of each task", lower_bound=1)
_TASKS = flags.DEFINE_list("tasks", ["needle"], f"recall: which of {', '.join(recall.TASKS)}")
_DIGITS = flags.DEFINE_integer("digits", None, "recall: digits of a number (default: as trained, or 7)", lower_bound=1)
_HELMET = flags.DEFINE_multi_string("helmet", [], "helmet: CATEGORY=FILE of your copy of its data; may be repeated")
_HELMET_RECORDS = flags.DEFINE_integer("helmet_records", 100, "helmet: records of each file; 0: all", lower_bound=0)
_HELMET_CHAT = flags.DEFINE_bool("helmet_chat", False, "helmet: each record a user's message, by the chat template")
_BATCH = flags.DEFINE_integer("batch_size", 8, "sequences at a time", lower_bound=1)


class Evaluation(NamedTuple):
    """What every suite is given; `layouts` by method."""

    loaded: Loaded
    layouts: dict[str, GistLayout]
    chunk_size: int
    lengths: list[int]
    directory: Path
    setting: dict


def main(_: list[str]) -> None:
    choices = ("suite", _SUITE.value, SUITES), ("method", _METHOD.value, METHODS), ("tasks", _TASKS.value, recall.TASKS)
    for name, chosen, known in choices:
        if chosen == []:
            raise ValueError(f"--{name} is empty; choose among {sorted(known)}, or leave it out")
        unknown = sorted(set(chosen or ()) - set(known))
        if unknown:
            raise ValueError(f"--{name}: unknown {unknown}; choose among {sorted(known)}")
    lengths = sorted(whole_numbers(_LENGTHS))
    if not lengths:
        raise ValueError("--lengths is empty; give whole numbers, such as 1024,2048, or leave it out")
    loaded = load_directory(_WORKDIR.value)
    model = loaded.model
    methods = _METHOD.value or [trained_method(model.config, model.layout)]
    layouts = {method: evaluation_layout(model, method, _RATIO.value) for method in methods}
    chunk_size = _CHUNK_SIZE.value or model.layout.chunk or CHUNK_SIZE
    _check(methods, layouts, chunk_size, lengths)
    directory = output_folder(_OUTPUT.value or Path(_WORKDIR.value) / "eval")
    ratio = _RATIO.value or model.layout.ratio
    setting = {"workdir": _WORKDIR.value, "step": loaded.step, "ratio": ratio, "window": layouts[methods[0]].window}
    evaluation = Evaluation(loaded, layouts, chunk_size, lengths, directory, setting)
    suites = {"perplexity": _perplexity, "boundary": _boundary, "recall": _recall, "helmet": _helmet}
    for suite in _SUITE.value:
        result = setting | suites[suite](evaluation)
        (directory / f"{suite}.json").write_text(json.dumps(result, indent=2) + "\n")
        print(f"wrote {directory / suite}.json")


def _check(methods: list[str], layouts: dict[str, GistLayout], chunk_size: int, lengths: list[int]) -> None:
    """Raises ValueError for flags that do not go together, before any work."""
    suites = set(_SUITE.value)
    for method in methods:
        if suites & {"perplexity", "boundary"}:
            one_pass_attention(method)
        if "perplexity" in suites and method in ROUNDED:
            raise ValueError(
                f"--suite=perplexity reads in one pass, where {method} rounds nothing; take boundary, recall"
            )
        if suites & {"boundary", "recall", "helmet"} and method in ("unigist", "activation_beacon", *ROUNDED):
            check_chunk_size(chunk_size, layouts[method])
    if "helmet" in suites:
        for entry in _HELMET.value or [""]:
            helmet.source(entry)
    if "boundary" in suites:
        for method, layout in layouts.items():
            layout.num_units(lengths[-1])
            check_borders(method, layout, chunk_size)
        if lengths[-1] <= chunk_size:
            raise ValueError(
                f"--lengths={lengths[-1]} holds no border of chunks of --chunk_size={chunk_size}; "
                "give a longer length or a smaller chunk"
            )


def _perplexity(evaluation: Evaluation) -> dict:
    loaded, results = evaluation.loaded, {}
    rows = heldout_rows(loaded.data, loaded.model.layout, loaded.tokenizer, _ROWS.value)
    for method, layout in evaluation.layouts.items():
        attention = one_pass_attention(method)
        result = results[method] = perplexity.packed_perplexity(
            loaded.model, rows, attention=attention, batch_size=_BATCH.value, layout=layout
        )
        print(f"held-out perplexity, {method}: {result['perplexity']:.3f} on {result['targets']:,.0f} tokens")
    return {"methods": results}


def _boundary(evaluation: Evaluation) -> dict:
    loaded = evaluation.loaded
    heldout = texts(loaded.data, loaded.tokenizer, "heldout")
    length, chunk = evaluation.lengths[-1], evaluation.chunk_size
    documents = perplexity.long_documents(heldout, loaded.tokenizer, length, _DOCUMENTS.value)
    curves, results = {}, {}
    for method, layout in evaluation.layouts.items():
        attention = one_pass_attention(method)
        by_position = functools.partial(
            perplexity.losses_by_position,
            loaded.model,
            documents,
            attention=attention,
            layout=layout,
            batch_size=_BATCH.value,
        )
        losses = by_position(chunk_size=chunk if attention == "gist" else None, gist_dtype=ROUNDED.get(method))
        curves[method] = perplexity.bucketed(losses, _BUCKET.value)
        jump = perplexity.border_jump(losses, chunk, reach=max(1, min(16, chunk // 2)))
        results[method] = curves[method] | {"loss": float(losses.mean()), "border_jump": jump}
        line = f"loss over {len(documents)} documents of {length} tokens, {method}: {losses.mean():.4f} nats; "
        line += f"after chunk borders {jump:+.4f}"
        if attention == "gist":
            difference = float(abs(losses - by_position(chunk_size=None)).max())
            results[method] |= {"largest_difference_to_one_pass": difference}
            line += f"; from one pass at most {difference:.1e}"
        print(line)
    plots.plot_by_position(curves, chunk, evaluation.directory / "boundary.png")
    return {"chunk_size": chunk, "documents": len(documents), "length": length, "methods": results}


def _helmet(evaluation: Evaluation) -> dict:
    loaded, results = evaluation.loaded, {}
    for category, file in map(helmet.source, _HELMET.value):
        records = helmet.read_helmet(file, category, _HELMET_RECORDS.value)
        for method, layout in evaluation.layouts.items():
            name = f"{category}, {helmet.short_name(file)}, {method}"
            chat = {"chat": _HELMET_CHAT.value}
            ask = functools.partial(helmet.evaluate_helmet, loaded.model, loaded.tokenizer, records, category, **chat)
            options = chat | {"file": str(file)}
            samples = _logged(evaluation, "helmet", name, len(records), method, layout, ask, options)
            metric, score = helmet.CATEGORIES[category].metric, helmet.mean_score(samples)
            asked = {"category": category, "file": str(file), "method": method}
            results[name] = asked | {"metric": metric, "score": score}
            print(f"helmet, {name}: {metric} {score:.1f} of {len(samples)} records")
    table = helmet.table(results.values())
    (evaluation.directory / "helmet.md").write_text(table)
    print(table, end="")
    return {"results": results}


def _recall(evaluation: Evaluation) -> dict:
    loaded, results = evaluation.loaded, {}
    filler = recall_filler(loaded.data, "heldout", loaded.tokenizer)
    digits = _DIGITS.value or loaded.data.recall_digits
    drawn = {"count": _RECORDS.value, "filler": filler, "digits": digits, "values": loaded.data.recall_values}
    records = {  # all of them first: a length may be too short for a task
        (task, length): recall.make_records(loaded.tokenizer, task=task, length=length, **drawn)
        for length in evaluation.lengths
        for task in _TASKS.value
    }
    for (task, length), asked in records.items():
        for method, layout in evaluation.layouts.items():
            name = f"{task}, {length}, {method}"
            ask = functools.partial(recall.evaluate_recall, loaded.model, loaded.tokenizer, asked)
            samples = _logged(evaluation, "recall", name, len(asked), method, layout, ask, {"digits": digits})
            result = results[name] = recall.summarize(samples) | {"task": task, "length": length, "method": method}
            print(
                f"recall, {name}: {result['accuracy']:.3f} of {len(samples)} records, "
                f"{result['token_accuracy']:.3f} of their answers' tokens, {result['cache_bytes']:,.0f} bytes a cache"
            )
    plots.plot_recall(results, evaluation.directory / "recall.png")
    (evaluation.directory / "recall.md").write_text(recall.markdown(results.values()))
    return {"seed": recall.TEST_SEED, "results": results}


def _logged(
    evaluation: Evaluation,
    suite: str,
    name: str,
    count: int,
    method: str,
    layout: GistLayout,
    ask: Callable,
    options: Mapping = MappingProxyType({}),
) -> list[dict]:
    """The samples of one task and method: those on disk, and the rest as they come from `ask`."""
    setting = evaluation.setting | dataclasses.asdict(layout) | {"name": name, "seed": recall.TEST_SEED, **options}
    path = evaluation.directory / "samples" / f"{suite},{name.replace(', ', ',')},ratio={layout.ratio}.jsonl"
    log = SampleLog(path, setting | {"records": count})
    with tqdm(total=count, initial=len(log.samples), unit="record", desc=name) as bar:

        def done(new: list[dict]) -> None:
            log.add(new)
            bar.update(len(new))

        ask(
            method=method,
            layout=layout,
            chunk_size=evaluation.chunk_size,
            batch_size=_BATCH.value,
            skip=len(log.samples),
            done=done,
        )
    return log.samples


if __name__ == "__main__":
    run_main(main)
