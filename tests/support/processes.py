"""Finds the processes of a run that a test has started."""

from __future__ import annotations

import time
from pathlib import Path


def rank_below(ancestor: int, rank: str, output: Path) -> int:
    """Process id of a rank below ``ancestor``, once the run has saved something."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if list(output.glob("checkpoint-*")):
            for pid in descendants(ancestor):
                try:
                    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                if f"RANK={rank}".encode() in environment:
                    return pid
        time.sleep(0.02)
    raise AssertionError(f"rank {rank} never saved a checkpoint")


def descendants(pid: int) -> list[int]:
    """Processes below ``pid``."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    below = [int(child) for child in children]
    return below + [found for child in below for found in descendants(child)]
