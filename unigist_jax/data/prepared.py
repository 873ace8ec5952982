"""Packed rows on disk, as `launch.prepare_data` writes them and training reads them.

  DIR/manifest.json            what the rows are packed for and what they hold; written last: there is nothing to come
  DIR/tokenizer.*              the tokenizer
  DIR/train/00000/tokens.npy   uint16 or int32 [N, T]; memory-mapped, so a row costs what it reads
  DIR/train/00000/documents.npy  int32 [N, U], number of the document that each unit is of
  DIR/train/00000/mask.npy     uint8 [N, ceil(T / 8)], the loss mask's bits
  DIR/train/00000/names.txt    the documents' names, one a line, in the order of their numbers
  DIR/train/00000/stats.json   counts
  DIR/heldout/…                the same of the held-out documents

Rows packed in units of R raws serve every ratio that divides R: what is one unit there is several here.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unigist_jax.data.pack import PackedRows, packing_report
from unigist_jax.layout import GistLayout, document_starts, refined_starts

MANIFEST = "manifest.json"
FORMAT = 1


def is_prepared(path: str | Path) -> bool:
    """Whether a path is a directory that `launch.prepare_data` has finished."""
    return (Path(path) / MANIFEST).is_file()


def length_histogram(lengths: Sequence[int]) -> dict[str, int]:
    """Documents by their number of tokens, in powers of two: `{"<=256": 3, …}`."""
    tops = [1 << max(0, int(length) - 1).bit_length() for length in lengths]
    return {f"<={top}": tops.count(top) for top in sorted(set(tops))}


def write_shard(folder: Path, rows: PackedRows | None, names: Sequence[str], lengths: Sequence[int]):
    """Writes the rows of one part, at once and whole. `rows` None: the part has none; `names` are of all documents."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    stats: dict[str, Any] = {"rows": 0, "documents": len(names), "lengths": length_histogram(lengths)}
    if rows is not None:
        small = rows.tokens.max(initial=0) < 2**16
        np.save(partial / "tokens.npy", rows.tokens.astype(np.uint16) if small else rows.tokens)
        np.save(partial / "documents.npy", rows.documents)
        np.save(partial / "mask.npy", np.packbits(rows.loss_mask, axis=1))
        (partial / "names.txt").write_text("".join(name.replace("\n", " ") + "\n" for name in names))
        report = packing_report(rows)
        stats |= {name: report[name] for name in ("rows", "tokens", "targets")} | {"pieces": report["documents"]}
    (partial / "stats.json").write_text(json.dumps(stats) + "\n")
    os.replace(partial, folder)


def summarize(stats: Sequence[dict[str, Any]], row_length: int) -> dict[str, Any]:
    """One report of many shards: rows, documents, pieces, tokens, targets, padding_share, lengths."""
    total = {name: sum(s.get(name, 0) for s in stats) for name in ("rows", "documents", "pieces", "tokens", "targets")}
    room = total["rows"] * row_length
    total["padding_share"] = round(1 - total["tokens"] / room, 6) if room else 0.0
    lengths: dict[str, int] = {}
    for one in stats:
        for top, count in one["lengths"].items():
            lengths[top] = lengths.get(top, 0) + count
    return total | {"lengths": {top: lengths[top] for top in sorted(lengths, key=lambda top: int(top[2:]))}}


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of a prepared directory. Raises ValueError if it is damaged or of another format."""
    path = Path(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] == FORMAT:
            return manifest
        reason = f"format {manifest['format']}, this code reads {FORMAT}"
    except (ValueError, KeyError, TypeError) as error:
        reason = f"damaged: {error}"
    raise ValueError(f"{path} is {reason}; prepare the data again with launch.prepare_data")


class PreparedRows:
    """The rows of one split of a prepared directory, addressed by number; nothing is read before it is asked for."""

    def __init__(self, directory: str | Path, split: str, layout: GistLayout, row_length: int, fingerprint: str):
        """Opens a split.

        Args:
          directory: written by `launch.prepare_data`.
          split: "train" or "heldout".
          layout, row_length, fingerprint: ratio, raws of a row and tokenizer that the rows are wanted for.

        Raises:
          ValueError: if they are packed for another ratio, row length or tokenizer, or a file is missing or cut off.
        """
        manifest = read_manifest(directory)
        again = f"; prepare {manifest['source']!r} again with launch.prepare_data, or change the config"
        if manifest["ratio"] % layout.ratio:
            raise ValueError(
                f"the rows in {directory} are packed for ratio {manifest['ratio']}, which gist.ratio={layout.ratio} "
                f"does not divide{again}"
            )
        if manifest["row_length"] != row_length:
            raise ValueError(
                f"the rows in {directory} have {manifest['row_length']} raws, not data.row_length={row_length}{again}"
            )
        if manifest["tokenizer"]["fingerprint"] != fingerprint:
            raise ValueError(
                f"the rows in {directory} are of the tokenizer {manifest['tokenizer']['fingerprint']}, not of the "
                f"run's {fingerprint}{again}"
            )
        self.row_length = row_length
        self._factor = manifest["ratio"] // layout.ratio
        shards = [(Path(directory) / split / name, rows) for name, rows in manifest["splits"][split]["shards"] if rows]
        for folder, rows in shards:
            least = {
                "tokens": 2 * row_length,
                "documents": 4 * (row_length // manifest["ratio"]),
                "mask": row_length // 8,
            }
            _check_sizes(folder, {name: rows * size for name, size in least.items()})
        self._folders = [folder for folder, _ in shards]
        self._ends = np.cumsum([rows for _, rows in shards], dtype=np.int64)

    @property
    def is_packed(self) -> bool:
        """True: the files are not read through for it."""
        return True

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def take(self, rows: np.ndarray) -> PackedRows:
        """The rows of these numbers, in this order. Raises ValueError if a file of theirs is missing or damaged."""
        found = [self._row(int(row)) for row in rows]
        tokens, documents, bits = (np.stack(parts) for parts in zip(*found, strict=True))
        mask = np.unpackbits(bits, axis=1, count=self.row_length).astype(bool)
        return PackedRows(tokens, refined_starts(document_starts(documents), self._factor), mask)

    def _row(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        shard = int(np.searchsorted(self._ends, row, side="right"))
        within = row - (int(self._ends[shard - 1]) if shard else 0)
        tokens, documents, mask = _open(self._folders[shard])
        return tokens[within].astype(np.int32), np.asarray(documents[within]), np.asarray(mask[within])


def _check_sizes(folder: Path, least: dict[str, int]) -> None:
    """Raises ValueError if a file is absent or shorter than its rows, before a step comes to ask for them."""
    for name, num_bytes in least.items():
        file = folder / f"{name}.npy"
        size = file.stat().st_size if file.is_file() else None
        if size is None or size < num_bytes:
            found = "is missing" if size is None else f"has {size} bytes, its rows take {num_bytes} or more"
            raise ValueError(f"{file} {found}; prepare the data again")


@functools.lru_cache(maxsize=4096)
def _open(folder: Path) -> tuple[np.ndarray, ...]:
    """The arrays of a shard, memory-mapped."""
    try:
        return tuple(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("tokens", "documents", "mask"))
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"the shard {folder} is missing or damaged ({error}); prepare the data again") from error
