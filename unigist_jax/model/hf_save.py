"""Models as Hugging Face directories, which `load_hf` reads back to the bit and transformers loads."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors.numpy import save_file

from unigist_jax.disk import writing
from unigist_jax.model.hf_config import config_to_hf
from unigist_jax.model.hf_weights import (
    CONFIG_FILE,
    GIST_PARAMETERS,
    HF_WEIGHTS,
    INDEX_FILE,
    WEIGHTS_FILE,
    is_stacked,
)
from unigist_jax.model.llama import Llama
from unigist_jax.sharding import parameter_path

_WEIGHT_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


class _Tensor(NamedTuple):
    """One tensor to write, of a parameter and, if stacked, one of its layers."""

    name: str
    path: str
    layer: int | None
    num_bytes: int


def _tensors_to_write(parameters: dict[str, jax.Array], num_layers: int) -> Iterator[_Tensor]:
    """Every tensor, layer by layer, with the embedding in front and norm, head, gists and sinks behind."""

    def tensor(path, layer=None):
        array = parameters[path]
        num_bytes = array.nbytes if layer is None else array.nbytes // num_layers
        return _Tensor(HF_WEIGHTS[path].name.format(layer), path, layer, num_bytes)

    single = [path for path in HF_WEIGHTS if path in parameters and not is_stacked(path)]
    yield tensor(single[0])
    for layer in range(num_layers):
        yield from (tensor(path, layer) for path in HF_WEIGHTS if is_stacked(path))
    yield from map(tensor, single[1:])


def _split_into_files(tensors: list[_Tensor], max_bytes: int) -> dict[str, list[_Tensor]]:
    """The tensors of each file, in order, filling files up to `max_bytes` (a tensor beyond that gets its own)."""
    shards: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    if len(shards) == 1:
        return {WEIGHTS_FILE: shards[0]}
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards)}


def save_hf(
    model: Llama, directory: str | os.PathLike, *, max_shard_bytes: int = 5_000_000_000, gists: bool = True
) -> None:
    """Writes a model as a Hugging Face directory, which `load_hf` reads back to the bit and transformers loads.

    Everything is written under temporary names, then renamed, config.json last: an interrupted save leaves either what
    was there or a directory without config.json, which `load_hf` refuses. Weights that were there are replaced; a
    tokenizer is `Tokenizer.save`'s to write.

    Args:
      model: its parameters' dtype is the dtype of the files.
      directory: made if absent.
      max_shard_bytes: bytes of tensors in one file; more than that are split over several, with an index.
      gists: False leaves gist and sink embeddings and the layout out: a plain Llama checkpoint.

    Raises:
      ValueError: if `max_shard_bytes` is not positive, the parameters are spread over several processes, or the layers
        are apart (`unigist_jax.inference.for_inference`).
      OSError: if a file cannot be written.
    """
    directory = Path(directory)
    if not model.is_stacked:
        raise ValueError("for_inference took this model's layers apart: save it before")
    leaves = jax.tree_util.tree_leaves_with_path(model)
    parameters = {parameter_path(path): leaf for path, leaf in leaves}
    if not gists:
        parameters = {path: leaf for path, leaf in parameters.items() if path not in GIST_PARAMETERS}
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} must be positive")
    if not all(array.is_fully_addressable for array in parameters.values()):
        raise ValueError("the parameters are spread over several processes: restore them in one, and save there")
    directory.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(model.config, param_dtype=parameters["embedding"].dtype.name)
    files = _split_into_files(list(_tensors_to_write(parameters, config.num_layers)), max_shard_bytes)

    written: dict[Path, Path] = {}  # temporary to final, in the order of renaming

    def temporary(name: str) -> Path:
        file = directory / f"{name}.tmp"
        written[file] = directory / name
        return file

    try:
        for name, tensors in files.items():
            arrays = {tensor.name: _hf_array(parameters, tensor) for tensor in tensors}
            with writing(directory / name):
                save_file(arrays, temporary(name), metadata={"format": "pt"})
        if len(files) > 1:
            total = sum(tensor.num_bytes for tensors in files.values() for tensor in tensors)
            weight_map = {tensor.name: name for name, tensors in files.items() for tensor in tensors}
            _write_json(temporary(INDEX_FILE), {"metadata": {"total_size": total}, "weight_map": weight_map})
        config_file = temporary(CONFIG_FILE)
        _write_json(config_file, config_to_hf(config, model.layout if gists else None))
        for source in written:  # safetensors lets only the owner read its files
            shutil.copymode(config_file, source)
        (directory / CONFIG_FILE).unlink(missing_ok=True)
        for old in directory.iterdir():
            if _WEIGHT_FILES.fullmatch(old.name) and old not in written.values():
                old.unlink()
        for source, target in written.items():
            source.replace(target)
    finally:
        for source in written:
            source.unlink(missing_ok=True)


def _hf_array(parameters: dict[str, jax.Array], tensor: _Tensor) -> np.ndarray:
    array = parameters[tensor.path]
    return HF_WEIGHTS[tensor.path].to_hf(np.asarray(array if tensor.layer is None else array[tensor.layer]))


def _write_json(file: Path, contents: dict[str, Any]) -> None:
    file.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
