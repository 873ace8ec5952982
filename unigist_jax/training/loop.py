"""The training loop: data, step, metrics, checkpoints, evaluation; read it top to bottom.

Axis legend
  B  batch rows      T  raws of a row
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from pallas_kernels.backends import check_runs_here
from unigist_jax.config import MeshConfig, RunConfig, config_differences
from unigist_jax.data import PackedRows, Tokenizer, TrainData, eval_batches
from unigist_jax.data.from_config import heldout_rows, recall_rows, run_tokenizer, train_data
from unigist_jax.data.recall_rows import DRILLS
from unigist_jax.layout import GistLayout
from unigist_jax.model import Llama
from unigist_jax.model.hf import load_hf, read_config
from unigist_jax.sharding import batch_sharding, make_mesh
from unigist_jax.training.checkpoint import Checkpoints, check_workdir, claim_workdir, has_checkpoint
from unigist_jax.training.preemption import Preempted, preemption_notice
from unigist_jax.training.report import Profiler, Reporter, Watch
from unigist_jax.training.step import (
    Batch,
    TrainState,
    abstract_state,
    make_eval_step,
    make_recall_step,
    make_state,
    make_train_step,
)

RECALL_SEED = 1_000_033  # of the records of evaluations; training draws its own from other seeds
REASON_BYTES = 2048  # of a failure that process 0 tells the others


def train(
    run: RunConfig,
    workdir: Path,
    *,
    init_from: str | None = None,
    teacher_from: str | None = None,
    stop_at_step: int | None = None,
    watch: Watch = Watch(),
) -> TrainState:
    """Trains a run to its last step, from its latest checkpoint if there is one.

    Args:
      run: the config; a work directory holds exactly one.
      workdir: gets config, tokenizer, metrics and checkpoints; shared by all processes.
      init_from: an HF checkpoint directory to begin with, whose tokenizer the run takes unless it names another;
        None: random weights.
      teacher_from: an HF checkpoint directory of the same shape, for `train.distill_weight`; None: `init_from`.
      stop_at_step: saves and returns after this step, as a preempted job would; None: runs to the end.
      watch: what is shown and recorded besides `metrics.jsonl`.

    Returns:
      The state after the last step run.

    Raises:
      ValueError: for a bad config, corpus, mesh, checkpoint, or a work directory of another run; before training.
      FloatingPointError: if loss or gradient is not finite, or a spike (`train.on_bad_step`); the message holds the
        step and the config.
      Preempted: if SIGTERM came before the last step (`unigist_jax.training.preemption`); the checkpoint is saved.
    """
    workdir = Path(workdir)
    if watch.profile_steps and watch.profile_steps[0] >= run.train.steps:
        raise ValueError(f"--profile begins at step {watch.profile_steps[0]}, and train.steps={run.train.steps}")
    mesh = make_mesh(**dataclasses.asdict(run.mesh))
    if run.model.attention != "full":
        check_runs_here(run.model.attention_backend)
    for directory in filter(None, (init_from, teacher_from)):
        read_config(directory)  # before a corpus is read
    if init_from and not run.data.tokenizer:
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, tokenizer=init_from))
    tokenizer = _first_process_then_all(lambda: run_tokenizer(workdir, run.data))
    run = run.with_vocab_size(tokenizer.vocab_size)
    dataclasses.replace(run, mesh=MeshConfig(**mesh.shape))  # checks the sizes against the mesh that there is
    check_workdir(workdir, run)
    data, heldout, recall = _read_data(run, tokenizer)

    model = _hf_model(run, init_from, mesh) if init_from and not has_checkpoint(workdir) else None
    teacher = _teacher(run, teacher_from or init_from, mesh)
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

        train_step, eval_step, recall_step = make_train_step(run, mesh), make_eval_step(run), make_recall_step(run)
        report = closing.enter_context(Reporter(run, workdir, start, watch))
        report.say(
            f"{_num_parameters(state.model):,} parameters on {jax.device_count()} {jax.devices()[0].device_kind} "
            f"device(s), steps {start} to {end}"
        )
        to_devices, for_training = _device_batches(mesh), _device_batches(mesh, data.is_packed)
        profiler = closing.enter_context(Profiler(workdir, watch.profile_steps))
        for step in range(start, end):
            profiler(step)
            local = data.local_batch(step, jax.process_index(), jax.process_count())
            layout = layout_of_step(run, step)
            state, metrics = train_step(state, for_training(local), teacher=teacher, layout=layout)
            report(step + 1, layout, metrics)
            preempted = told_to_end(step + 1) and step + 1 < end
            if preempted:  # saves first: an evaluation may take longer than the time that is left
                report.flush()
                checkpoints.save(state)
            if run.train.eval_every and ((step + 1) % run.train.eval_every == 0 or step + 1 == run.train.steps):
                report.flush()
                results = heldout_perplexity(state.model, eval_step, map(to_devices, heldout()))
                if recall is not None:
                    results |= heldout_recall(state.model, recall_step, map(to_devices, recall()))
                report.evaluation(step + 1, results)
            if (step + 1) % run.train.checkpoint_every == 0 or step + 1 == end:
                report.flush()
                checkpoints.save(state)
            if preempted:
                raise Preempted(f"ended at step {step + 1} of {end} on SIGTERM; run the same command again to go on")
    return state


def layout_of_step(run: RunConfig, step: int) -> GistLayout:
    """The layout drawn for a step from `run.layouts()`, the same on every host and after every resume."""
    layouts = run.layouts()
    return layouts[np.random.default_rng([run.train.seed, step]).integers(len(layouts))]


def heldout_perplexity(model: Llama, eval_step: Callable, batches: Iterable[Batch]) -> dict[str, float]:
    """Mean loss over all batches in nats a token, and the perplexity that it is."""
    total = count = 0.0
    for batch in batches:
        batch_total, batch_count = eval_step(model, batch)
        total, count = total + float(batch_total), count + float(batch_count)
    loss = total / max(count, 1.0)
    return {"heldout_loss": loss, "heldout_perplexity": math.exp(min(loss, 700.0))}


def heldout_recall(model: Llama, recall_step: Callable, batches: Iterable[Batch]) -> dict[str, float]:
    """Share of the records whose answer greedy decoding gives in one pass, and share of the answers' tokens."""
    sums = [recall_step(model, batch) for batch in batches]
    rows = sum(float(x["rows"]) for x in sums)
    return {f"recall_{name}": sum(float(x[name]) for x in sums) / rows for name in ("answers", "tokens")}


def _read_data(run: RunConfig, tokenizer: Tokenizer) -> tuple[TrainData, Callable, Callable | None]:
    """Training batches by step; functions that yield this process's share of held-out batches and of recall records."""
    data = train_data(run.data, run.gist, tokenizer, run.train.batch_size, run.train.seed)
    kept = heldout_rows(run.data, run.gist, tokenizer, run.train.eval_rows) if run.train.eval_every else None

    def batches(rows):
        share = run.train.batch_size // jax.process_count()
        mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
        for batch in eval_batches(rows, run.train.batch_size):
            yield {name: array[mine] for name, array in batch.items()}

    records = heldout_recall_rows(run, tokenizer) if run.train.eval_recall_rows else None
    return data, partial(batches, kept), records and partial(batches, records)


def heldout_recall_rows(run: RunConfig, tokenizer: Tokenizer) -> PackedRows:
    """Recall records that training never draws, the loss mask on their answers."""
    records = run.train.eval_recall_rows
    kinds = [kind for kind in run.data.recall_kinds.split(",") if kind not in DRILLS]
    asked = dataclasses.replace(
        run.data,
        recall_records=records,
        recall_kinds=",".join(kinds or ["multi_key"]),
        recall_answer_only=True,
        recall_questions=1,
        recall_interleaved=False,
    )
    return recall_rows(asked, run.gist, tokenizer, RECALL_SEED, split="heldout")


def _teacher(run: RunConfig, directory: str | None, mesh: jax.sharding.Mesh) -> Llama | None:
    """The full-attention teacher that `train.distill_weight` asks for, in the dtype of the computation."""
    if not run.train.distill_weight:
        return None
    if directory is None:
        raise ValueError(
            f"train.distill_weight={run.train.distill_weight} needs a teacher; name its checkpoint with --teacher_from"
        )
    frozen = dataclasses.replace(run.model, param_dtype=run.model.dtype)
    return _hf_model(dataclasses.replace(run, model=frozen), directory, mesh)


def _hf_model(run: RunConfig, directory: str, mesh: jax.sharding.Mesh) -> Llama:
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
        raise ValueError(f"{directory} is another model than the config: {'; '.join(differences)}")
    return model


def _device_batches(mesh: jax.sharding.Mesh, is_packed: bool = True) -> Callable[[dict[str, np.ndarray]], Batch]:
    """Turns a process's rows into the global batch on the mesh; rows that are one document each go without borders."""
    sharding = batch_sharding(mesh)

    def to_devices(local: dict[str, np.ndarray]) -> Batch:
        arrays = {
            k: jax.make_array_from_process_local_data(sharding, v)
            for k, v in local.items()
            if is_packed or k != "doc_start"
        }
        return Batch(**{"doc_start": None, **arrays})

    return to_devices


def _first_process_then_all(action: Callable):
    """Runs `action` on process 0, which may write files, and then on the others, which find them.

    Raises what `action` raises; if it fails on process 0, ValueError with its reason on the others.
    """
    if jax.process_count() == 1:
        return action()
    result, failure = None, None
    if first := jax.process_index() == 0:
        try:
            result = action()
        except Exception as error:  # whatever it is, the others wait to be told
            failure = error
    reason = np.frombuffer(str(failure).encode()[:REASON_BYTES].ljust(REASON_BYTES), np.uint8)
    has_failed, reason = multihost_utils.broadcast_one_to_all((np.bool_(failure is not None), reason))
    if failure is not None:
        raise failure
    if has_failed:
        raise ValueError(f"process 0 ended with: {bytes(np.asarray(reason)).decode(errors='replace').strip()}")
    return result if first else action()


def _num_parameters(model: Llama) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(model))
