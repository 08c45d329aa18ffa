"""``s2s-scale`` as a user starts it: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Finished(NamedTuple):
    """A command that ended with exit code 0."""

    output: str
    """Standard output and standard error."""
    seconds: float
    peak_bytes: int
    """The process's largest resident set."""


def s2s_scale(*words: object, log: Path, **environment: str) -> Finished:
    """Run the command with its output in the file ``log``; fails with the command's own words."""
    started = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "s2s_scale", *map(str, words)],
            env={**os.environ, **ONE_THREAD, **environment},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        # wait4 gives this one process's usage; getrusage would give the largest of all children.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    output = log.read_text(encoding="utf-8", errors="replace")
    assert process.returncode == 0, f"{words}: exit code {process.returncode}\n{output}"
    unit = 1 if sys.platform == "darwin" else 1024
    return Finished(output, time.monotonic() - started, usage.ru_maxrss * unit)
