#!/bin/bash
# One run on one machine with 8 GPUs, or however many there are, in one process that drives them all:
#
#   scripts/train_8gpus.sh configs/tiny.py runs/big [flags of launch.train]
#
# Parameters and optimizer are sharded over all GPUs (fsdp); flags of your own come last and win, such as
# --config.mesh.fsdp=4 --config.mesh.tensor=2. The same command again goes on from the latest checkpoint.
# For many small runs, one GPU each, use launch.sweep instead.
if [ $# -lt 2 ]; then
  echo "usage: $0 CONFIG WORKDIR [flags of launch.train]" >&2
  exit 2
fi
config=$1 workdir=$2
shift 2

if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi

exec python -m launch.train --config="$config" --workdir="$workdir" --platform=gpu \
  --config.mesh.data=1 --config.mesh.fsdp=-1 "$@"
