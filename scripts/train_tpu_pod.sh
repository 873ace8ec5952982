#!/bin/bash
# One run on a TPU pod slice, one process a host, from a workstation with gcloud:
#
#   TPU=my-slice ZONE=us-east5-b scripts/train_tpu_pod.sh configs/tiny.py /mnt/shared/run --config.mesh.fsdp=16
#
# The slice exists already, made for instance by
#   gcloud compute tpus tpu-vm create my-slice --zone=us-east5-b --accelerator-type=v6e-16 --version=v2-alpha-tpuv6e
#
# WORKDIR must be one directory for all hosts (Filestore, or a bucket mounted with gcsfuse). The committed state of this
# checkout is copied to every host. After a preemption of a spot slice, make it again and run the same command again.
set -euo pipefail

if [ $# -lt 2 ] || [ -z "${TPU:-}" ] || [ -z "${ZONE:-}" ]; then
  echo "usage: TPU=NAME ZONE=ZONE $0 CONFIG WORKDIR [flags of launch.train]" >&2
  exit 2
fi
config=$1 workdir=$2
shift 2

archive=$(mktemp -d)/unigist.tar.gz
trap 'rm -r "$(dirname "$archive")"' EXIT
git archive --format=tar.gz --output="$archive" HEAD

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

gcloud compute tpus tpu-vm scp "$archive" "$TPU:unigist.tar.gz" --zone="$ZONE" --worker=all
on_all_hosts 'mkdir -p unigist && tar -xzf unigist.tar.gz -C unigist && cd unigist &&
  { [ -d .venv ] || python3 -m venv .venv; } && .venv/bin/pip install --quiet -r requirements-tpu.txt'
printf -v command '%q ' .venv/bin/python -m launch.train --distributed --platform=tpu --noprogress \
  --config="$config" --workdir="$workdir" "$@"
on_all_hosts "cd unigist && $command"
