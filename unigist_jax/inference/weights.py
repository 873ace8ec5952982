"""A model's weights as inference wants them: each layer an array of its own, in the dtype of the computation.

A step of decoding reads every weight once. From a stack of all layers XLA copies each layer's slice out first, which
takes three times the traffic; from arrays of its own it reads in place. Training and Hugging Face directories have
stacks, and the device never holds both: each stack is freed as soon as its layers are cut.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int32

from unigist_jax.model import Llama
from unigist_jax.sharding import columns_sharding, layer_sharding, parameter_path


def for_inference(model: Llama) -> Llama:
    """The same function as `model`, its layers apart, its weights but those of norms in the config's dtype.

    Consumes `model`: its arrays are freed one by one, so that beside the weights the device holds one stack at most.
    What is apart already is taken as it is. Shardings are kept, but for the embeddings on a mesh with `tensor`: split
    by rows they would be gathered whole at every step, so their columns are split.
    """
    config = model.config
    if model.is_stacked:
        stacks, treedef = jax.tree_util.tree_flatten_with_path(model.layers)
        layers = [[] for _ in range(config.num_layers)]
        for path, stack in stacks:
            dtype = stack.dtype if "norm" in parameter_path(path) else jnp.dtype(config.dtype)
            for index, leaves in enumerate(layers):
                leaves.append(_cut(stack, index, dtype, layer_sharding(stack.sharding)))
            stack.delete()
        apart = nnx.List([jax.tree.unflatten(treedef, leaves) for leaves in layers])
    else:
        apart = model.layers
    out = jax.tree.map(lambda x: x, model)
    out.layers = apart
    for name in ("embedding", "gist_embedding", "sink_embedding", "head"):
        if getattr(out, name) is not None:
            old = getattr(out, name)[...]
            placed = columns_sharding(old.sharding, old.shape[1]) if name == "embedding" else old.sharding
            if old.dtype != config.dtype or placed != old.sharding:
                setattr(out, name, nnx.Param(jax.device_put(old.astype(config.dtype), placed)))
                old.delete()
    return out


@partial(jax.jit, static_argnames=("dtype", "sharding"))
def _cut(stack: Array, index: Int32[Array, ""], dtype: jnp.dtype, sharding) -> Array:
    """Layer `index` of a stack."""
    layer = jax.lax.dynamic_index_in_dim(stack, index, keepdims=False).astype(dtype)
    return jax.lax.with_sharding_constraint(layer, sharding)
