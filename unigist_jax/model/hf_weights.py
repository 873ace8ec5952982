"""How Hugging Face names and lays out each parameter of a Llama.

The names are those of HF's `LlamaForCausalLM`, plus `unigist.gist_embedding` [E] and `unigist.sink_embedding` [s, E].
HF stores a projection as the matrix [outputs, inputs]; here it is [inputs…, outputs…], heads apart from head dims, and
the layers are stacked. The rotary pairing is the same, so nothing else changes.

  here                      HF, for each layer
  query  [L, E, Hq, D]      self_attn.q_proj  [Hq * D, E]
  out    [L, Hq, D, E]      self_attn.o_proj  [E, Hq * D]
  gate   [L, E, F]          mlp.gate_proj     [F, E]
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class HfWeight(NamedTuple):
    """What HF calls a parameter, and how it lays it out.

    Attributes:
      name: the tensor's name; `{}` stands for the layer.
      inputs: leading axes (the layer axis apart) that a projection contracts: HF flattens and transposes those and the
        others. None: stored as it is here.
    """

    name: str
    inputs: int | None = None

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """HF's shape of a parameter (of one layer) of this shape."""
        if self.inputs is None:
            return shape
        return math.prod(shape[self.inputs :]), math.prod(shape[: self.inputs])

    def read(self, stored: Any, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
        """`parameter[index]` of a parameter (of one layer) of this shape, reading no more of `stored` than it takes.

        Args:
          stored: a safetensors slice of HF's shape.
          shape: the parameter's shape.
          index: a slice with start and stop for each axis.
        """
        if 0 in shape:  # of which safetensors cannot take a slice
            return np.empty([i.stop - i.start for i in index], np.float32)
        if self.inputs is None:
            return stored[index]
        groups = slice(None, self.inputs), slice(self.inputs, None)
        columns, rows = (_flat_range(shape[group], index[group]) for group in groups)
        kept = [i for group in groups for i in (slice(None), *index[group][1:])]
        sizes = [n for group in groups for n in (index[group][0].stop - index[group][0].start, *shape[group][1:])]
        return stored[rows, columns].T.reshape(sizes)[tuple(kept)]

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """A parameter (of one layer) as HF stores it, contiguous: safetensors writes memory as it lies."""
        if self.inputs is not None:
            array = array.reshape(math.prod(array.shape[: self.inputs]), -1).T
        return np.ascontiguousarray(array)


HF_WEIGHTS: dict[str, HfWeight] = {
    "embedding": HfWeight("model.embed_tokens.weight"),
    "layers/attention_norm/scale": HfWeight("model.layers.{}.input_layernorm.weight"),
    "layers/attention/query": HfWeight("model.layers.{}.self_attn.q_proj.weight", inputs=1),
    "layers/attention/key": HfWeight("model.layers.{}.self_attn.k_proj.weight", inputs=1),
    "layers/attention/value": HfWeight("model.layers.{}.self_attn.v_proj.weight", inputs=1),
    "layers/attention/out": HfWeight("model.layers.{}.self_attn.o_proj.weight", inputs=2),
    "layers/mlp_norm/scale": HfWeight("model.layers.{}.post_attention_layernorm.weight"),
    "layers/mlp/gate": HfWeight("model.layers.{}.mlp.gate_proj.weight", inputs=1),
    "layers/mlp/up": HfWeight("model.layers.{}.mlp.up_proj.weight", inputs=1),
    "layers/mlp/down": HfWeight("model.layers.{}.mlp.down_proj.weight", inputs=1),
    "norm/scale": HfWeight("model.norm.weight"),
    "head": HfWeight("lm_head.weight", inputs=1),
    "gist_embedding": HfWeight("unigist.gist_embedding"),
    "sink_embedding": HfWeight("unigist.sink_embedding"),
}
GIST_PARAMETERS = ("gist_embedding", "sink_embedding")


def is_stacked(path: str) -> bool:
    """Whether a parameter has a leading layer axis, and so one tensor a layer in HF."""
    return path.startswith("layers/")


def names_and_shape(path: str, shape: tuple[int, ...]) -> tuple[list[str], tuple[int, ...]]:
    """HF's tensor names of a parameter, one a layer, and the parameter's shape in one layer."""
    name = HF_WEIGHTS[path].name
    if is_stacked(path):
        return [name.format(layer) for layer in range(shape[0])], shape[1:]
    return [name], shape


def _flat_range(shape: tuple[int, ...], index: tuple[slice, ...]) -> slice:
    """The range, along the flattened axes, of the entries that `index` takes from the first axis."""
    stride = math.prod(shape[1:])
    return slice(index[0].start * stride, index[0].stop * stride)
