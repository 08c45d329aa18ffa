"""Decides from what the ranks say whether one is lost, or all of them hang."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from s2s_scale.resilience.messages import Message
from s2s_scale.resilience.reports import EXIT_FAULT

BEAT_SECONDS = 2.0
"""How often a rank gives a sign of life."""
PAUSE_SECONDS = 3600.0
"""How long work without marks may take: loading, tokenising, compiling the first step, a save."""
PLACES_SHOWN = 16


@dataclass(frozen=True)
class Fault:
    """What ends the run: ``rank`` is at fault. ``orderly``: it ended itself, with an error.

    ``code``: what the other ranks exit with.
    """

    rank: int
    host: str
    cause: str
    orderly: bool = False
    places: tuple[str, ...] = ()
    code: int = EXIT_FAULT

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}: {self.cause}"


@dataclass
class RankStatus:
    """What rank 0 knows of a rank. ``progress`` counts the marks that it has passed."""

    host: str
    heard_at: float
    moved_at: float
    progress: int = -1
    where: str = "not heard of yet"
    paused: bool = True
    waits: bool = False
    done: bool = False


class HealthMonitor:
    """Decides from what the ranks say whether one is lost, or all of them hang. Holds no clock."""

    def __init__(
        self, hosts: Sequence[str], *, hang_seconds: float, silence_seconds: float, now: float
    ) -> None:
        self.hang_seconds = hang_seconds
        self.silence_seconds = silence_seconds
        self.ranks = [RankStatus(host=host, heard_at=now, moved_at=now) for host in hosts]
        self._fault: Fault | None = None
        self._last_look = now

    def heard(self, rank: int, message: Message, now: float) -> None:
        """A sign of life: where the rank stands and how many marks it has passed."""
        standing = self.ranks[rank]
        standing.heard_at = now
        if message["progress"] != standing.progress:
            standing.moved_at = now
        standing.progress, standing.where = int(message["progress"]), str(message["where"])
        standing.paused, standing.waits = bool(message["paused"]), bool(message["waits"])

    def done(self, rank: int) -> None:
        self.ranks[rank].done = True

    def failed(self, rank: int, cause: str, code: int = EXIT_FAULT) -> None:
        """The rank ends with an error of its own, or was asked to."""
        self._found(rank, cause, orderly=True, code=code)
        self.done(rank)

    def closed(self, rank: int) -> None:
        """The rank's connection is closed: no process is left unless it was done."""
        if not self.ranks[rank].done:
            self._found(rank, "ended without a word (killed, or crashed)")

    def verdict(self, now: float) -> Fault | None:
        """The first fault there was, or None; to be asked about four times a second."""
        away, self._last_look = now - self._last_look, now
        if away > BEAT_SECONDS:
            # This process stood still itself: that is no fault of the others.
            for standing in self.ranks:
                standing.heard_at += away
                standing.moved_at += away
        if self._fault is None:
            self._look_for_silence(now)
        if self._fault is None and self.hang_seconds:
            self._look_for_hang(now)
        return self._fault

    def _look_for_silence(self, now: float) -> None:
        for rank, standing in enumerate(self.ranks):
            if not standing.done and now - standing.heard_at >= self.silence_seconds:
                self._found(rank, f"no sign of life for {self.silence_seconds:g} s")

    def _look_for_hang(self, now: float) -> None:
        running = [rank for rank, standing in enumerate(self.ranks) if not standing.done]
        if not running:
            return
        paused = any(self.ranks[rank].paused for rank in running)
        limit = max(PAUSE_SECONDS, self.hang_seconds) if paused else self.hang_seconds
        if now - max(self.ranks[rank].moved_at for rank in running) < limit:
            return
        behind = self._behind(running)
        also = ", ".join(f"rank {rank} on {self.ranks[rank].host}" for rank in behind[1:])
        cause = f"no progress for {limit:g} s (--fault_timeout_seconds); "
        cause += f"it stands {self.ranks[behind[0]].where}"
        self._found(behind[0], cause + (f"; likewise {also}" if also else ""))

    def _behind(self, running: Sequence[int]) -> list[int]:
        """Those with the fewest marks; among equals, those that do not wait for other ranks."""
        fewest = min(self.ranks[rank].progress for rank in running)
        behind = [rank for rank in running if self.ranks[rank].progress == fewest]
        return [rank for rank in behind if not self.ranks[rank].waits] or behind

    def _found(
        self, rank: int, cause: str, *, orderly: bool = False, code: int = EXIT_FAULT
    ) -> None:
        if self._fault is None:
            places = [
                f"rank {number} on {standing.host}: {'done' if standing.done else standing.where}"
                for number, standing in enumerate(self.ranks[:PLACES_SHOWN])
            ]
            self._fault = Fault(rank, self.ranks[rank].host, cause, orderly, tuple(places), code)
