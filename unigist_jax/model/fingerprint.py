"""A short name for a model's weights, to tell whether something was made with them.

Axis legend
  n  elements of a parameter
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from unigist_jax.model.llama import Llama
from unigist_jax.sharding import parameter_path

_HOW = ("attention", "attention_backend", "gist_init", "gist_init_scale", "param_dtype", "remat")  # not what


def fingerprint(model: Llama) -> str:
    """16 hex digits that fix the function a model computes: its sizes, and every weight in the compute dtype.

    The same for stacked layers and for those that `for_inference` took apart. It reads the weights once, on their
    devices: two sums of their bits with weights by place.
    """
    config = dataclasses.asdict(model.config)
    digest = hashlib.sha256(json.dumps({k: config[k] for k in config if k not in _HOW}, sort_keys=True).encode())
    parts = {name: getattr(model, name) for name in ("embedding", "gist_embedding", "sink_embedding", "head", "norm")}
    parts |= {f"layer {index}": model.layer(index) for index in range(model.config.num_layers)}
    sums = {}
    for part, tree in parts.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = f"{part} {parameter_path(path)}"
            sums[name] = _bit_sums(leaf, leaf.dtype if "norm" in name else jnp.dtype(model.config.dtype))
    for name, (plain, mixed) in sorted(jax.device_get(sums).items()):
        digest.update(f"{name} {plain:08x} {mixed:08x}\n".encode())
    return digest.hexdigest()[:16]


@partial(jax.jit, static_argnames=("dtype",))
def _bit_sums(x: Array, dtype: jnp.dtype) -> tuple[UInt32[Array, ""], UInt32[Array, ""]]:
    """Two sums, modulo 2**32, of the elements' bits times odd numbers by place: no single change leaves them."""
    unsigned = {2: jnp.uint16, 4: jnp.uint32}[dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x.astype(dtype), unsigned).astype(jnp.uint32).reshape(-1)
    place = jax.lax.iota(jnp.uint32, bits.shape[0])
    mixed = (place ^ (place >> 15)) * jnp.uint32(0x2C1B3C6D)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32), jnp.sum(bits * (2 * mixed + 1), dtype=jnp.uint32)
