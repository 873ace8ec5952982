"""Models from Hugging Face directories: config.json and safetensors, whole or in shards. `save_hf` is in `hf_save.py`.

Reading is lazy: every file is opened and every name, shape and dtype checked before the first weight is read, and then
each device reads its own shard only, tensor by tensor. Names and layouts of the tensors are in `hf_weights.py`,
config.json is in `hf_config.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError, safe_open

from unigist_jax.layout import GistLayout
from unigist_jax.model.config import LlamaConfig
from unigist_jax.model.gist_init import initial_embeddings
from unigist_jax.model.hf_config import config_from_hf, layout_from_hf
from unigist_jax.model.hf_save import save_hf
from unigist_jax.model.hf_weights import (
    CONFIG_FILE,
    GIST_PARAMETERS,
    HF_WEIGHTS,
    INDEX_FILE,
    WEIGHTS_FILE,
    is_stacked,
    names_and_shape,
)
from unigist_jax.model.llama import Llama
from unigist_jax.sharding import check_split, layer_sharding, parameter_path, tree_shardings

__all__ = ["load_hf", "read_config", "save_hf"]

_HARMLESS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_READABLE = ("F64", "F32", "BF16", "F16")
_SHOWN = 4  # tensor names in an error message


def _read_json(file: Path) -> dict[str, Any]:
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}): download or copy it again") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{file} holds a {type(contents).__name__}, not an object: download or copy it again")
    return contents


def read_config(directory: str | os.PathLike) -> dict[str, Any]:
    """The parsed config.json of a Hugging Face directory.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is damaged, or that of a work directory of `launch.train`.
    """
    file = Path(directory) / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is absent: give a local directory with the config.json and the safetensors files of a Llama model"
        )
    hf = _read_json(file)
    if "model_type" not in hf and "gist" in hf:
        raise ValueError(
            f"{directory} is a work directory of launch.train, and a Hugging Face directory is needed: make one with "
            f"launch.convert --input={directory}"
        )
    return hf


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises FileNotFoundError naming one that is absent."""
    if (directory / WEIGHTS_FILE).is_file():
        return [directory / WEIGHTS_FILE]
    index = directory / INDEX_FILE
    if not index.is_file():
        raise FileNotFoundError(
            f"{directory} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}: download the safetensors files of the model "
            "into it (other formats, such as pytorch_model.bin, are not read)"
        )
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map: download or copy it again")
    files = [directory / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is absent, but {index.name} names it: download or copy that shard too")
    return files


def _open_tensors(files: list[Path], stack: contextlib.ExitStack) -> dict[str, tuple[Path, Any]]:
    """File and unread safetensors slice of every tensor. Raises ValueError naming a damaged file."""
    tensors = {}
    for file in files:
        try:
            handle = stack.enter_context(safe_open(file, framework="numpy"))
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated or damaged ({error}): download or copy it again") from error
        tensors |= {name: (file, handle.get_slice(name)) for name in handle.keys()}  # noqa: SIM118 - not a mapping
    return tensors


def _checked_tensors(
    tensors: dict[str, tuple[Path, Any]], expected: dict[str, tuple[int, ...]], directory: Path, tied: bool
) -> None:
    """Raises ValueError unless the tensors are the expected ones, of the expected shapes and of a floating dtype."""
    missing = [name for name in expected if name not in tensors]
    if missing:
        remedy = "download the whole checkpoint, with the config.json that belongs to it"
        if missing == [HF_WEIGHTS["head"].name]:
            remedy = 'if the head shares the embedding, set "tie_word_embeddings": true in config.json'
        elif all(name.startswith("unigist.") for name in missing):
            remedy = 'restore them, or drop "unigist" from config.json and both tensors to start from new gists'
        raise ValueError(f"{directory} lacks {_listing(missing)}: {remedy}")
    extra = [name for name in tensors if name not in expected]
    harmless = [name for name in extra if _HARMLESS.fullmatch(name) or (tied and name == HF_WEIGHTS["head"].name)]
    if harmless:
        logging.warning("%s: ignoring %s, which the model computes or ties", directory, _listing(harmless))
    if len(extra) > len(harmless):
        unknown = [name for name in extra if name not in harmless]
        raise ValueError(
            f"{directory} holds {_listing(unknown)}, for which a Llama of this config.json has no place: "
            "take the config.json that belongs to the weights"
        )
    for name, shape in expected.items():
        file, stored = tensors[name]
        if tuple(stored.get_shape()) != shape:
            raise ValueError(
                f"{file}: {name} has shape {tuple(stored.get_shape())}, but config.json makes it {shape}: "
                "take the config.json that belongs to the weights"
            )
        if stored.get_dtype() not in _READABLE:
            raise ValueError(
                f"{file}: {name} is of dtype {stored.get_dtype()}: load a checkpoint in float32, bfloat16 or float16"
            )


def _listing(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} tensor{'s' * (len(names) > 1)} {shown}{more}"


def _array(
    shape: tuple[int, ...], sharding: NamedSharding | None, read: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """An array whose shards are `read(index)`, each read once here; without sharding, on the default device."""
    blocks: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def block(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(i.indices(n)[:2] for i, n in zip(index, shape, strict=True))
        if bounds not in blocks:
            blocks[bounds] = read(tuple(slice(*bound) for bound in bounds))
        return blocks[bounds]

    if sharding is None:
        return jnp.asarray(block((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding, block)


def _stored_parameter(
    path: str, leaf: Any, sharding: NamedSharding | None, tensors: dict[str, tuple[Path, Any]]
) -> jax.Array:
    """A parameter from the files. The layers of a stacked one reach the devices one after the other, so that the host
    never holds more than the largest tensor of the files (and less where devices take parts of it)."""
    names, shape = names_and_shape(path, leaf.shape)

    def one_layer(name: str, sharding: NamedSharding | None) -> jax.Array:
        _, stored = tensors[name]
        return _array(shape, sharding, lambda index: HF_WEIGHTS[path].read(stored, shape, index).astype(leaf.dtype))

    if not is_stacked(path):
        return one_layer(names[0], sharding)
    stack = jax.jit(partial(jnp.zeros, leaf.shape, leaf.dtype), out_shardings=sharding)()
    for index, name in enumerate(names):
        stack = jax.block_until_ready(_with_layer(stack, one_layer(name, layer_sharding(sharding)), index))
    return stack


@partial(jax.jit, donate_argnames=("stack",))
def _with_layer(stack: jax.Array, layer: jax.Array, index: int | jax.Array) -> jax.Array:
    """`stack` [L, …] with a layer filled in, in place."""
    return jax.lax.dynamic_update_index_in_dim(stack, layer, index, 0)


def _new_parameter(
    path: str, leaf: Any, config: LlamaConfig, seed: int, tensors: dict[str, tuple[Path, Any]], index: tuple[slice, ...]
) -> np.ndarray:
    """`parameter[index]` of a gist or sink embedding, drawn from the seed as `config.gist_init` says."""
    vocabulary = tensors[HF_WEIGHTS["embedding"].name][1]

    def mean():
        size, step = config.vocab_size, 4096
        parts = (vocabulary[i : min(i + step, size)].astype(np.float64) for i in range(0, size, step))
        return sum(part.sum(axis=0) for part in parts) / size

    def rows(tokens):
        read = [vocabulary[token : token + 1][0] for token in np.ravel(tokens).tolist()]
        return np.asarray(read, np.float32).reshape(leaf.shape)

    key = jax.random.fold_in(jax.random.key(seed), GIST_PARAMETERS.index(path))
    return np.asarray(initial_embeddings(config, key, leaf.shape, mean, rows)).astype(leaf.dtype)[index]


def _checked_layout(directory: Path, hf: dict[str, Any], layout: GistLayout | None) -> GistLayout:
    """The layout asked for, or the checkpoint's own. Raises ValueError if there is none, or it has other sinks."""
    stored = layout_from_hf(hf)
    if layout is None:
        if stored is None:
            raise ValueError(
                f"{directory} is a plain Llama checkpoint (its config.json has no unigist entry): say which layout to "
                "give it, as in load_hf(directory, GistLayout(ratio=4, num_sinks=128, window=128))"
            )
        return stored
    if stored is not None and stored.num_sinks != layout.num_sinks:
        raise ValueError(
            f"num_sinks={layout.num_sinks} asked for, but {directory} holds {stored.num_sinks} trained sinks: ask for "
            f"num_sinks={stored.num_sinks} (another ratio or window is fine)"
        )
    return layout


def load_hf(
    directory: str | os.PathLike,
    layout: GistLayout | None = None,
    *,
    mesh: Mesh | None = None,
    seed: int = 0,
    **overrides: Any,
) -> Llama:
    """A model from a local Hugging Face directory: config.json, and model.safetensors or its shards with their index.

    Args:
      directory: a Llama checkpoint, plain or written by `save_hf`.
      layout: layout of the model; None takes the one in config.json. A plain checkpoint has none and needs it given;
        for one with gists it may have another ratio or window, not other sinks.
      mesh: shards parameters over the mesh by `unigist_jax.sharding.PARAMETER_AXES`, each device reading its own part;
        None puts them on the default device.
      seed: of the gist and sink embeddings of a plain checkpoint, by the config's `gist_init`.
      **overrides: fields of `LlamaConfig`, such as `param_dtype`, `dtype`, `attention`, `remat`. Unless overridden,
        parameters and computation have the checkpoint's dtype.

    Raises:
      FileNotFoundError: if config.json, the weights or a shard that the index names is absent.
      ValueError: for an unsupported model, a damaged file, missing, unknown or misshapen tensors, or a layout that is
        absent or has other sinks; before any weight is read, and naming the file and the remedy.
    """
    directory = Path(directory)
    hf = read_config(directory)
    config = config_from_hf(hf, **overrides)
    layout = _checked_layout(directory, hf, layout)
    if mesh is not None:
        check_split(config, mesh.shape)
    abstract = jax.eval_shape(lambda: Llama(config, layout, rngs=nnx.Rngs(params=0)))
    leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract)
    parameters = {parameter_path(path): leaf for path, leaf in leaves}
    shardings = [None] * len(leaves) if mesh is None else jax.tree.leaves(tree_shardings(mesh, abstract))

    with contextlib.ExitStack() as stack:
        tensors = _open_tensors(_weight_files(directory), stack)
        has_gists = hf.get("unigist") is not None or any(HF_WEIGHTS[path].name in tensors for path in GIST_PARAMETERS)
        new = () if has_gists else GIST_PARAMETERS
        expected = {}
        for path, leaf in parameters.items():
            if path not in new:
                names, shape = names_and_shape(path, leaf.shape)
                expected |= dict.fromkeys(names, HF_WEIGHTS[path].hf_shape(shape))
        _checked_tensors(tensors, expected, directory, config.tie_embeddings)
        arrays = []
        for (path, leaf), sharding in zip(parameters.items(), shardings, strict=True):
            if path in new:
                drawn = partial(_new_parameter, path, leaf, config, seed, tensors)
                arrays.append(_array(leaf.shape, sharding, drawn))
            else:
                arrays.append(_stored_parameter(path, leaf, sharding, tensors))
    return jax.tree.unflatten(treedef, arrays)
