"""``s2s-scale`` in a process of its own, with its time and peak memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from tests.support.command import COMMAND, LIMIT_S

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Finished(NamedTuple):
    """A command that ended with exit code 0."""

    output: str
    """Standard output and standard error."""
    seconds: float
    peak_bytes: int
    """The process's largest resident set."""


def s2s_scale(*words: object, log: Path, limit_s: float = LIMIT_S, **environment: str) -> Finished:
    """Run the command with its output in the file ``log``; fails with the command's own words.

    It is ended, and the test fails, after ``limit_s`` seconds.
    """
    started = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*COMMAND, *map(str, words)],
            env={**os.environ, **ONE_THREAD, **environment},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        timer = threading.Timer(limit_s, process.kill)
        timer.start()
        # wait4 gives this one process's usage; getrusage would give the largest of all children.
        _, status, usage = os.wait4(process.pid, 0)
        timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
    output = log.read_text(encoding="utf-8", errors="replace")
    assert process.returncode == 0, f"{words}: exit code {process.returncode}\n{output}"
    unit = 1 if sys.platform == "darwin" else 1024
    return Finished(output, time.monotonic() - started, usage.ru_maxrss * unit)
