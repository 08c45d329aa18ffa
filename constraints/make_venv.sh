#!/usr/bin/env bash
# Make a virtual environment, or say in one line why that cannot be done.
# Usage: make_venv.sh PYTHON FOLDER
set -euo pipefail

python=$1
folder=$2

if ! command -v "$python" >/dev/null; then
    echo "error: no '$python' on PATH; expected Python 3.10 to 3.13; name one: make PYTHON=/path/to/python3" >&2
    exit 2
fi
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
case $version in
    3.11) ;;
    3.10 | 3.12 | 3.13)
        echo "note: the pins were made for Python 3.11; if pip misses a version: make install CONSTRAINTS=" >&2
        ;;
    *)
        echo "error: '$python' is Python $version; expected 3.10 to 3.13; name another: make PYTHON=/path/to/python3" >&2
        exit 2
        ;;
esac
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    echo "error: '$python' has no venv module; on Debian and Ubuntu: apt-get install python$version-venv" >&2
    exit 2
fi
"$python" -m venv "$folder"
