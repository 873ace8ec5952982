"""Converts models between Hugging Face directories and work directories of launch.train, and gives plain ones gists.

  python -m launch.convert --input=Llama-3.2-1B --output=llama-gists --ratio=4      plain Llama to one with (new) gists
  python -m launch.convert --input=runs/mine --output=mine-hf --dtype=bfloat16       trained run to Hugging Face
  python -m launch.convert --input=mine-hf --output=mine-plain --to=plain            without gists, as any Llama
  python -m launch.convert --input=mine-hf --output=runs/again --to=run              to a work directory

Every output can be given to launch.generate and launch.evaluate as --workdir; the first three to launch.train as
--init_from. The tokenizer comes along. The model must fit on the device (--platform=cpu: in memory).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
from absl import flags

from launch.flags import run_main
from unigist_jax.checkpoints import hf_layout, is_hf_directory, load_directory, save_as_run
from unigist_jax.disk import check_folder
from unigist_jax.layout import GistLayout
from unigist_jax.model.config import DTYPES, GIST_INITS
from unigist_jax.model.hf import save_hf

_INPUT = flags.DEFINE_string("input", None, "Hugging Face directory, or work directory of launch.train", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "directory to write; must not hold a model yet", required=True)
_TO = flags.DEFINE_enum("to", "gist", ["gist", "plain", "run"], "gist and plain: Hugging Face; run: work directory")
_DTYPE = flags.DEFINE_enum("dtype", None, list(DTYPES), "of the weights that are written (default: as they are)")
_RATIO = flags.DEFINE_integer("ratio", None, "raws per gist (default: the input's, or 4)", lower_bound=1)
_NUM_SINKS = flags.DEFINE_integer("num_sinks", None, "sinks of a plain Llama (default 128)", lower_bound=0)
_WINDOW = flags.DEFINE_integer("window", None, "raws of the window (default: the input's, or 128)", lower_bound=0)
_GIST_INIT = flags.DEFINE_enum("gist_init", "mean", list(GIST_INITS), "what a plain Llama's new gists begin as")
_SEED = flags.DEFINE_integer("seed", 0, "seed of new gists", lower_bound=0)
_MAX_SHARD_GB = flags.DEFINE_float("max_shard_gb", 5.0, "gigabytes of a weight file at most", lower_bound=1e-6)


def main(_: list[str]) -> None:
    output = Path(_OUTPUT.value)
    if (output / "config.json").exists():
        raise ValueError(f"--output={output} holds a model already; name another directory, or delete this one")
    check_folder(output)
    loaded = load_directory(_INPUT.value, **_new_gists())
    model = loaded.model
    model.layout = model.checked_layout(_asked_layout(model.layout, model.config.attention))
    if _DTYPE.value:
        model = jax.tree.map(lambda leaf: leaf.astype(_DTYPE.value), model)
        model.config = dataclasses.replace(model.config, param_dtype=_DTYPE.value)
    loaded.tokenizer.save(output)
    if _TO.value == "run":
        save_as_run(output, model, loaded.data)
    else:
        save_hf(model, output, max_shard_bytes=int(_MAX_SHARD_GB.value * 1e9), gists=_TO.value == "gist")
    size = sum(leaf.size for leaf in jax.tree.leaves(model))
    gists = "without its gists" if _TO.value == "plain" else str(model.layout)
    print(f"wrote {output}: {size:,} parameters, {model.config.param_dtype}, {gists}")


def _new_gists() -> dict[str, Any]:
    """Arguments of `load_hf` that give a plain Llama gists; none for a model that has its own."""
    if not is_hf_directory(_INPUT.value) or hf_layout(_INPUT.value) is not None:
        return {}
    return {"layout": _asked_layout(GistLayout()), "seed": _SEED.value, "gist_init": _GIST_INIT.value}


def _asked_layout(layout: GistLayout, attention: str = "gist") -> GistLayout:
    """`layout` with what the flags change. Raises ValueError for what a method with chunks does not take."""
    ratio, window = _RATIO.value or layout.ratio, _WINDOW.value
    if layout.chunk and window is not None:
        raise ValueError(
            f"--window={window}, but {_INPUT.value} was trained with chunks of {layout.chunk} raws, and has no window; "
            "leave it out"
        )
    if attention == "autocompressors" and ratio != layout.ratio:
        raise ValueError(
            f"--ratio={ratio}, but {_INPUT.value} has summary tokens for a ratio of {layout.ratio} alone; leave it out"
        )
    changes = {"window": window, "num_sinks": _NUM_SINKS.value}
    changes = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(layout.with_ratio(ratio), **changes)


if __name__ == "__main__":
    run_main(main)
