#!/usr/bin/env bash
# Train on the hosts of a host file, with DeepSpeed's launcher.
# Usage: launchers/deepspeed.sh HOSTFILE SETTINGS.yaml [--flag value ...]
#        PROFILE=gpu-zero3 launchers/deepspeed.sh hosts --model models/new --data_dir data --output_dir runs/first
set -euo pipefail

if [[ $# -lt 2 ]]; then
    echo "usage: $0 HOSTFILE SETTINGS.yaml [--flag value ...]   (a host file has lines such as 'worker-1 slots=8')" >&2
    exit 2
fi
if ! command -v s2s-scale >/dev/null; then
    echo "error: no 's2s-scale' on PATH; activate its environment: source .venv/bin/activate" >&2
    exit 2
fi
hostfile=$1
shift
exec s2s-scale train "$@" --profile "${PROFILE:-gpu-zero2}" --hostfile "$hostfile"
