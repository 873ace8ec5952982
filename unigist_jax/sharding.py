"""The device mesh and the map from logical axes to mesh axes: every PartitionSpec of the project comes from here.

Mesh axes
  data     batch rows, parameters replicated          fsdp    batch rows, parameters and optimizer state split
  context  the units of a row (context.py)            tensor  heads, feed-forward columns, vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "context", "tensor")

LOGICAL_TO_MESH: dict[str | None, Any] = {
    "batch": ("data", "fsdp"),
    "replicas": "data",
    "replica_batch": "fsdp",
    "positions": "context",
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": None,
    "head_dim": None,
    "sinks": None,
    None: None,
}

PARAMETER_AXES: dict[str, tuple[str | None, ...]] = {
    "embedding": ("vocab", "embed"),
    "gist_embedding": ("embed",),
    "sink_embedding": ("sinks", "embed"),
    "head": ("embed", "vocab"),
    "norm/scale": (None,),
    "layers/attention_norm/scale": ("layers", None),
    "layers/mlp_norm/scale": ("layers", None),
    "layers/attention/query": ("layers", "embed", "heads", "head_dim"),
    "layers/attention/key": ("layers", "embed", "heads", "head_dim"),
    "layers/attention/value": ("layers", "embed", "heads", "head_dim"),
    "layers/attention/out": ("layers", "heads", "head_dim", "embed"),
    "layers/mlp/gate": ("layers", "embed", "mlp"),
    "layers/mlp/up": ("layers", "embed", "mlp"),
    "layers/mlp/down": ("layers", "mlp", "embed"),
}


def partition_spec(*logical: str | None) -> PartitionSpec:
    """PartitionSpec of an array with these logical axes. Raises ValueError if two axes claim one mesh axis."""
    mesh_axes = [LOGICAL_TO_MESH[axis] for axis in logical]
    flat = [a for entry in mesh_axes for a in (entry if isinstance(entry, tuple) else (entry,)) if a]
    if len(flat) != len(set(flat)):
        raise ValueError(f"logical axes {logical} map to mesh axes {mesh_axes}: one mesh axis is used twice")
    return PartitionSpec(*mesh_axes)


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """`x`, laid out on the mesh in context by its logical axes; as it is where there is no mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, partition_spec(*logical))


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, context: int = 1, devices: Any = None) -> Mesh:
    """A mesh of all devices (or `devices`). One size may be -1: what the others leave.

    Raises:
      ValueError: if the sizes do not multiply to the device count.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    rest = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh {sizes}: sizes are positive, and at most one of them is -1")
    if free:
        sizes[free[0]] = max(1, len(devices) // rest)
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"mesh {sizes} needs {math.prod(sizes.values())} devices, but there are {len(devices)}; "
            "one size may be -1, for all that the others leave"
        )
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    return Mesh(np.asarray(devices).reshape(shape), MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(shape))


def check_split(config: Any, sizes: Mapping[str, int]) -> None:
    """Raises ValueError unless a mesh of these sizes splits a model of this config evenly. -1 is not looked at."""
    split = {"hidden_size": "fsdp", "num_kv_heads": "tensor", "intermediate_size": "tensor", "vocab_size": "tensor"}
    for name, axis in split.items():
        size, parts = getattr(config, name), sizes[axis]
        if parts > 0 and size % parts:
            raise ValueError(f"mesh.{axis}={parts} does not divide model.{name}={size}")


def parameter_path(path: tuple) -> str:
    """`layers/mlp/up` for the tree path of a parameter, wherever it sits: the model, a dict, an optimizer moment."""
    names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    if names and names[-1] == "value":  # the array inside an nnx.Param
        names.pop()
    suffixes = ("/".join(names[i:]) for i in range(len(names)))
    return next((suffix for suffix in suffixes if suffix in PARAMETER_AXES), "/".join(names))


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """NamedSharding of every leaf: parameters (and moments of them) by `PARAMETER_AXES`, anything else replicated."""

    def of_leaf(path, leaf):
        axes = PARAMETER_AXES.get(parameter_path(path))
        spec = PartitionSpec() if axes is None or len(axes) != leaf.ndim else partition_spec(*axes)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def abstract_on(mesh: Mesh, tree: Any) -> Any:
    """The tree's shapes and dtypes, each with its sharding: what a checkpoint is restored into. Allocates nothing."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        tree_shardings(mesh, tree),
    )


def layer_sharding(stack: Any) -> Any:
    """That of one layer, from the sharding of a stack of layers; one that is no NamedSharding, or None, as it is."""
    if not isinstance(stack, NamedSharding):
        return stack
    return NamedSharding(stack.mesh, PartitionSpec(*stack.spec[1:]))


def columns_sharding(table: Any, num_columns: int) -> Any:
    """Columns of a table over the mesh's `tensor` axis, where there is one that divides them; else the table's own."""
    devices = table.mesh.shape.get("tensor", 1) if isinstance(table, NamedSharding) else 1
    if devices == 1 or num_columns % devices:
        return table
    return NamedSharding(table.mesh, PartitionSpec(None, "tensor"))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, partition_spec("batch"))
