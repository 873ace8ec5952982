"""The training loop: data, step, metrics, checkpoints, evaluation; read it top to bottom.

Axis legend
  B  batch rows      T  raws of a row
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from unigist_jax.config import MeshConfig, RunConfig, config_differences
from unigist_jax.data import Tokenizer, TrainData, eval_batches
from unigist_jax.data.from_config import recall_rows, run_tokenizer, spread_rows, text_rows
from unigist_jax.model import Llama
from unigist_jax.model.hf import load_hf
from unigist_jax.sharding import batch_sharding, make_mesh
from unigist_jax.training.checkpoint import Checkpoints, check_workdir, claim_workdir, has_checkpoint
from unigist_jax.training.metrics import MetricsWriter
from unigist_jax.training.preemption import Preempted, preemption_notice
from unigist_jax.training.step import Batch, TrainState, abstract_state, make_eval_step, make_state, make_train_step


def train(
    run: RunConfig,
    workdir: Path,
    *,
    init_from: str | None = None,
    stop_at_step: int | None = None,
    tensorboard: bool = True,
    progress: bool = True,
) -> TrainState:
    """Trains a run to its last step, from its latest checkpoint if there is one.

    Args:
      run: the config; a work directory holds exactly one.
      workdir: gets config, tokenizer, metrics and checkpoints; shared by all processes.
      init_from: an HF checkpoint directory to begin with; None: random weights.
      stop_at_step: saves and returns after this step, as a preempted job would; None: runs to the end.
      tensorboard: also writes TensorBoard events where tensorboardX is installed.
      progress: shows a progress bar.

    Returns:
      The state after the last step run.

    Raises:
      ValueError: for a bad config, corpus, mesh, checkpoint, or a work directory of another run; before training.
      FloatingPointError: if loss or gradient is not finite; the message holds the step and the config.
      Preempted: if SIGTERM came before the last step (`unigist_jax.training.preemption`); the checkpoint is saved.
    """
    workdir = Path(workdir)
    is_first = jax.process_index() == 0
    mesh = make_mesh(**dataclasses.asdict(run.mesh))
    tokenizer = _first_process_then_all(lambda: run_tokenizer(workdir, run.data))
    run = run.with_vocab_size(tokenizer.vocab_size)
    dataclasses.replace(run, mesh=MeshConfig(**mesh.shape))  # checks the sizes against the mesh that there is
    check_workdir(workdir, run)
    data, heldout = _read_data(run, tokenizer)

    model = _initial_model(run, init_from, mesh) if init_from and not has_checkpoint(workdir) else None
    _first_process_then_all(lambda: claim_workdir(workdir, run))  # now that nothing in the config can be wrong any more
    with jax.set_mesh(mesh), preemption_notice() as told_to_end, contextlib.ExitStack() as closing:
        checkpoints = Checkpoints(workdir, run.train.keep_checkpoints)
        closing.callback(checkpoints.close)
        if checkpoints.latest_step() is None:
            state = make_state(run, mesh, model)
        else:
            state = checkpoints.restore(abstract_state(run, mesh))
        start = int(state.step)
        end = run.train.steps if stop_at_step is None else min(stop_at_step, run.train.steps)

        train_step, eval_step = make_train_step(run, mesh), make_eval_step(run)
        writer = MetricsWriter(workdir, start, tensorboard) if is_first else None
        if writer is not None:
            closing.callback(writer.close)
        if progress and is_first:
            place = f"{jax.device_count()} {jax.devices()[0].device_kind} device(s)"
            tqdm.write(f"{_num_parameters(state.model):,} parameters on {place}, steps {start} to {end}")
        bar = tqdm(total=run.train.steps, initial=start, unit="step", disable=not (progress and is_first))
        closing.callback(bar.close)
        report = _Reporter(run, writer, bar)
        to_devices = _device_batches(mesh)
        for step in range(start, end):
            local = data.local_batch(step, jax.process_index(), jax.process_count())
            state, metrics = train_step(state, to_devices(local))
            report(step + 1, metrics)
            preempted = told_to_end(step + 1) and step + 1 < end
            if preempted:  # saves first: an evaluation may take longer than the time that is left
                report.flush()
                checkpoints.save(state)
            if run.train.eval_every and ((step + 1) % run.train.eval_every == 0 or step + 1 == run.train.steps):
                report.flush()
                loss = heldout_loss(state.model, eval_step, map(to_devices, heldout()))
                report.heldout(step + 1, loss)
            if (step + 1) % run.train.checkpoint_every == 0 or step + 1 == end:
                report.flush()
                checkpoints.save(state)
            if preempted:
                raise Preempted(f"ended at step {step + 1} of {end} on SIGTERM; run the same command again to go on")
    return state


def heldout_loss(model: Llama, eval_step: Callable, batches: Iterable[Batch]) -> float:
    """Mean loss in nats a token over all batches."""
    total = count = 0.0
    for batch in batches:
        batch_total, batch_count = eval_step(model, batch)
        total, count = total + float(batch_total), count + float(batch_count)
    return total / max(count, 1.0)


class _Reporter:
    """Reports each step one step late, so that the device never waits for the host; stops where one is not finite."""

    def __init__(self, run: RunConfig, writer: MetricsWriter | None, bar: tqdm):
        self._run, self._writer, self._bar = run, writer, bar
        self._pending: tuple[int, dict] | None = None
        self._since = time.perf_counter()
        self._steps = 0

    def __call__(self, step: int, metrics: dict) -> None:
        self.flush()
        self._pending = step, metrics

    def flush(self) -> None:
        """Waits for the step in flight and reports it."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        scalars = {name: float(value) for name, value in metrics.items()}
        if not math.isfinite(scalars["loss"]) or not math.isfinite(scalars["grad_norm"]):
            raise FloatingPointError(
                f"loss is {scalars['loss']} at step {step} (grad_norm {scalars['grad_norm']}, learning_rate "
                f"{scalars['learning_rate']}); no checkpoint holds this step. Lower optim.peak_lr or optim.clip_norm, "
                f"or look at the data. Config: {json.dumps(self._run.to_dict())}"
            )
        self._steps += 1
        self._bar.update()
        if step % self._run.train.log_every:
            return
        now = time.perf_counter()
        tokens = self._steps * self._run.train.batch_size * self._run.data.row_length
        scalars["tokens_per_second"] = tokens / (now - self._since)
        self._since, self._steps = now, 0
        self._bar.set_postfix_str(f"loss {scalars['loss']:.4f}, {scalars['tokens_per_second']:,.0f} tokens/s")
        if self._writer is not None:
            self._writer.write(step, scalars)

    def heldout(self, step: int, loss: float) -> None:
        """Reports an evaluation, whose time does not count as training's."""
        if self._writer is not None:
            self._writer.write(step, {"heldout_loss": loss, "heldout_perplexity": math.exp(min(loss, 700.0))})
            self._bar.write(f"step {step}: held-out loss {loss:.4f}, perplexity {math.exp(min(loss, 700.0)):.2f}")
        self._since = time.perf_counter()


def _read_data(run: RunConfig, tokenizer: Tokenizer) -> tuple[TrainData, Callable]:
    """Training batches by step, and a function that yields this process's share of the held-out batches."""
    recall = recall_rows(run.data, run.gist, tokenizer, run.train.seed) if run.data.recall_weight else None
    rows = text_rows(run.data, run.gist, tokenizer, "train")
    data = TrainData(rows, recall, run.data.recall_weight, run.train.batch_size, run.train.seed)
    heldout_rows = spread_rows(text_rows(run.data, run.gist, tokenizer, "heldout"), run.train.eval_rows)

    def heldout():
        share = run.train.batch_size // jax.process_count()
        mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
        for batch in eval_batches(heldout_rows, run.train.batch_size):
            yield {name: array[mine] for name, array in batch.items()}

    return data, heldout


def _initial_model(run: RunConfig, directory: str, mesh: jax.sharding.Mesh) -> Llama:
    """The HF checkpoint as this run's model. Raises ValueError if its shape is not the config's."""
    ours = dataclasses.asdict(run.model)
    names = "attention", "param_dtype", "dtype", "remat", "attention_backend", "gist_init", "gist_init_scale"
    choices = {name: ours[name] for name in names}
    model = load_hf(directory, run.gist, mesh=mesh, seed=run.train.seed, **choices)
    theirs = dataclasses.asdict(model.config)
    differences = config_differences(
        {name: value for name, value in theirs.items() if name != "max_position_embeddings"},
        {name: ours[name] for name in theirs if name != "max_position_embeddings"},
        "model.",
    )
    if differences:
        raise ValueError(f"--init_from={directory} is another model than the config: {'; '.join(differences)}")
    return model


def _device_batches(mesh: jax.sharding.Mesh) -> Callable[[dict[str, np.ndarray]], Batch]:
    """Turns a process's rows into the global batch on the mesh."""
    sharding = batch_sharding(mesh)
    return lambda local: Batch(**{k: jax.make_array_from_process_local_data(sharding, v) for k, v in local.items()})


def _first_process_then_all(action: Callable):
    """Runs `action` on process 0, which may write files, and then on the others, which find them."""
    result = action() if jax.process_index() == 0 else None
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("first process done")
    return result if jax.process_index() == 0 else action()


def _num_parameters(model: Llama) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(model))
