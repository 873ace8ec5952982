"""Documents to train on: local files, or the standard library of the running interpreter where nothing else is near.

Whatever the source, a document is one row of a Hugging Face dataset with the columns `name` and `text`, and a hash of
its name says whether it is held out or trained on. The two splits are therefore disjoint, and a document never changes
sides when others come or go. Everything is held in memory; nothing is left on disk and no network is used.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from unigist_jax.disk import read_text

if TYPE_CHECKING:
    import datasets

SPLITS = ("train", "heldout")
SUFFIXES = (".txt", ".jsonl", ".parquet")
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


class SourceFile(NamedTuple):
    """A file of the corpus and the name its documents go by, which does not depend on where the corpus lies."""

    path: Path
    name: str


def load_documents(source: str, *, split: str, heldout_fraction: float, max_documents: int = 0) -> datasets.Dataset:
    """The documents of one split.

    Args:
      source: `"stdlib"` for the Python files of the running interpreter's standard library, or comma-separated files,
        folders (searched recursively) and glob patterns of .txt (a file is a document), .jsonl and .parquet (a row is a
        document, its text in the column `text`).
      split: `"train"` or `"heldout"`.
      heldout_fraction: share of the documents that is held out, in [0, 1). With 0 everything is training text.
      max_documents: keep only the first so many documents of the split; 0 keeps all.

    Returns:
      A dataset with the string columns `name` and `text`, in a fixed order, without empty documents.

    Raises:
      FileNotFoundError: if a path does not exist or a pattern matches nothing.
      ValueError: if an argument is out of range, a file has another suffix, cannot be read or lacks a column `text` of
        strings, or if the corpus or one of its splits has no document.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; use one of {', '.join(map(repr, SPLITS))}")
    if not 0 <= heldout_fraction < 1:
        raise ValueError(f"heldout_fraction={heldout_fraction} must be at least 0 and below 1; 0.05 is a usual choice")
    if split == "heldout" and heldout_fraction == 0:
        raise ValueError("split='heldout' is empty with heldout_fraction=0; set heldout_fraction above 0")
    if max_documents < 0:
        raise ValueError(f"max_documents={max_documents} must not be negative; use 0 to keep every document")
    files = standard_library() if source == "stdlib" else source_files(source)

    documents = _read_documents(files, skip_undecodable=source == "stdlib")
    if not len(documents):
        raise ValueError(f"the corpus {source!r} has no document with text; name files with text, or use 'stdlib'")
    heldout = [is_heldout(name, heldout_fraction) for name in documents["name"]]
    if heldout_fraction > 0 and len(set(heldout)) == 1:
        empty, advice = ("train", "lower") if heldout[0] else ("heldout", "raise")
        raise ValueError(
            f"of the {len(heldout)} documents of {source!r}, heldout_fraction={heldout_fraction} leaves none for the "
            f"split {empty!r}; {advice} heldout_fraction or add documents"
        )
    chosen = [index for index, is_heldout in enumerate(heldout) if is_heldout == (split == "heldout")]
    return documents.select(chosen[: max_documents or None])


# --- finding files -------------------------------------------------------------------------------------------------


def standard_library() -> list[SourceFile]:
    """The standard library's Python files, sorted by name, without its tests and without installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        paths = [Path(folder, name) for name in names if name.endswith(".py")]
        files += [SourceFile(path, path.relative_to(root).as_posix()) for path in paths]
    return sorted(files, key=lambda file: file.name)


def source_files(source: str) -> list[SourceFile]:
    """The files that the comma-separated `source` names, each once, in the order named and sorted within an entry."""
    files: dict[Path, SourceFile] = {}
    for entry in filter(None, map(str.strip, source.split(","))):
        for file in _entry_files(entry):
            if file.path.suffix not in SUFFIXES:
                raise ValueError(
                    f"{file.path} has the suffix {file.path.suffix!r}; the corpus takes {', '.join(SUFFIXES)} files"
                )
            files.setdefault(file.path.resolve(), file)
    if not files:
        raise ValueError(f"source={source!r} names no file; give paths, folders or patterns, or 'stdlib'")
    return list(files.values())


def _entry_files(entry: str) -> list[SourceFile]:
    path = Path(entry)
    if path.is_dir():
        paths = sorted(found for found in path.rglob("*") if found.suffix in SUFFIXES and found.is_file())
        if not paths:
            raise ValueError(f"the folder {entry!r} holds no {', '.join(SUFFIXES)} file; name another folder")
        return [SourceFile(found, found.relative_to(path).as_posix()) for found in paths]
    if path.is_file():
        return [SourceFile(path, path.name)]
    paths = sorted(Path(found) for found in glob.glob(entry, recursive=True) if Path(found).is_file())
    if not paths:
        raise FileNotFoundError(f"{entry!r} is neither a file nor a folder, and as a pattern it matches no file")
    return [SourceFile(found, found.name) for found in paths]


# --- reading them --------------------------------------------------------------------------------------------------


def _read_documents(files: list[SourceFile], skip_undecodable: bool) -> datasets.Dataset:
    """All documents with text of all files, in order, with the columns `name` and `text`."""
    import datasets

    columns: dict[str, list[str]] = {"name": [], "text": []}
    for file in files:
        has_rows = file.path.suffix in (".jsonl", ".parquet")
        for name, text in _read_rows(file) if has_rows else _read_text(file, skip_undecodable):
            if text:
                columns["name"].append(name)
                columns["text"].append(text)
    features = datasets.Features({"name": datasets.Value("string"), "text": datasets.Value("large_string")})
    return datasets.Dataset.from_dict(columns, features=features)


def _read_text(file: SourceFile, skip_undecodable: bool) -> Iterator[tuple[str, str]]:
    try:
        yield file.name, read_text(file.path)
    except ValueError:
        if not skip_undecodable:
            raise


def _read_rows(file: SourceFile) -> Iterator[tuple[str, str | None]]:
    """The rows of a .jsonl or .parquet file; row i of `a.jsonl` goes by the name `a.jsonl#i`."""
    import datasets

    reader = datasets.Dataset.from_json if file.path.suffix == ".jsonl" else datasets.Dataset.from_parquet
    with tempfile.TemporaryDirectory() as cache:
        try:
            rows = reader(glob.escape(str(file.path)), cache_dir=cache, keep_in_memory=True)
        except (datasets.exceptions.DatasetGenerationError, ValueError, StopIteration) as error:
            reason = error.__cause__ or error
            raise ValueError(f"{file.path} holds no readable {file.path.suffix} rows: {reason!r}") from error
    if "text" not in rows.column_names:
        raise ValueError(f"{file.path} has no column 'text'; its columns are {', '.join(sorted(rows.column_names))}")
    if getattr(rows.features["text"], "dtype", None) not in ("string", "large_string"):
        raise ValueError(f"the column 'text' of {file.path} holds {rows.features['text']}, not strings")
    for index, text in enumerate(rows["text"]):
        yield f"{file.name}#{index}", text


def is_heldout(name: str, heldout_fraction: float) -> bool:
    """Whether a document of this name is held out: its hash falls into the first `heldout_fraction` of all hashes."""
    digest = hashlib.sha256(name.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") < heldout_fraction * 2**64
