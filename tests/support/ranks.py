"""Runs a command on several ranks of this machine, with a hard limit on the time."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tests.support.forkserver import Rank, shared
from tests.support.variables import free_port, rank_variables

LIMIT_SECONDS = 180
Process = Rank | subprocess.Popen[bytes]


@dataclass(frozen=True)
class RankResult:
    """Exit code and output of one rank."""

    code: int
    output: str


def run_ranks(
    arguments: list[str],
    *,
    ranks: int,
    folder: Path,
    limit: float = LIMIT_SECONDS,
    environment: dict[str, str] | None = None,
    python: str | None = None,
) -> list[RankResult]:
    """``python -m ARGUMENTS`` once per rank, with the variables that a launcher sets, and more.

    ``arguments``: a module and its arguments. ``python``: an interpreter that is started anew for
    each rank; unless one is given, ranks are forks of one process, which start sooner.

    Raises:
        AssertionError: a rank was still running after ``limit`` seconds; all are ended, and the
            message holds what each had printed, and where the hung ones stood.
    """
    port = free_port()
    logs = [folder / f"rank-{rank}.log" for rank in range(ranks)]
    processes: list[Process] = []
    for rank, log in enumerate(logs):
        variables = {
            **os.environ,
            **(environment or {}),
            **rank_variables(rank, ranks, port),
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",  # so that a rank that hangs says where
        }
        if python is None:
            module, *words = arguments
            processes.append(shared().fork(module, words, log=log, environment=variables))
        else:
            processes.append(_started([python, "-m", *arguments], log, variables))
    _wait(processes, limit)
    texts = [log.read_text(encoding="utf-8", errors="replace") for log in logs]
    codes = [process.poll() for process in processes]
    hung = [rank for rank, code in enumerate(codes) if code is None or code in _ENDED]
    assert not hung, f"ranks {hung} were still running after {limit:.0f} s:\n" + "\n".join(texts)
    return [RankResult(code or 0, text) for code, text in zip(codes, texts, strict=True)]


def _started(words: list[str], log: Path, variables: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        return subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, env=variables)


_ENDED = (-signal.SIGABRT, -signal.SIGKILL)


def _wait(processes: list[Process], limit: float) -> None:
    """Wait for all; a rank that fails gives the others ten seconds, as a launcher would."""
    deadline = time.monotonic() + limit
    while None in (codes := [process.poll() for process in processes]):
        if any(codes):
            deadline = min(deadline, time.monotonic() + 10)
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    for number in (signal.SIGABRT, signal.SIGKILL):
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)
        deadline = time.monotonic() + 10
        while None in [process.poll() for process in processes] and time.monotonic() < deadline:
            time.sleep(0.05)
