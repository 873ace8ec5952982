"""Trains a model with gists.

  python -m launch.train --config=configs/tiny.py --workdir=runs/tiny --config.train.steps=100

Run the same command again to resume from the latest checkpoint. On SIGTERM it saves one, ends with exit code 75 and so
asks to be started again.

Will it fit? Without any such device (TPU slices need libtpu, GPUs jax's CUDA plugin and nvidia-cuda-nvcc):

  python -m launch.train --config=configs/llama31_8b.py --workdir=runs/8b --compile_only --topology=v5p:4x4x4

prints the memory of a device and its useful operations, and writes them to WORKDIR/compile-v5p-4x4x4.json.

Several processes: start it in each with --coordinator_address, --num_processes and --process_id. Under Slurm's srun
these are found by themselves; on a TPU pod slice --distributed finds them.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path

import jax
from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from launch.flags import run_main
from unigist_jax.config import RunConfig
from unigist_jax.training.loop import train
from unigist_jax.training.preemption import REQUEUE_EXIT_CODE, Preempted
from unigist_jax.training.report import Watch

_CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config()", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run: config, tokenizer, metrics, checkpoints")
_INIT_FROM = flags.DEFINE_string("init_from", None, "HF Llama checkpoint directory to begin with (default: random)")
_TEACHER_FROM = flags.DEFINE_string(
    "teacher_from", None, "HF Llama checkpoint directory of the teacher, for train.distill_weight (default: init_from)"
)
_STOP_AT_STEP = flags.DEFINE_integer(
    "stop_at_step", None, "save and end after this step, to go on later", lower_bound=1
)
_TENSORBOARD = flags.DEFINE_bool("tensorboard", True, "write TensorBoard events too, if tensorboardX is installed")
_PROGRESS = flags.DEFINE_bool("progress", True, "show a progress bar")
_WANDB = flags.DEFINE_string("wandb", None, "project of Weights & Biases to log to as well")
_PROFILE = flags.DEFINE_string("profile", None, "FIRST:LAST steps, from 0, to profile into WORKDIR/profile")
_CACHE = flags.DEFINE_string("compilation_cache", None, "directory in which compiled programs are kept and found again")
_COMPILE_ONLY = flags.DEFINE_bool("compile_only", False, "only compile the step, print what it takes, and end")
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "devices that --compile_only compiles for: v5p:4x4x4, v6e:4x4, h100:8 (default: this machine's)"
)
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "host:port of process 0, for several processes")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "processes of this run", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "number of this process, from 0", lower_bound=0)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "several processes, which jax finds by itself: TPU pod slice, Open MPI, Kubernetes"
)
flags.mark_flags_as_required(["config", "workdir"])


@flags.multi_flags_validator(
    ["coordinator_address", "num_processes", "process_id"],
    "--coordinator_address, --num_processes and --process_id go together",
)
def _all_or_none(values) -> bool:
    return len({value is None for value in values.values()}) == 1


def _profile_steps() -> tuple[int, int] | None:
    if _PROFILE.value is None:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", _PROFILE.value)
    if not match or int(match[2]) < int(match[1]):
        raise ValueError(f"--profile={_PROFILE.value} is not FIRST:LAST, two steps counted from 0")
    return int(match[1]), int(match[2])


def _compile_only(run: RunConfig) -> None:
    from unigist_jax.training.ahead_of_time import compile_step, describe, find_target, this_machine

    result = compile_step(run, find_target(_TOPOLOGY.value) if _TOPOLOGY.value else this_machine())
    result["command"] = " ".join(["python -m launch.train", *sys.argv[1:]])
    print(describe(result))
    file = Path(_WORKDIR.value) / f"compile-{result['target'].replace(':', '-')}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {file}")


def main(_: list[str]) -> None:
    # Before the loop, which listens itself, there is nothing to save.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(REQUEUE_EXIT_CODE))
    if not isinstance(_CONFIG.value, ConfigDict):
        raise ValueError(
            f"get_config() of --config gives a {type(_CONFIG.value).__name__}, not an ml_collections.ConfigDict"
        )
    run = RunConfig.from_dict(_CONFIG.value.to_dict())
    if _TOPOLOGY.value and not _COMPILE_ONLY.value:
        raise ValueError(
            f"--topology={_TOPOLOGY.value} without --compile_only: training runs on the devices here; give both"
        )
    if _CACHE.value:
        jax.config.update("jax_compilation_cache_dir", _CACHE.value)
    if _COMPILE_ONLY.value:
        return _compile_only(run)
    if _COORDINATOR.value:
        jax.distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    elif _DISTRIBUTED.value or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        jax.distributed.initialize()
    logging.info("%d processes, devices %s", jax.process_count(), jax.devices())
    try:
        train(
            run,
            _WORKDIR.value,
            init_from=_INIT_FROM.value,
            stop_at_step=_STOP_AT_STEP.value,
            teacher_from=_TEACHER_FROM.value,
            watch=Watch(_PROGRESS.value, _TENSORBOARD.value, _WANDB.value, _profile_steps()),
        )
    except Preempted as preempted:
        print(preempted, file=sys.stderr)
        sys.exit(REQUEUE_EXIT_CODE)


if __name__ == "__main__":
    run_main(main)
