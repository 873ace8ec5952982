"""Which parameters learn: all of them, or the gist and sink embeddings alone with everything else frozen."""

from __future__ import annotations

from typing import Any

import jax

from unigist_jax.model import Llama
from unigist_jax.sharding import parameter_path

GIST_PARAMETERS = ("gist_embedding", "sink_embedding")


def split_trainable(model: Llama, trainable: str) -> tuple[Any, Any]:
    """The parameters that learn and those that are frozen: two trees like the model, None for what the other has."""

    def learns(path) -> bool:
        return trainable == "all" or parameter_path(path) in GIST_PARAMETERS

    def part(wanted: bool):
        return jax.tree_util.tree_map_with_path(lambda path, x: x if learns(path) == wanted else None, model)

    return part(True), part(False)


def joined(trained: Any, frozen: Any) -> Llama:
    """The model of which `split_trainable` made two parts."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda x: x is None)
