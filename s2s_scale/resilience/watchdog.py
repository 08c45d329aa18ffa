"""Turns a hang into an error: a thread per rank that reports where the rank is, and who is lost.

Every rank sends a heartbeat each two seconds to the run's hub over a connection of its own. No
collective is used, so that a rank stuck in one still reports. The hub's ``HealthMonitor`` finds

- a connection that closes before the rank has left: the rank was killed;
- no heartbeat for ``silence_seconds``: the rank, or its host, is cut off;
- no rank that passes a mark for ``hang_seconds``: the run hangs, and the ranks behind are named.

The fault is sent to all ranks. Each prints where it is, reports the fault and exits with code 75.
A rank that loses contact with the hub for ``silence_seconds`` exits by itself.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from s2s_scale.errors import EXIT_FAULT, EXIT_RESUME, UserError
from s2s_scale.resilience import preemption
from s2s_scale.resilience.compat import current_frame
from s2s_scale.resilience.health import HEARTBEAT_SECONDS, Fault
from s2s_scale.resilience.hub import Hub
from s2s_scale.resilience.messages import MessageClient
from s2s_scale.resilience.reports import (
    FailureSource,
    hub_address,
    lost_contact,
    problems_of,
    report_done,
    report_error,
    report_failure,
)

SILENCE_SECONDS = 20.0
"""A rank that sends no heartbeat for so long counts as cut off."""
ORDERLY_SECONDS = 5.0
"""How long a rank may take to end by itself after another rank has failed with an error."""
HANG_SHARE = 0.85
"""Share of ``fault_seconds`` after which a run without progress hangs; the rest is for its end."""
LAST_WORDS_SECONDS = (1.0, 5.0)
"""How long rank 0's own hub stays open after a fault, so that the other ranks read of it: at least
the first, and until they have disconnected, but at most the second."""

GatherObjects = Callable[[Any], "list[Any]"]


@dataclass
class _Position:
    """Where this rank is. Written by the main thread only, read by the watchdog's."""

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
    this process (see ``exit_process``). ``hang_seconds`` 0: a hang is no fault.
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
        self._on_fault = on_fault or self.exit_process
        self._clock = clock
        self._position = _Position(paused=["preparing"])
        self._main = threading.main_thread().ident or 0
        self._fault: Fault | None = None
        self._faulted = threading.Event()
        self._stopping = threading.Event()
        self._main_is_stuck = threading.Event()
        self._lock = threading.Lock()
        self._hub: Hub | None = None
        self._starter_has_hub = True
        self._client: MessageClient | None = None
        self._thread: threading.Thread | None = None

    def start(self, gather_objects: GatherObjects, *, address: str | None = None) -> None:
        """Connect this rank with the run's hub. Every rank must call it.

        The hub is that of the process that started the run, if all ranks reach the same one;
        otherwise rank 0 opens one. ``address``: where the others reach rank 0; MASTER_ADDR unless
        given.

        Raises:
            OSError: the hub cannot be reached.
        """
        starter = hub_address()
        if starter is not None:
            try:
                self._client = MessageClient(*starter)
            except OSError:
                starter = None
        everyone = gather_objects((self.host, starter))
        if starter is None or any(other != starter for _, other in everyone):
            if self._client is not None:
                self._client.close()
            address = address or os.environ.get("MASTER_ADDR", "127.0.0.1")
            if self.rank == 0:
                self._hub = Hub(address, ranks=self.world_size, clock=self._clock)
                self._hub.start()
            self._starter_has_hub = False
            location = gather_objects(None if self._hub is None else self._hub.location)[0]
            self._client = MessageClient(*location)
        self._send(
            "join",
            rank=self.rank,
            hosts=[host for host, _ in everyone],
            hang_seconds=self.hang_seconds,
            silence_seconds=self.silence_seconds,
        )
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def at(self, phase: str, *, step: int | None = None) -> None:
        """This rank begins ``phase``, such as 'training step'. Every rank passes the same marks."""
        position = self._position
        if position.paused and position.paused[0] == "preparing":
            position.paused.pop(0)
        position.phase, position.step = phase, step
        position.progress += 1

    @contextmanager
    def pause(self, what: str) -> Iterator[None]:
        """Context for long work without marks, such as 'writing the report'."""
        self._position.paused.append(what)
        try:
            yield
        finally:
            self._position.paused.pop()

    def failed(self, cause: str, code: int = EXIT_FAULT) -> None:
        """This rank ends: tell the others why, and with which exit code they end."""
        with suppress(OSError):
            self._send("failed", cause=cause, code=code)
            # The others hear of it from the hub, which may be in this very process.
            self._faulted.wait(2 * HEARTBEAT_SECONDS)

    def killed(self, cause: str, code: int) -> None:
        """This process is about to exit by force: tell the others and who started the run."""
        with suppress(OSError):
            self._send("failed", cause=cause, code=code)
        report_done(rank=self.rank, code=code)
        self._wait_for_others()

    def _wait_for_others(self) -> None:
        """Keep this process's hub open, if it has one, until the other ranks know of the fault."""
        if self._hub is None:
            return
        least, most = LAST_WORDS_SECONDS
        time.sleep(least)
        until = time.monotonic() + most - least
        while self._hub.connected > 1 and time.monotonic() < until:
            time.sleep(0.05)

    def stop(self) -> None:
        """The end of this rank's work: from now on its silence is no fault."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(2 * HEARTBEAT_SECONDS)
        if self._hub is not None:
            self._hub.close()
        if self._client is not None:
            self._client.close()

    def wait_for_fault(self) -> Fault | None:
        """The fault, once there is one; None if there is none when silence would have shown.

        For a main thread that cannot go on: ``exit_process`` need not wait for it any more.
        """
        self._main_is_stuck.set()
        self._faulted.wait(self.silence_seconds + 2 * HEARTBEAT_SECONDS)
        return self._fault

    def exit_process(self, fault: Fault) -> None:
        """Print where this rank is and whose fault it is, and end the process."""
        if fault.orderly and fault.rank == self.rank:
            return
        if fault.code != EXIT_FAULT:  # no error: the run was asked to stop
            report_done(rank=self.rank, code=fault.code)
            _write_error(f"rank {self.rank} on {self.host} exits: {fault}\n")
        else:
            if fault.orderly:
                self._main_is_stuck.wait(ORDERLY_SECONDS)
            received = report_failure(
                [fault.cause],
                rank=fault.rank,
                host=fault.host,
                code=fault.code,
                source=FailureSource.WATCHDOG,
            )
            lines = [] if received else [f"error: {fault}"]
            lines.append(f"rank {self.rank} on {self.host} exits; it was {self._describe()}")
            if self.rank in (0, fault.rank):
                lines += [f"  {position}" for position in fault.positions]
            frame = current_frame(self._main)
            if self.rank == fault.rank and frame is not None:
                stack = "".join(traceback.format_stack(frame)).rstrip()
                lines += ["its stack (most recent call last):", stack]
            _write_error("\n".join(lines) + "\n")
        flushing = threading.Thread(target=sys.stdout.flush, daemon=True)
        flushing.start()
        flushing.join(1)  # the main thread may hold the lock of the buffer
        self._wait_for_others()
        os._exit(fault.code)

    def _watch(self) -> None:
        """The watchdog's thread."""
        assert self._client is not None
        heard_at, next_heartbeat = self._clock(), 0.0
        while not self._stopping.is_set():
            now = self._clock()
            try:
                if now >= next_heartbeat:
                    next_heartbeat = now + HEARTBEAT_SECONDS
                    self._send_heartbeat()
                message = self._client.receive(0.25)
            except OSError:
                self._lost_hub("the connection was closed")
                return
            if message is not None:
                heard_at = self._clock()
                kind = message.pop("kind", None)
                if kind == "over":
                    return
                if kind == "fault":
                    message["positions"] = tuple(message["positions"])
                    self._set_fault(Fault(**message))
                    return
            elif self._clock() - now > HEARTBEAT_SECONDS:
                heard_at += self._clock() - now  # this process was stopped itself
            if self._clock() - heard_at > self.silence_seconds:
                self._lost_hub(f"no heartbeat for {self.silence_seconds:g} s")
                return
        with suppress(OSError):
            self._send("leave", closes_hub=self._hub is not None)

    def _lost_hub(self, how: str) -> None:
        if self._starter_has_hub:
            cause = f"lost contact with the process that started the run ({how})"
            self._set_fault(Fault(self.rank, self.host, cause))
        else:
            host = os.environ.get("MASTER_ADDR", "unknown host")
            cause = f"ended without reporting an error, or is cut off ({how})"
            self._set_fault(Fault(0, host, cause))

    def _set_fault(self, fault: Fault) -> None:
        self._fault = fault
        self._faulted.set()
        self._on_fault(fault)

    def _describe(self) -> str:
        """Where this rank is, with function, file and line of its main thread."""
        frame = current_frame(self._main)
        if frame is None:
            return str(self._position)
        code = frame.f_code
        return f"{self._position}, in {code.co_name}, {code.co_filename}:{frame.f_lineno}"

    def _send_heartbeat(self) -> None:
        frame = current_frame(self._main)
        file = "" if frame is None else frame.f_code.co_filename
        self._send(
            "heartbeat",
            progress=self._position.progress,
            position=self._describe(),
            paused=bool(self._position.paused),
            waiting=any(part in file for part in _COLLECTIVES),
        )

    def _send(self, kind: str, **content: Any) -> None:
        if self._client is not None:
            with self._lock:
                self._client.send({"kind": kind, **content})


# Where the main thread is inside a collective, or in a backward pass that ends in one.
_COLLECTIVES = (
    os.path.join("torch", "distributed", ""),
    os.path.join("torch", "nn", "parallel", ""),
    os.path.join("torch", "autograd", "graph.py"),
    os.path.join("torch", "cuda", ""),
    os.path.join("deepspeed", "comm", ""),
    os.path.join("fairscale", ""),
)


def _write_error(text: str) -> None:
    """To standard error past Python's buffers, whose lock the main thread may hold."""
    with suppress(OSError):
        os.write(2, text.encode())


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
    """A rank's work: watched if there are several ranks, its errors reported to all concerned.

    ``fault_seconds``: within this time after a rank has gone wrong, all have ended; 0: a hang does
    not count.

    Every rank must enter it. An error inside is reported before anything is closed, because the
    other ranks fail as soon as this one's connections close.
    """
    global _active
    watchdog = Watchdog(
        rank,
        world_size,
        host=socket.gethostname(),
        hang_seconds=HANG_SHARE * fault_seconds,
        silence_seconds=min(SILENCE_SECONDS, fault_seconds / 2) or SILENCE_SECONDS,
    )
    if world_size > 1:
        watchdog.start(gather_objects)
        _active = watchdog
    handler = preemption.active()
    if handler is not None:
        handler.on_exit = watchdog.killed
    try:
        yield
    except preemption.Stopped as stop:
        if world_size > 1 and not stop.agreed:
            watchdog.failed(str(stop), EXIT_RESUME)
        raise
    except Exception as error:
        if world_size > 1:
            _report(watchdog, error)
        raise
    finally:
        _active = None
        watchdog.stop()


def _report(watchdog: Watchdog, error: Exception) -> None:
    """Report an error. One that says only that a rank is gone waits for the name of that rank."""
    if lost_contact(error):
        fault = watchdog.wait_for_fault()
        if fault is not None and fault.rank != watchdog.rank:
            time.sleep(ORDERLY_SECONDS)  # the watchdog's thread is ending this process
    received = report_error(error, rank=watchdog.rank)
    problems = problems_of(error)
    if not received and not isinstance(error, UserError):
        _write_error(f"error: rank {watchdog.rank} on {watchdog.host}: {problems[0]}\n")
    watchdog.failed("; ".join(problems))
