"""A model and its tokenizer from a directory of either kind: a work directory of `launch.train`, or Hugging Face's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging
from jax.sharding import Mesh

from unigist_jax.config import DataConfig, MeshConfig, OptimConfig, RunConfig, TrainConfig
from unigist_jax.data import Tokenizer
from unigist_jax.layout import GistLayout
from unigist_jax.model import Llama
from unigist_jax.model.hf import load_hf
from unigist_jax.model.hf_config import layout_from_hf
from unigist_jax.training.checkpoint import CONFIG_FILE, Checkpoints, claim_workdir, load_trained


class Loaded(NamedTuple):
    """What a directory holds.

    Attributes:
      model: on one device, or on the mesh among the options.
      tokenizer: the one its weights were trained with.
      data: the config of the data it was trained on; the defaults for a Hugging Face directory, which does not say.
      step: of training; None for a Hugging Face directory.
    """

    model: Llama
    tokenizer: Tokenizer
    data: DataConfig
    step: int | None

    @property
    def origin(self) -> str:
        """Where the weights come from, in words."""
        return "Hugging Face weights" if self.step is None else f"step {self.step}"


def is_hf_directory(directory: str | Path) -> bool:
    """Whether the directory's config.json is one of Hugging Face's."""
    file = Path(directory) / CONFIG_FILE
    try:
        return "model_type" in json.loads(file.read_text())
    except (OSError, ValueError, TypeError):
        return False


def hf_layout(directory: str | Path) -> GistLayout | None:
    """The layout of a Hugging Face directory's model, None for a plain Llama."""
    return layout_from_hf(json.loads((Path(directory) / CONFIG_FILE).read_text()))


def load_directory(directory: str | Path, mesh: Mesh | None = None, **hf_options: Any) -> Loaded:
    """The model and the tokenizer in a directory.

    Args:
      directory: a work directory of `launch.train`, or a Hugging Face Llama checkpoint with its tokenizer.
      mesh: over which the weights are spread; None: the first device has them all.
      **hf_options: further arguments of `load_hf` for the latter. For a plain Llama checkpoint without a `layout` among
        them, the layout is `GistLayout()`, with untrained gists, and the model's `attention` is "full".

    Raises:
      FileNotFoundError, ValueError: if the directory holds neither, or what it holds is damaged; naming the file.
    """
    directory = Path(directory)
    if not is_hf_directory(directory):
        run, model, step = load_trained(directory, mesh)
        return Loaded(model, Tokenizer.load(directory), run.data, step)
    tokenizer = Tokenizer.load(directory)
    if "layout" not in hf_options and hf_layout(directory) is None:
        logging.warning("%s is a plain Llama checkpoint: its gists are untrained, so it attends fully", directory)
        hf_options = {"layout": GistLayout(), "attention": "full"} | hf_options
    model = load_hf(directory, mesh=mesh, **hf_options)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}; "
            "take the tokenizer that belongs to the weights"
        )
    return Loaded(model, tokenizer, DataConfig(), None)


def save_as_run(workdir: str | Path, model: Llama, data: DataConfig) -> None:
    """Makes a work directory that holds a model as its step 0; the tokenizer is the caller's to save.

    It has no optimizer state: commands that read a model take it, `launch.train` does not go on from it.

    Args:
      workdir: the directory.
      model: the model.
      data: goes into the config, its rows cut to whole units.
    """
    row_length = max(1, data.row_length // model.layout.ratio) * model.layout.ratio
    data = dataclasses.replace(data, row_length=row_length)
    run = RunConfig(model.config, model.layout, data, OptimConfig(), TrainConfig(), MeshConfig())
    checkpoints = Checkpoints(Path(workdir))
    checkpoints.save_model(model, step=0)
    checkpoints.close()
    claim_workdir(Path(workdir), run)
