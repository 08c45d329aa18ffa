"""Runs a command on several ranks of this machine, with a hard limit on the time."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

LIMIT_SECONDS = 180


@dataclass(frozen=True)
class RankResult:
    """Exit code and output of one rank."""

    code: int
    output: str


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What a launcher sets for a rank on this machine; ``port`` is rank 0's."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def run_ranks(
    arguments: list[str],
    *,
    ranks: int,
    folder: Path,
    limit: float = LIMIT_SECONDS,
    environment: dict[str, str] | None = None,
    python: str = sys.executable,
) -> list[RankResult]:
    """``python ARGUMENTS`` once per rank, with the variables that a launcher sets, and more.

    Raises:
        AssertionError: a rank was still running after ``limit`` seconds; all are ended, and the
            message holds what each had printed, and where the hung ones stood.
    """
    port = free_port()
    logs = [folder / f"rank-{rank}.log" for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(logs):
        variables = {
            **os.environ,
            **(environment or {}),
            **rank_variables(rank, ranks, port),
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",  # so that a rank that hangs says where
        }
        with log.open("wb") as out:
            processes.append(
                subprocess.Popen(
                    [python, *arguments],
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=variables,
                )
            )
    _wait(processes, limit)
    texts = [log.read_text(encoding="utf-8", errors="replace") for log in logs]
    hung = [rank for rank, process in enumerate(processes) if process.returncode in _ENDED]
    assert not hung, f"ranks {hung} were still running after {limit:.0f} s:\n" + "\n".join(texts)
    return [
        RankResult(process.returncode, text) for process, text in zip(processes, texts, strict=True)
    ]


_ENDED = (-signal.SIGABRT, -signal.SIGKILL)


def _wait(processes: list[subprocess.Popen[bytes]], limit: float) -> None:
    """Wait for all; a rank that fails gives the others ten seconds, as a launcher would."""
    deadline = time.monotonic() + limit
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if any(process.poll() not in (None, 0) for process in processes):
            deadline = min(deadline, time.monotonic() + 10)
        time.sleep(0.1)
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGABRT)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
