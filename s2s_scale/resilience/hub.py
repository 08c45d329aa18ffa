"""The one server of a run: receives the ranks' reports and heartbeats, and announces faults.

It runs in the process that started the run. Where there is none, or one per host, rank 0 opens a
hub for the heartbeats.

What it receives, by ``kind``: ``failure`` and ``done`` (see ``reports``, answered each), ``listen``
(a rank that waits for requests to stop), ``join``, ``heartbeat``, ``failed`` and ``leave`` (see
``watchdog``). What it sends: ``received``, ``stop``, ``alive``, ``fault`` and ``over``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from types import TracebackType

from s2s_scale.errors import EXIT_FAULT
from s2s_scale.resilience.health import HEARTBEAT_SECONDS, Fault, HealthMonitor
from s2s_scale.resilience.messages import Message, MessageServer
from s2s_scale.resilience.reports import HUB_ADDRESS, HUB_KEY, Failure, FailureSource


class Hub:
    """The server, as a context that ends with the run.

    ``address``: the name under which the ranks reach this host. With ``127.0.0.1``, where all of
    them are on it, nobody else can connect. ``ranks``: about how many there are.
    """

    def __init__(
        self,
        address: str = "127.0.0.1",
        *,
        ranks: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._address = address
        self._clock = clock
        self._server = MessageServer(
            host=address,
            on_message=self._receive,
            on_close=self._disconnected,
            on_idle=self._tell,
            ranks=ranks,
        )
        self._failures: list[Failure] = []
        self._done: dict[int, int] = {}
        self.failed_at: float | None = None
        """When the first failure was reported, by ``time.monotonic``."""
        self._stop: str | None = None
        self._listening: set[int] = set()
        self._told_to_stop: set[int] = set()
        self._monitor: HealthMonitor | None = None
        self._rank_of: dict[int, int] = {}
        self._fault: Fault | None = None
        self._next_heartbeat = 0.0

    def start(self) -> None:
        self._server.start()

    def close(self) -> None:
        """Handle what has already arrived, then disconnect all ranks."""
        self._server.close()

    def __enter__(self) -> Hub:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def location(self) -> tuple[str, int, str]:
        """Host, port and key, as ``MessageClient`` takes them."""
        return self._address, self._server.port, self._server.key

    @property
    def environment(self) -> dict[str, str]:
        """What every rank, on every host, must find in its environment."""
        host, port, key = self.location
        return {HUB_ADDRESS: f"{host}:{port}", HUB_KEY: key}

    @property
    def connected(self) -> int:
        """Number of ranks whose watchdogs are connected."""
        return len(self._rank_of)

    @property
    def done_ranks(self) -> dict[int, int]:
        """Rank -> exit code, of those that ended in an orderly way."""
        return dict(self._done)

    def first_failure(self) -> Failure | None:
        """The failure nearest to the cause, or None if nothing has failed."""
        return min(self._failures, key=lambda failure: failure.source, default=None)

    def ask_to_stop(self, reason: str) -> None:
        """Tell every rank that listens, now or later; ``reason`` is such as 'SIGTERM'.

        May be called again with another reason: the ranks then end at once.
        """
        self._stop = reason
        self._told_to_stop = set()

    # Everything below runs in the server's thread.

    def _receive(self, peer: int, message: Message) -> None:
        kind = message["kind"]
        if kind == "listen":
            self._listening.add(peer)
            self._tell()
        elif kind == "done":
            self._done[int(message["rank"])] = int(message["code"])
            self._server.send(peer, {"kind": "received"})
        elif kind == "failure":
            self._add(
                Failure(
                    rank=int(message["rank"]),
                    host=str(message["host"]),
                    problems=tuple(map(str, message["problems"])),
                    code=int(message["code"]),
                    source=FailureSource(message["source"]),
                )
            )
            self._server.send(peer, {"kind": "received"})
        elif kind == "join":
            if self._monitor is None:
                self._monitor = HealthMonitor(
                    [str(host) for host in message["hosts"]],
                    hang_seconds=float(message["hang_seconds"]),
                    silence_seconds=float(message["silence_seconds"]),
                    now=self._clock(),
                )
            rank = int(message["rank"])
            if not 0 <= rank < len(self._monitor.ranks):
                raise ValueError(f"rank {rank} of {len(self._monitor.ranks)}")
            self._rank_of[peer] = rank
        elif self._monitor is not None:
            self._watch(self._monitor, self._rank_of[peer], message)

    def _watch(self, monitor: HealthMonitor, rank: int, message: Message) -> None:
        """What a rank's watchdog says."""
        if message["kind"] == "heartbeat":
            monitor.heartbeat(rank, message, self._clock())
        elif message["kind"] == "failed":
            monitor.failed(rank, str(message["cause"]), int(message["code"]))
        elif message["kind"] == "leave":
            monitor.done(rank)
            if message["closes_hub"]:  # it is rank 0's own: the others end without being watched
                for peer in self._rank_of:
                    self._server.send(peer, {"kind": "over"})
        self._tell()

    def _disconnected(self, peer: int) -> None:
        self._listening.discard(peer)
        self._told_to_stop.discard(peer)
        rank = self._rank_of.pop(peer, None)
        if rank is not None and self._monitor is not None:
            self._monitor.disconnected(rank)
            self._tell()

    def _tell(self) -> None:
        """Pass on a request to stop, and a heartbeat or the fault that was found."""
        if self._stop is not None:
            for peer in self._listening - self._told_to_stop:
                self._told_to_stop.add(peer)
                self._server.send(peer, {"kind": "stop", "reason": self._stop})
        if self._monitor is None:
            return
        now = self._clock()
        fault = self._monitor.check(now)
        if now < self._next_heartbeat and (fault is None or self._fault is not None):
            return
        if fault is not None and self._fault is None:
            self._fault = fault
            if fault.code == EXIT_FAULT and not fault.orderly:  # otherwise the rank reports itself
                source = FailureSource.WATCHDOG
                self._add(Failure(fault.rank, fault.host, (fault.cause,), fault.code, source))
        self._next_heartbeat = now + HEARTBEAT_SECONDS
        # Again with each heartbeat: a rank may not have joined yet when the fault was found.
        message = {"kind": "alive"} if fault is None else {"kind": "fault", **asdict(fault)}
        for peer in self._rank_of:
            self._server.send(peer, message)

    def _add(self, failure: Failure) -> None:
        self._failures.append(failure)
        self.failed_at = self.failed_at or time.monotonic()
