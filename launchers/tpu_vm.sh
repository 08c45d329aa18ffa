#!/usr/bin/env bash
# Train on a TPU VM or a pod slice, from a machine that has gcloud.
# Usage: TPU=my-tpu ZONE=us-central2-b launchers/tpu_vm.sh SETTINGS.yaml [--flag value ...]
#        PROFILE=tpu-pod TPU=my-pod ZONE=… launchers/tpu_vm.sh conf.yaml      # every host of a pod
# Paths are those of the TPU VM; FOLDER is the checkout there that has the environment .venv-xla.
set -euo pipefail

if [[ $# -eq 0 || -z "${TPU:-}" || -z "${ZONE:-}" ]]; then
    echo "usage: TPU=name ZONE=zone $0 SETTINGS.yaml [--flag value ...]" >&2
    exit 2
fi
if ! command -v gcloud >/dev/null; then
    echo "error: no 'gcloud' on PATH; install the Google Cloud CLI, or run this on the TPU VM itself:" \
        "s2s-scale train --profile ${PROFILE:-tpu-vm} $*" >&2
    exit 2
fi
# A shell on the other side reads the arguments: they must reach the command unchanged.
arguments=$(printf ' %q' "$@")
folder=$(printf '%q' "${FOLDER:-s2s-scale}")
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
    --command="cd $folder && . .venv-xla/bin/activate && exec s2s-scale train$arguments --profile ${PROFILE:-tpu-vm}"
