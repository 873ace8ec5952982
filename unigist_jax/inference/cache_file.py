"""A filled cache as a file: a document is read once, and asked many times.

Axis legend
  B  sequences      G  gist slots      W  ring slots

One safetensors file. Its metadata say what the cache is of (model, layout, tokenizer), and a checksum of all that is in
it; whatever does not fit is refused before anything is computed. The sinks are the model's, and not in it.

  tokens [n]                        those of all sequences, one behind the other
  length [B]                        tokens of each
  layers.I.gist_k[.values|.scale|.page], .gist_v, .raw_k, .raw_v      as in the cache, empty pages left out

What NumPy has no name for (bfloat16, float8) is stored as unsigned integers; `dtypes` in the metadata names it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from unigist_jax.disk import writing
from unigist_jax.inference.cache import GistCache, LayerKV
from unigist_jax.inference.gists import QuantizedGists, with_slots
from unigist_jax.layout import GistLayout
from unigist_jax.model import Llama
from unigist_jax.model.fingerprint import fingerprint
from unigist_jax.pages import PAGE, gist_slots

FORMAT = "unigist-cache-2"
_AGAIN = "make it again with launch.compress"


class CacheFile(NamedTuple):
    """What `load_cache` returns: the cache, the tokens that each of its sequences has read, and `in_message`.

    `in_message`: the tokens end within a user's message of a chat template, which a question is to end.
    """

    cache: GistCache
    tokens: list[list[int]]
    in_message: bool


def check_has_gists(model: Llama) -> None:
    """Raises ValueError for a model that was trained for another cache than one of gists."""
    if model.config.attention != "gist":
        raise ValueError(
            f"this model's attention is {model.config.attention!r}: it has not learned gists, which cache files hold; "
            "take a model trained with --config.method=unigist or activation_beacon"
        )


def save_cache(
    path: str | os.PathLike,
    cache: GistCache,
    model: Llama,
    tokens: Sequence[Sequence[int]],
    tokenizer: str,
    in_message: bool = False,
) -> None:
    """Writes a cache, whole or not at all.

    Args:
      path: the file; replaced if it exists.
      cache: as prefill left it; not consumed.
      model: the model that filled it.
      tokens: what each sequence has read.
      tokenizer: fingerprint of the tokenizer that made the tokens.
      in_message: see `CacheFile`.

    Raises:
      ValueError: if the tokens are not as many as the cache has read.
      OSError: if the file cannot be written.
    """
    length = np.asarray(cache.length)
    if [len(sequence) for sequence in tokens] != length.tolist():
        raise ValueError(
            f"tokens of {[len(sequence) for sequence in tokens]} for a cache that has read {length.tolist()}; give "
            "exactly the tokens that were read"
        )
    slots = -(-int(length.max()) // (cache.layout.ratio * PAGE)) * PAGE
    arrays: dict[str, np.ndarray] = {"length": length, "tokens": np.concatenate([np.asarray(t) for t in tokens])}
    arrays = {name: np.asarray(x, np.int32) for name, x in arrays.items()}
    for index, layer in enumerate(cache.layers):
        used = layer._replace(gist_k=with_slots(layer.gist_k, slots), gist_v=with_slots(layer.gist_v, slots))
        arrays |= {f"layers.{index}.{name}": np.asarray(x) for name, x in _named(used).items()}
    dtypes = {name: x.dtype.name for name, x in arrays.items()}
    arrays = {name: np.ascontiguousarray(_storable(x)) for name, x in arrays.items()}
    header = {
        "layout": json.dumps(dataclasses.asdict(cache.layout)),
        "model": fingerprint(model),
        "tokenizer": tokenizer,
        "in_message": json.dumps(in_message),
        "num_layers": str(len(cache.layers)),
        "dtypes": json.dumps(dtypes),
    }
    metadata = {"format": FORMAT, **header, "checksum": _checksum(header, arrays)}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with writing(path):
            save_file(arrays, partial, metadata=metadata)
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_cache(path: str | os.PathLike, model: Llama, tokenizer: str, layout: GistLayout | None = None) -> CacheFile:
    """Reads a cache that `save_cache` wrote.

    Args:
      path: the file.
      model: the model that is to go on from it.
      tokenizer: fingerprint of the tokenizer of what is asked.
      layout: the layout that it must have; None: the model's.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is no cache, damaged, or of another model, layout or tokenizer; naming the file, both values and
        the remedy. Also for a model that is not one of gists.
    """
    check_has_gists(model)
    path, layout = Path(path), model.checked_layout(layout)
    if not path.is_file():
        raise FileNotFoundError(f"there is no cache file {path}; make one with launch.compress")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is no cache file, or truncated ({error}): {_AGAIN}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is not a cache of this version ({metadata.get('format')}, not {FORMAT}): {_AGAIN}")
    header = {name: value for name, value in metadata.items() if name not in ("format", "checksum")}
    if _checksum(header, arrays) != metadata.get("checksum"):
        raise ValueError(f"{path} is damaged, its checksum does not fit its content: {_AGAIN}")
    held = GistLayout(**json.loads(header["layout"]))
    for what, found, wanted in (
        ("layout", held, layout),
        ("model", header["model"], fingerprint(model)),
        ("tokenizer", header["tokenizer"], tokenizer),
    ):
        if found != wanted:
            raise ValueError(f"{path} is of another {what}: {found}, not {wanted}; use the one it was made with")
    return _restored(arrays, header, model, layout)


def _restored(arrays: Mapping[str, np.ndarray], header: Mapping[str, str], model: Llama, layout) -> CacheFile:
    dtypes = json.loads(header["dtypes"])

    def on_device(name: str) -> jax.Array:
        return jnp.asarray(arrays[name].view(jnp.dtype(dtypes[name])))

    def gists(name: str):
        if name in arrays:
            return with_slots(on_device(name), slots)
        parts = (on_device(f"{name}.{part}") for part in QuantizedGists._fields)
        return with_slots(QuantizedGists(*parts), slots)

    length = arrays["length"]
    slots = gist_slots(layout, int(length.max()))
    layers = []
    for index in range(int(header["num_layers"])):
        k, v, *ring = (f"layers.{index}.{part}" for part in LayerKV._fields)
        layers.append(LayerKV(gists(k), gists(v), *map(on_device, ring)))
    empty = GistCache.create(model, 1, 1, layout)
    cache = GistCache(empty.sinks, tuple(layers), jnp.asarray(length), layout)
    tokens = [part.tolist() for part in np.split(arrays["tokens"], np.cumsum(length)[:-1])]
    return CacheFile(cache, tokens, json.loads(header["in_message"]))


def _named(layer: LayerKV) -> dict[str, Any]:
    """The arrays of a layer by name, those of quantised gists by two."""
    named = {}
    for name, value in layer._asdict().items():
        parts = value._asdict() if isinstance(value, QuantizedGists) else {"": value}
        named |= {f"{name}.{part}" if part else name: x for part, x in parts.items()}
    return named


def _storable(x: np.ndarray) -> np.ndarray:
    """The same bits in a dtype that NumPy has."""
    return x if x.dtype.kind in "iuf" and x.dtype.isbuiltin else x.view(f"uint{8 * x.dtype.itemsize}")


def _checksum(header: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of everything that a file says."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
