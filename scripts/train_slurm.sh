#!/bin/bash
# One run on several GPU nodes under Slurm, one process a GPU:
#
#   sbatch scripts/train_slurm.sh configs/tiny.py runs/big --config.mesh.fsdp=8
#   sbatch --nodes=4 --partition=gpu --time=24:00:00 scripts/train_slurm.sh CONFIG WORKDIR [flags of launch.train]
#
# WORKDIR lies on a file system that all nodes share. srun tells each process who it is, so launch.train needs no flags
# for that. Each process must see all GPUs of its node, of which jax gives it the one of its rank: do not bind GPUs to
# tasks (no --gpus-per-task, no --gpu-bind).
#
# 120 seconds before its time limit, and when Slurm preempts it, the run gets SIGTERM, saves a checkpoint and ends with
# exit code 75; the job goes back into the queue and on from there.
#SBATCH --job-name=unigist
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

if [ $# -lt 2 ]; then
  echo "usage: sbatch $0 CONFIG WORKDIR [flags of launch.train]" >&2
  exit 2
fi
config=$1 workdir=$2
shift 2

if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi

srun python -m launch.train --config="$config" --workdir="$workdir" --noprogress "$@"
code=$?
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
