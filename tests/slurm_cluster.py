"""A Slurm cluster of one node on this machine: munged, slurmctld and slurmd as processes of the test.

Needs root and Debian's slurm-wlm and munge. Nothing of it outlives the test, and a Slurm that the machine already runs
is left alone: ports, key, sockets and state are its own.
"""

import contextlib
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAMS = "munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol"

# A requeued job waits until its old credential has expired; 5 seconds are the least that Slurm allows. jax derives the
# port at which processes meet from the job id, so two clusters on one machine must count from different ones.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
FirstJobId={first_job}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={socket},cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


def why_not():
    """Why no cluster can be started here; None if one can."""
    search = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [program for program in PROGRAMS if shutil.which(program, path=search) is None]
    if absent:
        return f"Slurm is not installed ({', '.join(absent)} missing); `make test-slurm` installs and tests it"
    if os.geteuid() != 0:
        return "only root can start slurmd and munged; run `make test-slurm` as root"
    return None


@contextlib.contextmanager
def running_cluster(folder: Path):
    """Starts a cluster and yields the environment in which Slurm's commands reach it."""
    ports = []
    with contextlib.ExitStack() as held:
        for _ in range(2):
            listener = held.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            ports.append(listener.getsockname()[1])
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(os.urandom(1024))
    with contextlib.ExitStack() as stack:
        sockets = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="munge"))
        )  # a socket's path must be short
        sockets.chmod(0o755)
        config = folder / "slurm.conf"
        config.write_text(
            CONFIG.format(
                host=socket.gethostname().partition(".")[0],
                controller_port=ports[0],
                node_port=ports[1],
                socket=sockets / "socket",
                first_job=random.randrange(1, 50_000),
                folder=folder,
            )
        )
        environment = os.environ | {"SLURM_CONF": str(config), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}

        def daemon(*command):
            with (folder / f"{command[0]}.log").open("w") as log:
                process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

            def end():
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

            stack.callback(end)

        files = {name: folder / f"munged.{name}" for name in ("pid-file", "log-file", "seed-file")}
        options = [
            f"--{name}={path}" for name, path in {**files, "key-file": key, "socket": sockets / "socket"}.items()
        ]
        daemon("munged", "--foreground", *options)
        wait_until((sockets / "socket").exists, 20, "munged does not start", folder)
        daemon("slurmctld", "-D")
        daemon("slurmd", "-D", "-N", "localhost")

        def slurm(*command):
            return subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=60, check=False
            ).stdout

        wait_until(lambda: "idle" in slurm("sinfo", "--noheader", "--format=%t"), 60, "no idle node", folder)

        def cancel_all():
            slurm("scancel", "--me", "--full", "--signal=KILL")
            slurm("scancel", "--me")
            wait_until(lambda: not slurm("squeue", "--noheader"), 60, "jobs do not end", folder)

        stack.callback(cancel_all)
        yield environment


def wait_until(condition, seconds, message, folder):
    """Fails with the message and the logs in the folder if the condition does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            logs = "\n".join(f"--- {path}\n{path.read_text()[-3000:]}" for path in folder.rglob("*.log"))
            raise AssertionError(f"{message} after {seconds} s\n{logs}")
        time.sleep(0.05)
