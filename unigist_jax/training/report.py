"""What is told of a run while it goes on: metrics of steps and evaluations, speed, the progress bar, a profile."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import jax
from tqdm import tqdm

from unigist_jax.config import RunConfig
from unigist_jax.layout import GistLayout
from unigist_jax.training.flops import peak_flops
from unigist_jax.training.metrics import MetricsWriter, check_wandb


@dataclasses.dataclass(frozen=True)
class Watch:
    """What is shown and recorded of a run besides `metrics.jsonl`.

    Attributes:
      progress: a progress bar.
      tensorboard: TensorBoard events, where tensorboardX is installed.
      wandb_project: a project of Weights & Biases, or None.
      profile_steps: (first, last) step, counted from 0, to profile into `workdir/profile`; None: none.
    """

    progress: bool = True
    tensorboard: bool = True
    wandb_project: str | None = None
    profile_steps: tuple[int, int] | None = None

    def __post_init__(self):
        if self.wandb_project:
            check_wandb(self.wandb_project)


class Reporter:
    """Reports each step one step late, so that the device never waits for the host; stops where one is bad.

    A context manager; process 0 alone writes.

    Speed is counted from one report to the next: `tokens_per_second` in raws, `model_tokens_per_second` in raws and
    gists, and where the device's peak is known `mfu`, useful operations (`unigist_jax.training.flops`) over that peak.
    """

    def __init__(self, run: RunConfig, workdir: Path, start: int, watch: Watch):
        first = jax.process_index() == 0
        self._run = run
        self._writer = MetricsWriter(workdir, start, watch.tensorboard, watch.wandb_project) if first else None
        shown = watch.progress and first
        self._bar = tqdm(total=run.train.steps, initial=start, unit="step", disable=not shown)
        peak = peak_flops(jax.devices()[0])
        self._peak = peak and peak * jax.device_count()
        self._pending: tuple[int, GistLayout, dict] | None = None
        self._bad_in_a_row = 0
        self._restart_clock()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()
        if self._writer is not None:
            self._writer.close()

    def say(self, line: str) -> None:
        """Shows a line above the progress bar."""
        if not self._bar.disable:
            self._bar.write(line)

    def __call__(self, step: int, layout: GistLayout, metrics: dict) -> None:
        self.flush()
        self._pending = step, layout, metrics

    def flush(self) -> None:
        """Waits for the step in flight and reports it. Raises FloatingPointError if the run has to stop there."""
        if self._pending is None:
            return
        step, layout, metrics = self._pending
        self._pending = None
        scalars = {name: float(value) for name, value in metrics.items()}
        self._check(step, scalars)
        raws = self._run.train.batch_size * self._run.data.row_length
        gists = 0 if self._run.model.attention == "full" else raws // layout.ratio
        for name, count in (("raws", raws), ("positions", raws + gists), ("flops", scalars.pop("flops"))):
            self._done[name] = self._done.get(name, 0) + count
        self._bar.update()
        if step % self._run.train.log_every:
            return
        seconds = time.perf_counter() - self._since
        scalars["tokens_per_second"] = self._done["raws"] / seconds
        scalars["model_tokens_per_second"] = self._done["positions"] / seconds
        if self._peak:
            scalars["mfu"] = self._done["flops"] / seconds / self._peak
        if self._run.train.mixed_ratios:
            scalars["ratio"] = layout.ratio
        self._restart_clock()
        self._bar.set_postfix_str(f"loss {scalars['loss']:.4f}, {scalars['tokens_per_second']:,.0f} tokens/s")
        if self._writer is not None:
            self._writer.write(step, scalars)

    def evaluation(self, step: int, results: dict[str, float]) -> None:
        """Reports an evaluation, whose time does not count as training's."""
        if self._writer is not None:
            self._writer.write(step, results)
        named = [f"{name.replace('heldout_', 'held-out ')} {value:.4f}" for name, value in results.items()]
        self.say(f"step {step}: {', '.join(named)}")
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._since, self._done = time.perf_counter(), {}

    def _check(self, step: int, scalars: dict[str, float]) -> None:
        if not scalars.pop("bad"):
            self._bad_in_a_row = 0
            if self._run.train.on_bad_step == "skip":
                scalars["skipped"] = 0.0
            return
        settings = self._run.train
        self._bad_in_a_row += 1
        report = (
            f"loss is {scalars['loss']} at step {step} (grad_norm {scalars['grad_norm']}, learning_rate "
            f"{scalars['learning_rate']}, train.spike_norm {settings.spike_norm})"
        )
        if settings.on_bad_step == "skip" and self._bad_in_a_row <= settings.max_skips:
            scalars["skipped"] = 1.0
            self.say(f"{report}: skipped")
            return
        tail = f" after {settings.max_skips} skipped ones in a row" if settings.on_bad_step == "skip" else ""
        raise FloatingPointError(
            f"{report}{tail}; no checkpoint holds this step. Lower optim.peak_lr or optim.clip_norm, set "
            f"train.on_bad_step to 'skip', or look at the data. Config: {json.dumps(self._run.to_dict())}"
        )


class Profiler:
    """Records a window of steps with jax's profiler into `workdir/profile`, for TensorBoard or XProf."""

    def __init__(self, workdir: Path, steps: tuple[int, int] | None):
        self._directory = str(Path(workdir) / "profile")
        self._steps = steps
        self._running = False

    def __enter__(self) -> Profiler:
        return self

    def __call__(self, step: int) -> None:
        """To be called before each step."""
        if self._steps is None:
            return
        first, last = self._steps
        if step == first:
            jax.profiler.start_trace(self._directory)
            self._running = True
        if step == last + 1:
            self.stop()

    def stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
        self._running = False

    def __exit__(self, *_) -> None:
        self.stop()
