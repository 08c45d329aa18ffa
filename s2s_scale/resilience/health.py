"""Decides from the ranks' heartbeats whether a rank is lost or the whole run hangs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from s2s_scale.errors import EXIT_FAULT
from s2s_scale.resilience.messages import Message

HEARTBEAT_SECONDS = 2.0
"""How often each rank sends a heartbeat."""
PAUSE_SECONDS = 3600.0
"""How long work without progress marks may take: loading, tokenizing, compiling, saving."""
POSITIONS_SHOWN = 16


@dataclass(frozen=True)
class Fault:
    """What ends the run: ``rank`` is at fault.

    ``orderly``: the rank ended by itself, with an error. ``positions``: where each rank was, one
    line per rank. ``code``: the exit code of the other ranks.
    """

    rank: int
    host: str
    cause: str
    orderly: bool = False
    positions: tuple[str, ...] = ()
    code: int = EXIT_FAULT

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}: {self.cause}"


@dataclass
class RankStatus:
    """What is known of a rank. ``progress`` counts the marks that it has passed.

    ``paused``: it does work without marks. ``waiting``: it is inside a collective.
    """

    host: str
    heard_at: float
    moved_at: float
    progress: int = -1
    position: str = "no heartbeat yet"
    paused: bool = True
    waiting: bool = False
    done: bool = False


class HealthMonitor:
    """Detects lost and hung ranks of one run. It reads no clock: times are passed in, in seconds.

    A rank is lost if its connection closes before it is done, or if it sends no heartbeat for
    ``silence_seconds``. The run hangs if no rank makes progress for ``hang_seconds`` (0: never).
    The first fault is kept.
    """

    def __init__(
        self, hosts: Sequence[str], *, hang_seconds: float, silence_seconds: float, now: float
    ) -> None:
        self.hang_seconds = hang_seconds
        self.silence_seconds = silence_seconds
        self.ranks = [RankStatus(host=host, heard_at=now, moved_at=now) for host in hosts]
        self._fault: Fault | None = None
        self._last_check = now

    def heartbeat(self, rank: int, message: Message, now: float) -> None:
        """Take in a heartbeat: the rank's position and how many marks it has passed."""
        status = self.ranks[rank]
        progress = int(message["progress"])
        if progress != status.progress:
            status.moved_at = now
        status.heard_at, status.progress = now, progress
        status.position = str(message["position"])
        status.paused, status.waiting = bool(message["paused"]), bool(message["waiting"])

    def done(self, rank: int) -> None:
        """The rank has finished its work: from now on its silence is no fault."""
        self.ranks[rank].done = True

    def failed(self, rank: int, cause: str, code: int = EXIT_FAULT) -> None:
        """The rank ends with an error of its own, or because it was asked to stop."""
        self._set_fault(rank, cause, orderly=True, code=code)
        self.done(rank)

    def disconnected(self, rank: int) -> None:
        """The rank's connection is closed: its process is gone."""
        if not self.ranks[rank].done:
            self._set_fault(rank, "ended without reporting an error (killed, or crashed)")

    def check(self, now: float) -> Fault | None:
        """The first fault, or None. To be called about four times a second."""
        away, self._last_check = now - self._last_check, now
        if away > HEARTBEAT_SECONDS:
            # This process was stopped itself, which is no fault of the ranks.
            for status in self.ranks:
                status.heard_at += away
                status.moved_at += away
        for rank, status in enumerate(self.ranks):
            if not status.done and now - status.heard_at >= self.silence_seconds:
                self._set_fault(rank, f"no heartbeat for {self.silence_seconds:g} s")
        if self._fault is None and self.hang_seconds:
            self._check_for_hang(now)
        return self._fault

    def _check_for_hang(self, now: float) -> None:
        running = {rank: status for rank, status in enumerate(self.ranks) if not status.done}
        if not running:
            return
        paused = any(status.paused for status in running.values())
        limit = max(PAUSE_SECONDS, self.hang_seconds) if paused else self.hang_seconds
        if now - max(status.moved_at for status in running.values()) < limit:
            return
        # To blame are the ranks with the least progress; among them, those that do not wait.
        least = min(status.progress for status in running.values())
        behind = [rank for rank, status in running.items() if status.progress == least]
        behind = [rank for rank in behind if not running[rank].waiting] or behind
        cause = f"no progress for {limit:g} s (--fault_timeout_seconds); "
        cause += f"it is {running[behind[0]].position}"
        also = ", ".join(f"rank {rank} on {running[rank].host}" for rank in behind[1:])
        self._set_fault(behind[0], cause + (f"; likewise {also}" if also else ""))

    def _set_fault(
        self, rank: int, cause: str, *, orderly: bool = False, code: int = EXIT_FAULT
    ) -> None:
        if self._fault is None:
            positions = tuple(
                f"rank {number} on {status.host}: {'done' if status.done else status.position}"
                for number, status in enumerate(self.ranks[:POSITIONS_SHOWN])
            )
            self._fault = Fault(rank, self.ranks[rank].host, cause, orderly, positions, code)
