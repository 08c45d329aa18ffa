#!/usr/bin/env bash
# Train on this machine's CPU, with one thread per core.
# Usage: launchers/cpu.sh SETTINGS.yaml [--flag value ...]
#        THREADS=4 launchers/cpu.sh --model models/new --data_dir data --output_dir runs/first
set -euo pipefail

if [[ $# -eq 0 ]]; then
    echo "usage: $0 SETTINGS.yaml [--flag value ...]   ('s2s-scale train --help' lists the flags)" >&2
    exit 2
fi
if ! command -v s2s-scale >/dev/null; then
    echo "error: no 's2s-scale' on PATH; activate its environment: source .venv/bin/activate" >&2
    exit 2
fi
export OMP_NUM_THREADS="${THREADS:-${OMP_NUM_THREADS:-$(nproc)}}"
exec s2s-scale train --profile cpu "$@"
