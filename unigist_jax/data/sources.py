"""Where `launch.prepare_data` finds documents, cut into parts that workers read on their own.

A source is a comma-separated list of
  stdlib                           the running interpreter's standard library
  hf:NAME[:CONFIG][@SPLIT]         a data set of the Hugging Face hub, or a local folder that `datasets` reads
  files, folders, glob patterns    .txt (a file is a document), .jsonl and .parquet (a row is a document)
  folders with MDS shards          found by their index.json; ProLong's data are such

A row's document is its `input_ids` (already tokenised; `indices` are the borders of the documents inside, ProLong's
`mask` says what is learned), or its conversation (`unigist_jax.data.conversations`), or its `text`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unigist_jax.data.conversations import conversation_of, encode_conversation
from unigist_jax.data.corpus import SourceFile, source_files, standard_library
from unigist_jax.data.mds import INDEX_FILE, MdsShard, find_shards, read_shard
from unigist_jax.data.tokenize import Tokenizer
from unigist_jax.disk import read_text

PART_BYTES = 32 * 2**20  # of text, about; a part is packed by one worker into one shard
HUB_ROWS = 4096  # of a hub data set, likewise
COLUMNS = ("input_ids", "indices", "mask", "messages", "conversations", "instruction", "input", "output", "text")


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of a source, small enough to be pickled to a worker.

    Attributes:
      kind: "txt", "jsonl", "parquet", "mds" or "hub".
      name: for messages and for the documents' names.
      files: text files; the one file of the other local kinds.
      span: half-open: bytes of a .jsonl file, row groups of a .parquet file, rows of a hub data set.
      shard, hub: what the kinds of those names read.
    """

    kind: str
    name: str
    files: tuple[SourceFile, ...] = ()
    span: tuple[int, int] = (0, 0)
    shard: MdsShard | None = None
    hub: Any = None


@dataclasses.dataclass(frozen=True)
class Reading:
    """How rows become documents.

    Attributes:
      prompt_column, response_column: columns of a question and its answer, for data sets of another form; "" for none.
      prompt: what the question is set into, at `{}`.
    """

    prompt_column: str = ""
    response_column: str = ""
    prompt: str = "{}"

    def __post_init__(self):
        if bool(self.prompt_column) != bool(self.response_column):
            given, missing = ("prompt", "response") if self.prompt_column else ("response", "prompt")
            raise ValueError(f"--{given}_column without --{missing}_column: a question and its answer go together")
        if "{}" not in self.prompt:
            raise ValueError(f"--prompt={self.prompt!r} has no place for the question; write {{}} where it goes")


PLAIN = Reading()


def find_parts(source: str) -> list[Part]:
    """The parts of a source, in an order that depends on the source alone.

    Raises:
      FileNotFoundError: if a path does not exist or a pattern matches nothing.
      ValueError: for an empty source, a file of another kind, or a hub data set that `datasets` cannot load.
    """
    parts = []
    for entry in filter(None, map(str.strip, source.split(","))):
        if entry == "stdlib":
            parts += _text_parts(standard_library())
        elif entry.startswith("hf:"):
            parts += _hub_parts(entry)
        elif Path(entry).is_dir() and any(Path(entry).rglob(INDEX_FILE)):
            parts += [Part("mds", shard.path.name, shard=shard) for shard in find_shards(Path(entry))]
        else:
            files = source_files(entry)
            parts += _text_parts([file for file in files if file.path.suffix == ".txt"])
            parts += [part for file in files if file.path.suffix != ".txt" for part in _row_parts(file)]
    if not parts:
        raise ValueError(f"--source={source} names no data; give paths, hf:NAME, or stdlib")
    return parts


def read_part(part: Part, tokenizer: Tokenizer, reading: Reading) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, ids and loss mask of each document of a part. Raises ValueError naming what cannot be read."""
    if part.kind == "txt":
        for file in part.files:
            of_stdlib = "stdlib" in part.name
            text = file.path.read_bytes().decode(errors="replace") if of_stdlib else read_text(file.path)
            if text:
                yield (file.name, *_encoded_text(tokenizer, text))
        return
    for name, row in _rows(part, reading):
        try:
            for index, (ids, learned) in enumerate(_documents_of(row, tokenizer, reading)):
                yield f"{name}.{index}" if index else name, ids, learned
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{name} of {part.name}: {error}") from error


def _encoded_text(tokenizer: Tokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
    ids = tokenizer.encode(text, bos=True, eos=True)
    return ids, np.ones(len(ids), bool)


def _documents_of(
    row: Mapping[str, Any], tokenizer: Tokenizer, reading: Reading
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    if reading.prompt_column:
        if absent := {reading.prompt_column, reading.response_column} - set(row):
            raise ValueError(f"it has no column {min(absent)!r}; its columns are {', '.join(sorted(row))}")
        asked, answer = row[reading.prompt_column], row[reading.response_column]
        if not asked or not answer:
            return
        question = {"role": "user", "content": reading.prompt.replace("{}", asked)}
        yield encode_conversation(tokenizer, [question, {"role": "assistant", "content": answer}])
    elif row.get("input_ids") is not None:
        ids = np.asarray(row["input_ids"])
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size:
            raise ValueError(
                f"its ids reach {int(ids.max())}, the tokenizer has {tokenizer.vocab_size}: they are of another one"
            )
        learned = np.ones(len(ids), bool) if row.get("mask") is None else np.asarray(row["mask"], bool)
        borders = [(0, len(ids))] if row.get("indices") is None else np.asarray(row["indices"]).reshape(-1, 2)
        for begin, end in borders:
            if end - begin > 1:
                yield ids[begin:end].astype(np.int32), learned[begin:end]
    elif (messages := conversation_of(row)) is not None:
        yield encode_conversation(tokenizer, messages)
    elif "text" in row:
        if row["text"] is not None and not isinstance(row["text"], str):
            raise ValueError(f"its text is {row['text']!r}, of type {type(row['text']).__name__} and not a string")
        if row["text"]:
            yield _encoded_text(tokenizer, row["text"])
    else:
        raise ValueError(f"it has the columns {', '.join(sorted(row))}, none of which is read: {', '.join(COLUMNS)}")


def _rows(part: Part, reading: Reading) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Name and columns of each row of a part."""
    if part.kind == "mds":
        columns = (*COLUMNS, reading.prompt_column, reading.response_column)
        for index, row in enumerate(read_shard(part.shard, columns)):
            yield f"{part.name}#{index}", row
    elif part.kind == "hub":
        for index, row in zip(range(*part.span), part.hub, strict=True):
            yield f"{part.name}#{index}", row
    elif part.kind == "parquet":
        import pyarrow.parquet

        reader = pyarrow.parquet.ParquetFile(part.files[0].path)
        for group in range(*part.span):
            for index, row in enumerate(reader.read_row_group(group).to_pylist()):
                yield f"{part.name}#{group}.{index}", row
    else:
        yield from _json_rows(part)


def _json_rows(part: Part) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Lines that begin within the span."""
    begin, end = part.span
    with part.files[0].path.open("rb") as file:
        file.seek(max(0, begin - 1))
        if begin:
            file.readline()  # of the part before, whole or in part
        while (place := file.tell()) < end and (line := file.readline()):
            if line.strip():
                try:
                    yield f"{part.name}@{place}", json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{part.files[0].path} is no JSON at byte {place}: {error}") from error


# --- cutting into parts ----------------------------------------------------------------------------------------------


def _text_parts(files: list[SourceFile]) -> list[Part]:
    parts, group, size = [], [], 0
    kind = "stdlib" if files and files == standard_library() else "text files"
    for file in files:
        group.append(file)
        size += file.path.stat().st_size
        if size >= PART_BYTES or file is files[-1]:
            parts.append(Part("txt", f"{kind} {group[0].name} …", tuple(group)))
            group, size = [], 0
    return parts


def _row_parts(file: SourceFile) -> list[Part]:
    if file.path.suffix == ".jsonl":
        size = file.path.stat().st_size
        spans = [(begin, min(size, begin + PART_BYTES)) for begin in range(0, size, PART_BYTES)]
        return [Part("jsonl", file.name, (file,), span) for span in spans]
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.ParquetFile(file.path).metadata
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file.path} is no parquet file: {error}") from error
    parts, begin, size = [], 0, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= PART_BYTES or group == metadata.num_row_groups - 1:
            parts.append(Part("parquet", file.name, (file,), (begin, group + 1)))
            begin, size = group + 1, 0
    return parts


def _hub_parts(entry: str) -> list[Part]:
    import datasets

    name, _, split = entry.removeprefix("hf:").partition("@")
    path, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(path, config or None, split=split or "train")
    except Exception as error:  # whatever the hub and the data set's files raise
        raise ValueError(f"--source={entry} cannot be loaded ({type(error).__name__}: {error})") from error
    spans = [(begin, min(len(rows), begin + HUB_ROWS)) for begin in range(0, len(rows), HUB_ROWS)]
    return [Part("hub", path, span=span, hub=rows.select(range(*span))) for span in spans]
