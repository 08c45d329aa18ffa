"""Turns a hang into an error: a thread per rank that says where the rank stands, and who is lost.

Every rank sends a sign of life each two seconds to rank 0 over a TCP connection of its own; no
collective is used, so that a rank stuck in one still speaks. Rank 0 judges:

- a connection that closes before the rank said that it was done: the rank was killed;
- no sign of life for ``silence_seconds``: the rank, or its host, is cut off;
- no rank has passed a mark for ``hang_seconds``: the run hangs, and who is behind is named.

Its verdict goes to all ranks. Each says where it stands, reports the fault and ends with exit code
75. A rank that loses contact with rank 0 for ``silence_seconds`` ends by itself.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from s2s_scale.resilience.health import BEAT_SECONDS, Fault, HealthMonitor
from s2s_scale.resilience.messages import LineClient, Message, MessageServer
from s2s_scale.resilience.preemption import EXIT_RESUME, Stopped
from s2s_scale.resilience.preemption import active as active_guard
from s2s_scale.resilience.reports import (
    EXIT_FAULT,
    FailureSource,
    lost_contact,
    problems_of,
    report_done,
    report_error,
    report_failure,
)

SILENCE_SECONDS = 20.0
"""Without a sign of life for so long a rank counts as cut off."""
ORDERLY_SECONDS = 5.0
"""How long a rank may take to end by itself after another rank has failed with an error."""
HANG_SHARE = 0.85
"""Share of ``fault_seconds`` after which a run that stands still hangs; the rest is for its end."""

GatherObjects = Callable[[Any], "list[Any]"]


class _Hub:
    """Rank 0's side: takes every rank's lines, asks the judge, and tells all."""

    def __init__(self, address: str, clock: Callable[[], float]) -> None:
        self.server = MessageServer(
            host=address, on_line=self._take, on_close=self._closed, on_idle=self._look
        )
        self._judge: HealthMonitor | None = None
        self._clock = clock
        self._rank_of: dict[int, int] = {}
        self._told: Fault | None = None
        self._next_beat = 0.0

    def start(self, judge: HealthMonitor) -> None:
        self._judge = judge
        self.server.start()

    def _take(self, peer: int, message: Message) -> None:
        assert self._judge is not None
        rank = self._rank_of.setdefault(peer, int(message["rank"]))
        if message["kind"] == "failed":
            self._judge.failed(rank, str(message["cause"]), int(message["code"]))
        elif message["kind"] == "done":
            self._judge.done(rank)
            if rank == 0:
                self.server.broadcast({"kind": "over"})
        else:
            self._judge.heard(rank, message, self._clock())
        self._look()

    def _closed(self, peer: int) -> None:
        assert self._judge is not None
        if peer in self._rank_of:
            self._judge.closed(self._rank_of.pop(peer))

    def _look(self) -> None:
        assert self._judge is not None
        now = self._clock()
        fault = self._judge.verdict(now)
        if now < self._next_beat and (fault is None or self._told is not None):
            return
        self._told = fault
        self._next_beat = now + BEAT_SECONDS
        # Again with each beat: a rank may not have connected yet when the fault was found.
        message = {"kind": "alive"} if fault is None else {"kind": "fault", **asdict(fault)}
        self.server.broadcast(message)


@dataclass
class _Place:
    """Where this rank stands. Written by the main thread only, read by the watchdog's."""

    phase: str = "preparing"
    step: int | None = None
    progress: int = 0
    paused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        where = self.paused[-1] if self.paused else self.phase
        return f"at {where}" + (f" (step {self.step})" if self.step is not None else "")


class Watchdog:
    """One rank's watchdog. Until the first ``at`` the rank counts as paused, in 'preparing'.

    ``on_fault`` is called in the watchdog's thread, once, with what is wrong; by default it ends
    this process (see ``leave``). ``hang_seconds`` 0: a hang is no fault.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        *,
        host: str,
        hang_seconds: float,
        silence_seconds: float = SILENCE_SECONDS,
        on_fault: Callable[[Fault], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.host = host
        self.hang_seconds = hang_seconds
        self.silence_seconds = silence_seconds
        self._on_fault = on_fault or self.leave
        self._clock = clock
        self._place = _Place(paused=["preparing"])
        self._main = threading.main_thread().ident
        self._fault: Fault | None = None
        self._faulted = threading.Event()
        self._stopping = threading.Event()
        self._lost = threading.Event()
        self._lock = threading.Lock()
        self._hub: _Hub | None = None
        self._client: LineClient | None = None
        self._thread: threading.Thread | None = None

    def start(self, gather_objects: GatherObjects, *, address: str | None = None) -> None:
        """Connect all ranks with rank 0. Every rank must call it.

        ``address``: where the others reach rank 0; MASTER_ADDR unless given.

        Raises:
            OSError: rank 0 cannot be reached.
        """
        address = address or os.environ.get("MASTER_ADDR", "127.0.0.1")
        if self.rank == 0:
            self._hub = _Hub(address, self._clock)
        server = self._hub.server if self._hub is not None else None
        mine = (self.host, server.port if server else 0, server.token if server else "")
        everyone = gather_objects(mine)
        _, port, token = everyone[0]
        if self._hub is not None:
            judge = HealthMonitor(
                [host for host, _, _ in everyone],
                hang_seconds=self.hang_seconds,
                silence_seconds=self.silence_seconds,
                now=self._clock(),
            )
            self._hub.start(judge)
        self._client = LineClient(address, port, token)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def at(self, phase: str, *, step: int | None = None) -> None:
        """This rank begins ``phase``, such as 'training step'. Every rank marks the same places."""
        place = self._place
        if place.paused and place.paused[0] == "preparing":
            place.paused.pop(0)
        place.phase, place.step = phase, step
        place.progress += 1

    @contextmanager
    def pause(self, what: str) -> Iterator[None]:
        """Context for long work without marks, such as 'writing the report'."""
        self._place.paused.append(what)
        try:
            yield
        finally:
            self._place.paused.pop()

    def failed(self, cause: str, code: int = EXIT_FAULT) -> None:
        """This rank ends: tell the others why, and with which exit code they end."""
        self._send({"kind": "failed", "rank": self.rank, "cause": cause, "code": code})
        # The others must hear of it from rank 0, which may be this very process.
        self._faulted.wait(2 * BEAT_SECONDS)

    def ends(self, cause: str, code: int) -> None:
        """This process is about to be ended by force: tell the others and who started the run."""
        with suppress(OSError):
            self._send({"kind": "failed", "rank": self.rank, "cause": cause, "code": code})
        report_done(rank=self.rank, code=code)
        if self._hub is not None:
            time.sleep(1)  # as in ``leave``

    def stop(self) -> None:
        """The end of this rank's work: from now on its silence is no fault."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(2 * BEAT_SECONDS)
        if self._hub is not None:
            self._hub.server.close()
        if self._client is not None:
            self._client.close()

    def wait_for_fault(self) -> Fault | None:
        """The fault, once there is one; None if there is none when silence would have shown.

        For a main thread that cannot go on: ``leave`` need not wait for it any more.
        """
        self._lost.set()
        self._faulted.wait(self.silence_seconds + 2 * BEAT_SECONDS)
        return self._fault

    def leave(self, fault: Fault) -> None:
        """Say where this rank stands and whose fault it is, and end the process."""
        if fault.orderly and fault.rank == self.rank:
            return
        if fault.code != EXIT_FAULT:  # no error: the run was asked to stop
            report_done(rank=self.rank, code=fault.code)
            _write(f"rank {self.rank} on {self.host} ends, since {fault}\n")
        else:
            if fault.orderly:
                self._lost.wait(ORDERLY_SECONDS)
            told = report_failure(
                [fault.cause],
                rank=fault.rank,
                host=fault.host,
                code=fault.code,
                certainty=FailureSource.WATCHDOG,
            )
            _write(self._last_words(fault, told=told))
        _flush_stdout()
        if self._hub is not None:
            time.sleep(1)  # the others must have read the verdict before the connections close
        os._exit(fault.code)

    def _last_words(self, fault: Fault, *, told: bool) -> str:
        lines = [] if told else [f"error: {fault}"]
        lines.append(f"rank {self.rank} on {self.host} ends: it stands {self._where()}")
        if self.rank in (0, fault.rank):
            lines += [f"  {place}" for place in fault.places]
        frame = sys._current_frames().get(self._main or 0)
        if self.rank == fault.rank and frame is not None:
            stack = "".join(traceback.format_stack(frame)).rstrip()
            lines += ["its stack (most recent call last):", stack]
        return "\n".join(lines) + "\n"

    def _where(self) -> str:
        frame = sys._current_frames().get(self._main or 0)
        if frame is None:
            return str(self._place)
        code = frame.f_code
        return f"{self._place}, in {code.co_name}, {code.co_filename}:{frame.f_lineno}"

    def _waits(self) -> bool:
        """Whether the main thread is inside a collective, or a backward pass that ends in one."""
        frame = sys._current_frames().get(self._main or 0)
        if frame is None:
            return False
        name = frame.f_code.co_filename
        return any(part in name for part in _WAITING)

    def _watch(self) -> None:
        heard_at, next_beat = self._clock(), 0.0
        while not self._stopping.is_set():
            now = self._clock()
            try:
                if now >= next_beat:
                    next_beat = now + BEAT_SECONDS
                    self._post_beat()
                assert self._client is not None
                messages = self._client.receive(0.25)
            except OSError:
                self._found(Fault(0, self._host_of_0(), "ended without a word, or cut off"))
                return
            if messages:
                heard_at = self._clock()
            elif self._clock() - now > BEAT_SECONDS:
                heard_at += self._clock() - now  # this process stood still itself
            if self._take(messages):
                return
            if self._clock() - heard_at > self.silence_seconds:
                cause = f"no sign of life for {self.silence_seconds:g} s"
                self._found(Fault(0, self._host_of_0(), cause))
                return
        with suppress(OSError):
            self._send({"kind": "done", "rank": self.rank})

    def _take(self, messages: Sequence[Message]) -> bool:
        """Whether nothing more is to be watched."""
        for message in messages:
            kind = message.pop("kind", None)
            if kind == "over":
                return True
            if kind == "fault":
                message["places"] = tuple(message["places"])
                self._found(Fault(**message))
                return True
        return False

    def _found(self, fault: Fault) -> None:
        self._fault = fault
        self._faulted.set()
        self._on_fault(fault)

    def _host_of_0(self) -> str:
        return os.environ.get("MASTER_ADDR", "unknown host")

    def _post_beat(self) -> None:
        place = self._place
        message = {"progress": place.progress, "where": self._where(), "paused": bool(place.paused)}
        self._send({"kind": "beat", "rank": self.rank, "waits": self._waits(), **message})

    def _send(self, message: Message) -> None:
        if self._client is not None:
            with self._lock:
                self._client.send(message)


_WAITING = (
    os.path.join("torch", "distributed", ""),
    os.path.join("torch", "nn", "parallel", ""),
    os.path.join("torch", "autograd", "graph.py"),
    os.path.join("torch", "cuda", ""),
    os.path.join("deepspeed", "comm", ""),
    os.path.join("fairscale", ""),
)


def _write(text: str) -> None:
    """To standard error past Python's buffers, whose lock the main thread may hold."""
    with suppress(OSError):
        os.write(2, text.encode())


def _flush_stdout() -> None:
    flushing = threading.Thread(target=sys.stdout.flush, daemon=True)
    flushing.start()
    flushing.join(1)


_active: Watchdog | None = None


def at(phase: str, *, step: int | None = None) -> None:
    """Mark progress with this process's watchdog, if it has one: cheap, no collective."""
    if _active is not None:
        _active.at(phase, step=step)


@contextmanager
def pause(what: str) -> Iterator[None]:
    """Context for long work without marks, for this process's watchdog if it has one."""
    if _active is None:
        yield
        return
    with _active.pause(what):
        yield


@contextmanager
def watching(
    rank: int, world_size: int, *, gather_objects: GatherObjects, fault_seconds: float
) -> Iterator[None]:
    """A rank's work: watched where there are several, and its errors told to all who must know.

    ``fault_seconds``: within this time after a rank has gone wrong, all have ended; 0: a hang does
    not count.

    Every rank must enter it. An error inside is reported before anything is closed, because the
    other ranks fail as soon as this one's connections close.
    """
    global _active
    host = socket.gethostname()
    watchdog = Watchdog(
        rank,
        world_size,
        host=host,
        hang_seconds=HANG_SHARE * fault_seconds,
        silence_seconds=min(SILENCE_SECONDS, fault_seconds / 2) or SILENCE_SECONDS,
    )
    if world_size > 1:
        watchdog.start(gather_objects)
        _active = watchdog
    guard = active_guard()
    if guard is not None:
        guard.on_end = watchdog.ends
    try:
        yield
    except Stopped as stop:
        if world_size > 1 and not stop.agreed:
            with suppress(OSError):
                watchdog.failed(str(stop), EXIT_RESUME)
        raise
    except Exception as error:
        if world_size > 1:
            _explain(watchdog, error)
        raise
    finally:
        _active = None
        watchdog.stop()


def _explain(watchdog: Watchdog, error: Exception) -> None:
    """Tell of an error. One that only says that a rank is gone waits for the name of that rank."""
    if lost_contact(error):
        fault = watchdog.wait_for_fault()
        if fault is not None and fault.rank != watchdog.rank:
            time.sleep(ORDERLY_SECONDS)  # the watchdog's thread is ending this process
    told = report_error(error, rank=watchdog.rank)
    problems = problems_of(error)
    if not told and not hasattr(error, "problems"):
        _write(f"error: rank {watchdog.rank} on {watchdog.host}: {problems[0]}\n")
    with suppress(OSError):
        watchdog.failed("; ".join(problems))
