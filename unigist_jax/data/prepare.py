"""From sources to packed rows on disk, in parallel. The result depends on the request alone, not on the workers.

Each part of a source becomes one shard of either split. A shard is written whole or not at all, so that a preparation
that was interrupted goes on with the parts that are missing.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unigist_jax.data.corpus import SPLITS, is_heldout
from unigist_jax.data.pack import pack_documents
from unigist_jax.data.prepared import FORMAT, MANIFEST, is_prepared, summarize, write_shard
from unigist_jax.data.sources import PLAIN, Part, Reading, find_parts, read_part
from unigist_jax.data.tokenize import Tokenizer
from unigist_jax.disk import writing
from unigist_jax.layout import GistLayout

REQUEST = "request.json"
CONFIG_FILE = "config.json"  # of a run's work directory, and of Hugging Face's


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be prepared.

    Attributes:
      source: see `unigist_jax.data.sources`.
      tokenizer: file or directory.
      ratio: raws a unit; a multiple of every ratio that the rows shall be trained at.
      row_length: raws of a row, a multiple of the ratio; longer documents are split.
      heldout_fraction: share of the documents, drawn by a hash of their names, that training never sees.
      reading: how rows of data sets become documents.
    """

    source: str
    tokenizer: str
    ratio: int
    row_length: int
    heldout_fraction: float
    reading: Reading = PLAIN

    def __post_init__(self):
        if self.row_length < 1:
            raise ValueError(f"--row_length={self.row_length} must be positive")
        GistLayout(self.ratio, 0, 0).num_units(self.row_length)
        if not 0 <= self.heldout_fraction < 1:
            raise ValueError(f"--heldout_fraction={self.heldout_fraction} must be at least 0 and below 1")


def prepare(
    request: Request, output: Path, workers: int = 1, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Prepares the rows, and returns the manifest, which is the report.

    Args:
      request: what is to be prepared.
      output: directory of the rows; goes on where the same request was interrupted.
      workers: processes.
      progress: called with the parts done and all parts.

    Raises:
      ValueError: if `output` holds rows of another request, or a source cannot be read.
      FileNotFoundError: if a source or the tokenizer does not exist.
      OSError: if rows cannot be written, or a process is killed; what is done stays.
    """
    output = Path(output)
    tokenizer = Tokenizer.load(request.tokenizer)
    wanted = dataclasses.asdict(request) | {"tokenizer": tokenizer.fingerprint}
    if (output / REQUEST).is_file():
        try:
            held = json.loads((output / REQUEST).read_text())
        except ValueError as error:
            raise ValueError(f"{output / REQUEST} is damaged ({error}); choose another --output") from error
        if held != wanted:
            differ = [f"{key}: {held.get(key)!r}" for key in wanted if held.get(key) != wanted[key]]
            raise ValueError(f"{output} holds rows of another request ({'; '.join(differ)}); choose another --output")
    elif (output / CONFIG_FILE).exists():
        raise ValueError(f"{output} holds a model ({CONFIG_FILE}), and rows want a folder of their own; choose another")
    parts = find_parts(request.source)
    with writing(output):
        for split in SPLITS:
            (output / split).mkdir(parents=True, exist_ok=True)
        _write_json(output / REQUEST, wanted)
        tokenizer.save(output)
    missing = [index for index in range(len(parts)) if not (output / SPLITS[-1] / f"{index:05d}").is_dir()]
    done = len(parts) - len(missing)
    progress(done, len(parts))
    jobs = [(parts[index], index, request, output) for index in missing]
    if workers == 1:
        for job in jobs:
            _prepare_part(*job, tokenizer)
            progress(done := done + 1, len(parts))
    else:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, context, _load_tokenizer, (str(output),)) as pool:
            futures = [pool.submit(_prepare_part, *job) for job in jobs]
            try:
                for future in concurrent.futures.as_completed(futures):
                    future.result()
                    progress(done := done + 1, len(parts))
            except concurrent.futures.process.BrokenProcessPool as error:
                raise OSError(
                    f"a process of --workers={workers} was killed, most likely for want of memory; run the same "
                    "command again with fewer to go on"
                ) from error
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    if not is_prepared(output):
        _write_json(output / MANIFEST, _manifest(request, output, tokenizer, len(parts)))
    return json.loads((output / MANIFEST).read_text())


def _manifest(request: Request, output: Path, tokenizer: Tokenizer, parts: int) -> dict[str, Any]:
    manifest = {
        "format": FORMAT,
        "source": request.source,
        "ratio": request.ratio,
        "row_length": request.row_length,
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
        "pad_id": tokenizer.pad_id,
        "splits": {},
    }
    for split in SPLITS:
        names = [f"{index:05d}" for index in range(parts)]
        stats = [json.loads((output / split / name / "stats.json").read_text()) for name in names]
        shards = [[name, one["rows"]] for name, one in zip(names, stats, strict=True)]
        manifest["splits"][split] = summarize(stats, request.row_length) | {"shards": shards}
    if not manifest["splits"]["train"]["rows"]:
        raise ValueError(f"--source={request.source} has no document with tokens to train on")
    return manifest


_tokenizer: Tokenizer | None = None  # of a worker process


def _load_tokenizer(directory: str) -> None:
    global _tokenizer  # noqa: PLW0603
    _tokenizer = Tokenizer.load(directory)


def _prepare_part(part: Part, index: int, request: Request, output: Path, tokenizer: Tokenizer | None = None) -> None:
    """Writes a part's shard of either split; the held-out one last, which says that the part is done."""
    tokenizer = tokenizer or _tokenizer
    documents: dict[str, list] = {split: [] for split in SPLITS}
    for name, ids, learned in read_part(part, tokenizer, request.reading):
        documents["heldout" if is_heldout(name, request.heldout_fraction) else "train"].append((name, ids, learned))
    for split in SPLITS:
        names, ids, learned = zip(*documents[split], strict=True) if documents[split] else ((), (), ())
        rows = None
        if any(map(len, ids)):
            rows = pack_documents(
                ids,
                row_length=request.row_length,
                layout=GistLayout(request.ratio, 0, 0),
                pad_id=tokenizer.pad_id,
                loss_masks=learned,
            )
        folder = output / split / f"{index:05d}"
        if not folder.is_dir():
            with writing(folder):
                write_shard(folder, rows, names, [len(x) for x in ids])


def _write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)
