"""Checkpoints of a run: orbax for the arrays, `config.json` for what they are arrays of.

A work directory holds one run:

  config.json        the whole config, the vocabulary's size fixed
  tokenizer.model    sentencepiece (when the run trained one)
  metrics.jsonl
  checkpoints/STEP/  model and optimizer as two items, so that inference reads only the model
"""

from __future__ import annotations

import contextlib
import json
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from unigist_jax.config import RunConfig, config_differences
from unigist_jax.model import Llama, init_llama
from unigist_jax.sharding import abstract_on, check_split, make_mesh
from unigist_jax.training.step import TrainState

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"

# Fields that change where and how a run is computed, watched and kept, not what it computes.
MAY_CHANGE = (
    "mesh.",
    "model.attention_backend",
    "model.remat",
    "train.accumulate",
    "train.checkpoint_every",
    "train.eval_every",
    "train.eval_recall_rows",
    "train.eval_rows",
    "train.keep_checkpoints",
    "train.log_every",
    "train.loss_chunk",
    "train.max_skips",
    "train.on_bad_step",
    "train.spike_norm",
)


class Checkpoints:
    """The checkpoints of a work directory. Saving is asynchronous; `close` waits for the last one."""

    def __init__(self, workdir: Path, keep: int | None = None):
        """Opens (or makes) `workdir/checkpoints`; `keep`: how many of the newest to keep, None for all."""
        self._directory = Path(workdir).absolute() / CHECKPOINTS
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep),
            item_handlers={item: ocp.StandardCheckpointHandler() for item in ("model", "optimizer")},
        )

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint; None: there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Saves a state under its step, unless that step is saved already."""
        step = int(state.step)
        if step == self.latest_step():
            return
        items = {
            "model": ocp.args.StandardSave(_named(state.model)),
            "optimizer": ocp.args.StandardSave(_named(state.opt_state)),
        }
        with self._failure_named():  # of this save or, since they go on in the background, of the one before
            self._manager.save(step, args=ocp.args.Composite(**items))

    def save_model(self, model: Llama, step: int) -> None:
        """Saves a model alone, without an optimizer."""
        self._manager.save(step, args=ocp.args.Composite(model=ocp.args.StandardSave(_named(model))))

    def restore(self, like: TrainState) -> TrainState:
        """The latest state, laid out like `like` (`unigist_jax.training.step.abstract_state`)."""
        step = self.latest_step()
        model, opt_state = self._restore(step, {"model": like.model, "optimizer": like.opt_state})
        return TrainState(jax.device_put(jnp.int32(step), like.step.sharding), model, opt_state)

    def restore_model(self, like: Llama) -> Llama:
        """The latest model alone, laid out like `like` (`unigist_jax.sharding.abstract_on`)."""
        return self._restore(self.latest_step(), {"model": like})[0]

    def _restore(self, step: int, like: dict[str, Any]) -> list[Any]:
        where = self._directory / str(step)
        with _unreadable_named(where):
            saved = {item: self._manager.item_metadata(step)[item] for item in like}
        for item, tree in like.items():
            _check_shapes(where, saved[item], _named(tree))
        args = {item: ocp.args.StandardRestore(_named(tree)) for item, tree in like.items()}
        with _unreadable_named(where):
            restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        return [_filled(tree, restored[item]) for item, tree in like.items()]

    def close(self) -> None:
        """Waits for the save in progress. Raises OSError if it fails."""
        try:
            with self._failure_named():
                self._manager.wait_until_finished()
        finally:
            self._manager.close()

    @contextlib.contextmanager
    def _failure_named(self) -> Iterator[None]:
        """Says what is left and how to go on where a checkpoint cannot be written: a full disk, a lost mount."""
        try:
            yield
        except Exception as error:  # tensorstore raises ValueError for a full disk, others OSError
            reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" …")
            whole = sorted(int(entry.name) for entry in self._directory.iterdir() if entry.name.isdigit())
            left = f"the one of step {whole[-1]} is whole" if whole else "there is none before it"
            raise OSError(
                f"a checkpoint cannot be written to {self._directory} ({reason}); {left}. Free some space, then run "
                "the same command again to go on from there"
            ) from error


@contextlib.contextmanager
def _unreadable_named(where: Path) -> Iterator[None]:
    """Names the checkpoint and the remedy in whatever orbax raises over its files, bare `Exception` included."""
    try:
        yield
    except Exception as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" …")
        raise ValueError(
            f"the checkpoint {where} cannot be read ({reason}); "
            "if its files are damaged, delete that folder to go on from the one before it"
        ) from error


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by a readable path, in the tree's order, but for empty ones (no sinks), which orbax cannot save."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if 0 not in leaf.shape}


def _filled(like: Any, leaves: dict[str, Any]) -> Any:
    """The tree `like` with leaves by name; what is empty is made."""

    def leaf(path, abstract):
        if 0 not in abstract.shape:
            return leaves[_name(path)]
        return jax.device_put(jnp.zeros(abstract.shape, abstract.dtype), abstract.sharding)

    return jax.tree_util.tree_map_with_path(leaf, like)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def _check_shapes(where: Path, saved: Any, expected: dict[str, Any]) -> None:
    """Raises ValueError if a checkpoint holds other arrays than the model (or its optimizer) expects."""
    if saved is None:
        raise ValueError(
            f"{where} is no checkpoint of this project, or damaged; delete that folder to go on from the one before it"
        )
    held = {name: tuple(entry.shape) for name, entry in dict(saved).items()}
    wanted = {name: tuple(leaf.shape) for name, leaf in expected.items()}
    wrong = [
        f"{name}: checkpoint {held.get(name, 'missing')}, model {wanted.get(name, 'missing')}"
        for name in sorted({*held, *wanted})
        if held.get(name) != wanted.get(name)
    ]
    if wrong:
        raise ValueError(f"the checkpoint {where} is of another model or layout: {'; '.join(wrong[:4])}")


# --- config.json ----------------------------------------------------------------------------------------------------


def check_workdir(workdir: Path, run: RunConfig) -> bool:
    """Whether the work directory already holds this very run; the fields of `MAY_CHANGE` may differ.

    Raises:
      ValueError: if it holds another run, naming each field that differs.
    """
    if not (Path(workdir) / CONFIG_FILE).exists():
        return False
    differences = config_differences(read_run(workdir).to_dict(), run.to_dict())
    differences = [line for line in differences if not line.startswith(MAY_CHANGE)]
    if differences:
        raise ValueError(
            f"{workdir} holds a different run ({'; '.join(differences)}); use another --workdir, or delete this one"
        )
    return True


def claim_workdir(workdir: Path, run: RunConfig) -> None:
    """Writes the run's config, unless the work directory holds this very run. Raises as `check_workdir`."""
    if check_workdir(workdir, run):
        return
    path = Path(workdir) / CONFIG_FILE
    Path(workdir).mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(run.to_dict(), indent=2) + "\n")
    os.replace(partial, path)


def read_run(workdir: Path) -> RunConfig:
    """The config of the run in a work directory. Raises ValueError if there is none, or it cannot be read."""
    path = Path(workdir) / CONFIG_FILE
    if not path.exists():
        raise ValueError(f"{workdir} holds no run ({CONFIG_FILE} is missing); train one with launch.train --workdir")
    try:
        return RunConfig.from_dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it, or use another work directory") from error


def has_checkpoint(workdir: Path) -> bool:
    """Whether a finished checkpoint lies in the work directory; opens and makes nothing."""
    directory = Path(workdir) / CHECKPOINTS
    return directory.is_dir() and any(entry.name.isdigit() for entry in directory.iterdir())


def load_trained(workdir: Path, mesh: Mesh | None = None) -> tuple[RunConfig, Llama, int]:
    """The run in a work directory, its latest model, and the step it was saved at.

    Args:
      workdir: the directory.
      mesh: over which the weights are spread; None: the first device has them all.
    """
    run = read_run(workdir)
    if mesh is not None:
        check_split(run.model, mesh.shape)
    if not has_checkpoint(workdir):
        raise ValueError(f"{workdir} holds no checkpoint yet; let launch.train reach its first one")
    checkpoints = Checkpoints(workdir)
    step = checkpoints.latest_step()
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    model = checkpoints.restore_model(abstract_on(mesh, jax.eval_shape(lambda: init_llama(run.model, run.gist, 0))))
    checkpoints.close()
    return run, model, step
