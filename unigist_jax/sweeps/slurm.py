"""The executor on a Slurm cluster: one sbatch array, a task a run, `srun python -m launch.train …` in each.

A run that is preempted saves its checkpoint, ends with `REQUEUE_EXIT_CODE`, and its task goes back into the queue.
Slurm sees to that itself when it preempts or requeues a job, or loses a node; the script does when the run alone was
told to end, as it is some time before its time limit.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence

from unigist_jax.sweeps.state import RunRecord, SweepDirectory
from unigist_jax.training.preemption import REQUEUE_EXIT_CODE

_EXIT_CODE_FILE = "exit_code"
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "RESV_DEL_HOLD", "SPECIAL_EXIT", "CONFIGURING")
_GONE = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


@dataclasses.dataclass(frozen=True)
class SlurmResources:
    """What each run asks of Slurm; "" and None leave a matter to the cluster.

    Attributes:
      nodes: of a run.
      tasks_per_node: processes on each node; None: one a GPU, else one.
      gpus_per_node: GPUs of each node; 0 asks for none.
      cpus_per_task, mem, time, partition, account, qos: as sbatch takes them.
      notice: seconds before the time limit at which a run is told to end, and put back into the queue; 0: never.
      options: further options of sbatch, such as "--exclusive".
      setup: shell commands before the run, such as "module load cuda".
      at_a_time: how many runs of the sweep may run at once; None: as many as find room.

    Raises:
      ValueError: naming the flag.
    """

    nodes: int = 1
    tasks_per_node: int | None = None
    gpus_per_node: int = 0
    cpus_per_task: int | None = None
    mem: str = ""
    time: str = ""
    partition: str = ""
    account: str = ""
    qos: str = ""
    notice: int = 120
    options: tuple[str, ...] = ()
    setup: str = ""
    at_a_time: int | None = None

    def __post_init__(self):
        if self.gpus_per_node and self.nodes * self.tasks > 1 and self.tasks != self.gpus_per_node:
            raise ValueError(
                f"--slurm_tasks_per_node={self.tasks} with --slurm_gpus_per_node={self.gpus_per_node}: where a run has "
                "several processes, jax gives each of them one GPU, so the two must be equal"
            )
        for option in self.options:
            if not option.startswith("-"):
                raise ValueError(f"--slurm_option={option} is no option of sbatch; write --slurm_option=--{option}")

    @property
    def tasks(self) -> int:
        """Processes of a run on each node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    def sbatch_lines(self) -> list[str]:
        """The options as lines of a batch script."""
        options = {
            "nodes": self.nodes,
            "ntasks-per-node": self.tasks,
            "gpus-per-node": self.gpus_per_node,
            "cpus-per-task": self.cpus_per_task,
            "mem": self.mem,
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "signal": f"TERM@{self.notice}" if self.notice else "",
        }
        given = [f"#SBATCH --{name}={value}" for name, value in options.items() if value]
        return [*given, *(f"#SBATCH {option}" for option in self.options)]


_SCRIPT = """\
#!/bin/bash
# One run of a sweep a task, {count} in all. Written by launch.sweep; it can be submitted again by hand.
#SBATCH --job-name="{name}"
#SBATCH --array={array}
#SBATCH --output="{output}/slurm/%A_%a.log"
#SBATCH --open-mode=append
#SBATCH --requeue
{resources}

case "$SLURM_ARRAY_TASK_ID" in
{cases}
esac

cd {cwd} || exit 1
mkdir -p "$workdir"
rm -f "$workdir/{exit_code_file}"
{setup}
srun "${{command[@]}}" >> "$workdir/{log}" 2>&1
code=$?
echo "$code" > "$workdir/{exit_code_file}"
# Array and index: the bare job id of an array's last task would put back the whole array.
if [ "$code" -eq {requeue} ]; then
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
fi
exit "$code"
"""


def array_script(directory: SweepDirectory, records: Sequence[RunRecord], resources: SlurmResources) -> str:
    """The batch script of an array with one task for each record."""
    cases = []
    for index, record in enumerate(records):
        workdir = shlex.quote(str(directory.workdir(record.name).absolute()))
        command = shlex.join([sys.executable, *shlex.split(record.command)[1:]])
        cases.append(f"  {index}) workdir={workdir}\n     command=({command}) ;;")
    limit = f"%{resources.at_a_time}" if resources.at_a_time else ""
    return _SCRIPT.format(
        count=len(records),
        name=directory.path.name,
        array=f"0-{len(records) - 1}{limit}",
        output=str(directory.path.absolute()).replace("%", "%%"),
        resources="\n".join(resources.sbatch_lines()),
        cases="\n".join(cases),
        cwd=shlex.quote(os.getcwd()),
        setup=resources.setup,
        log=directory.log("any").name,
        exit_code_file=_EXIT_CODE_FILE,
        requeue=REQUEUE_EXIT_CODE,
    )


def submit(directory: SweepDirectory, records: Sequence[RunRecord], resources: SlurmResources) -> list[RunRecord]:
    """Submits one array of all the records and returns them queued, each with its task's id.

    Raises:
      ValueError: if there is no Slurm, or it refuses; nothing is queued then.
    """
    _require("sbatch")
    folder = directory.path / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        (directory.workdir(record.name) / _EXIT_CODE_FILE).unlink(missing_ok=True)
    script = folder / f"array{len(list(folder.glob('array*.sh'))) + 1}.sh"
    script.write_text(array_script(directory, records, resources))
    done = subprocess.run(["sbatch", "--parsable", str(script)], check=False, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(
            f"Slurm refused the sweep: {done.stderr.strip()}; change the --slurm_ flags and run the same command again "
            f"(what was submitted: {script})"
        )
    job = done.stdout.strip().partition(";")[0]
    return [record.moved("queued", job=f"{job}_{index}") for index, record in enumerate(records)]


def after_slurm(directory: SweepDirectory, record: RunRecord, state: str | None) -> RunRecord:
    """A record that was with Slurm, by its state in the queue, or by its exit code once it has left."""
    if state is not None and state not in _GONE:
        return record.moved("queued" if state in _WAITING else "running")
    file = directory.workdir(record.name) / _EXIT_CODE_FILE
    code = file.read_text().strip() if file.exists() else ""
    if code == "0":
        return record.moved("done")
    if code == str(REQUEUE_EXIT_CODE):
        return record.moved("stopped", "told to end, and Slurm would not requeue it")
    log = directory.path / "slurm" / f"{record.job}.log"
    return record.moved("failed", f"exit code {code}" if code else f"left the queue without an exit code: {log}")


def queue() -> dict[str, str]:
    """State in capitals by `ARRAY_INDEX` of every task of ours in the queue."""
    _require("squeue")
    options = ["--me", "--array", "--noheader", "--states=all", "--format=%F_%K %T"]
    done = subprocess.run(["squeue", *options], check=False, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"Slurm cannot be asked for the state of the runs: {done.stderr.strip()}; try again later")
    return dict(line.split() for line in done.stdout.splitlines() if line.strip())


def _require(program: str) -> None:
    if shutil.which(program) is None:
        raise ValueError(
            f"{program} is not on the PATH, so no Slurm can be reached from here; "
            "go to a login node of the cluster, or use --executor=local"
        )
