"""Reads Mosaic Data Shards (MDS), the format of ProLong's data, without the library that writes them.

`mosaicml-streaming` needs torch, several clouds' clients and a NumPy older than ours; reading local shards needs this:

  index.json   for each shard its files, and the names, encodings and sizes (null: varies) of its columns
  shard        uint32 samples n | uint32 [n + 1] where each sample begins, and the last ends | column header | samples
  sample       uint32 size of each column that varies | the columns' bytes
  ndarray      with dtype and shape both fixed by its encoding (`ndarray:uint32:8`) the values alone; else before them
               one byte of dtype unless fixed, and unless fixed a byte (dimensions << 2 | log2 of their width) and them
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

INDEX_FILE = "index.json"
SCALARS = {"int": "int64", **{x: x for x in ("uint8", "int32", "int64", "uint16", "uint32", "float32", "float64")}}
VALUE_DTYPES = {
    8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 18: "float16", 32: "uint32", 33: "int32", 34: "float32",
    64: "uint64", 65: "int64", 66: "float64",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class MdsShard:
    """One shard: its file, compressed or not, and its columns."""

    path: Path
    compression: str | None
    names: tuple[str, ...]
    encodings: tuple[str, ...]
    sizes: tuple[int | None, ...]
    samples: int


def find_shards(folder: Path) -> list[MdsShard]:
    """All shards below a folder, by the order of their index files. Raises ValueError for a damaged index."""
    shards = []
    for index in sorted(Path(folder).rglob(INDEX_FILE)):
        try:
            for entry in json.loads(index.read_text())["shards"]:
                file = entry["raw_data"]["basename"]
                compression = None
                if not (index.parent / file).is_file() and entry.get("zip_data"):
                    file, compression = entry["zip_data"]["basename"], entry["compression"].split(":")[0]
                columns = (tuple(entry[f"column_{name}"]) for name in ("names", "encodings", "sizes"))
                shards.append(MdsShard(index.parent / file, compression, *columns, entry["samples"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{index} is not an index of MDS shards ({type(error).__name__}: {error})") from error
    return shards


def read_shard(shard: MdsShard, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The samples of a shard, of each the wanted columns that it has.

    Raises:
      ValueError: if the file is damaged, compressed by what is not installed, or a column's encoding is not read here.
    """
    data = _contents(shard)
    count = int(np.frombuffer(data, "<u4", 1)[0])
    if count != shard.samples:
        raise ValueError(f"{shard.path} holds {count} samples, its index says {shard.samples}; copy it again")
    offsets = np.frombuffer(data, "<u4", count + 1, offset=4)
    if offsets[-1] > len(data):
        raise ValueError(f"{shard.path} ends after {len(data)} of {offsets[-1]} bytes; copy it again")
    for begin, end in itertools.pairwise(offsets):
        stream = io.BytesIO(data[begin:end])
        sizes = [int.from_bytes(stream.read(4), "little") if size is None else size for size in shard.sizes]
        sample = {}
        for name, encoding, size in zip(shard.names, shard.encodings, sizes, strict=True):
            content = stream.read(size)
            if name in columns:
                sample[name] = _decode(encoding, content, f"column {name!r} of {shard.path}")
        yield sample


def _contents(shard: MdsShard) -> bytes:
    data = shard.path.read_bytes()
    if shard.compression is None:
        return data
    if shard.compression == "gz":
        import gzip

        return gzip.decompress(data)
    if shard.compression == "zstd":
        try:
            import zstandard
        except ImportError as error:
            raise ValueError(f"{shard.path} is compressed by zstd; pip install zstandard, or unpack it") from error
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=2**32)
    raise ValueError(f"{shard.path} is compressed by {shard.compression!r}; unpack it, or use gz or zstd")


def _decode(encoding: str, data: bytes, where: str) -> Any:
    if encoding == "str":
        return data.decode("utf-8")
    if encoding == "json":
        return json.loads(data)
    if encoding in SCALARS:
        return np.frombuffer(data, SCALARS[encoding])[0]
    if encoding.split(":")[0] != "ndarray":
        raise ValueError(f"{where} is encoded as {encoding!r}, which is not read; str, json, numbers and ndarray are")
    _, dtype, fixed_shape, *_ = *encoding.split(":"), "", ""
    place = 0
    if not dtype:
        dtype, place = VALUE_DTYPES[data[0]], 1
    if fixed_shape:
        shape = tuple(map(int, fixed_shape.split(",")))
    else:
        dimensions, width = divmod(data[place], 4)
        shape = tuple(np.frombuffer(data, f"<u{2**width}", dimensions, offset=place + 1).tolist())
        place += 1 + dimensions * 2**width
    return np.frombuffer(data, dtype, offset=place).reshape(shape)
