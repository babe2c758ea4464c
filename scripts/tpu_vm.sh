#!/usr/bin/env bash
# Trains on all workers of a Cloud TPU slice, and starts again for as long as a run is preempted.
# The flags are those of jaxaccum.train; the workdir must be a folder that all workers share.
#
#   scripts/tpu_vm.sh TPU ZONE --config=configs/yolo_s.py --workdir=/mnt/runs/mine
#
# Needs gcloud on this machine, and on every worker the repository in ~/jaxaccum with a .venv that
# has jax[tpu] and requirements-cpu.txt installed.
set -uo pipefail

if (($# < 3)); then
  echo "usage: scripts/tpu_vm.sh TPU ZONE --config=FILE --workdir=DIR [flags of jaxaccum.train]" >&2
  exit 2
fi
tpu=$1 zone=$2
shift 2
command="cd jaxaccum && exec .venv/bin/python -m jaxaccum.train --distributed=auto$(printf ' %q' "$@")"

while true; do
  status=0
  gcloud compute tpus tpu-vm ssh "$tpu" --zone="$zone" --worker=all --command="$command" ||
    status=$?
  ((status == 75)) || exit "$status" # 75: saved, to be continued by the same command
  echo "preempted: starting again in 30 s"
  sleep 30
done
