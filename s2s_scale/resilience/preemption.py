"""Requests to stop: signals, the process that started the run, and notices of the host.

``handle_preemption`` turns SIGTERM, SIGINT and SIGUSR1 into one request. Before training there is
nothing to save, so the request is raised in the main thread, as Ctrl-C is. Once ``at_boundaries``
is set it is only noted: the trainer reads ``reason`` where it can stop, agrees with the other
ranks, saves, and raises ``Stopped`` itself.

A thread reads the signals from a pipe, so that a signal is seen during a compilation and inside a
collective. The thread ends the process if it is asked a second time, or when ``grace_seconds`` are
over.
"""

from __future__ import annotations

import mmap
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from s2s_scale.errors import EXIT_RESUME
from s2s_scale.resilience.messages import MessageClient
from s2s_scale.resilience.reports import hub_address

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_REQUEST_SECONDS = 2.0
"""Signals so soon after the first repeat it: launchers forward signals, some of them twice."""
STUCK_SECONDS = 5.0
"""How long the main thread may take to end while there is nothing to save."""
WAKE = signal.SIGUSR1
"""What the watching thread sends to the main thread to raise a request that was no signal."""

_TEXT, _QUIT = 254, 255  # in the pipe, beside the numbers of signals


class Stopped(BaseException):
    """The process was asked to stop and does so now.

    Not an ``Exception``, so that ``except Exception`` does not catch it.

    ``agreed``: all ranks stop at this point, so none of them has to be told.
    """

    def __init__(self, text: str, *, agreed: bool = False) -> None:
        super().__init__(text)
        self.agreed = agreed


class PreemptionHandler:
    """Requests to stop this process. One is active at a time; see ``handle_preemption``.

    ``reason``: why it was asked to stop, such as 'SIGTERM'; None until then. ``at_boundaries``: the
    trainer stops at the end of a step, where it can save. ``on_exit`` is called with the cause and
    the exit code before the process is ended by force.
    """

    def __init__(self, grace_seconds: float) -> None:
        self.grace_seconds = grace_seconds
        self.reason: str | None = None
        self.at_boundaries = False
        self.on_exit: Callable[[str, int], None] = lambda cause, code: None
        self._asked_at = 0.0
        self._saved = False
        self._raised = False
        self._main = threading.main_thread()
        self._reader, self._writer = socket.socketpair()
        for end in (self._reader, self._writer):
            end.setblocking(False)
        self._children_may_end = mmap.mmap(-1, 1)  # shared with forked children
        self._handlers_before: dict[int, object] = {}
        self._wakeup_before = -1
        self._thread = threading.Thread(target=self._watch, name="preemption", daemon=True)

    def start(self) -> None:
        """Take over the signals. Only for the main thread."""
        for number in SIGNALS:
            # The Ctrl-C of a terminal is not meant for a script's background job ('&').
            if number != signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers_before[number] = signal.signal(number, self._on_signal)
        self._wakeup_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread.start()

    def stop(self) -> None:
        """Give the signals back. Only for the main thread."""
        self._children_may_end[0] = 1
        signal.set_wakeup_fd(self._wakeup_before)
        # What ends the other ranks must not change the exit code of this one.
        ignore = self._saved and "RANK" in os.environ
        for number, handler in self._handlers_before.items():
            signal.signal(number, signal.SIG_IGN if ignore else handler)  # type: ignore[arg-type]
        with suppress(OSError):
            self._writer.send(bytes([_QUIT]))
        self._thread.join(1)
        self._reader.close()
        self._writer.close()

    def ask(self, reason: str) -> None:
        """Ask this process to stop, from any thread; ``reason`` is such as 'SIGTERM'."""
        with suppress(OSError):
            self._writer.send(bytes([_TEXT]) + reason.encode() + b"\n")

    def mark_saved(self) -> None:
        """All that can be saved is saved: requests that come now change nothing."""
        self._saved = True
        self._children_may_end[0] = 1
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def in_child(self) -> None:
        """In a forked process: its parent decides when to stop.

        Signals to a process group reach the workers of a data loader too, and without them the
        parent could not finish its step. Before training, workers end as they always do.
        """
        signal.set_wakeup_fd(-1)
        signal.signal(WAKE, signal.SIG_IGN)
        if not self.at_boundaries:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            return
        parent, may_end = os.getppid(), self._children_may_end

        def exit_if_allowed(number: int, frame: FrameType | None) -> None:
            if may_end[0] or os.getppid() != parent:
                os._exit(128 + number)

        signal.signal(signal.SIGTERM, exit_if_allowed)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # The thread reads the signal from the pipe; here the main thread is only interrupted.
        if not (self.at_boundaries or self._saved or self._raised):
            self._raised = True  # raised once more, it could interrupt what the first one unwinds
            raise Stopped(_unsaved(self.reason or signal.Signals(number).name))

    def _watch(self) -> None:
        """The thread: requests from the pipe and from the process that started the run."""
        selector = selectors.DefaultSelector()
        selector.register(self._reader, selectors.EVENT_READ)
        starter: MessageClient | None = None
        address = hub_address()
        if address is not None:
            with suppress(OSError):
                starter = MessageClient(*address)
                starter.send({"kind": "listen"})
                selector.register(starter, selectors.EVENT_READ)
        while True:
            waiting = self.reason is not None and not self._saved
            for key, _ in selector.select(0.25 if waiting else None):
                if key.fileobj is not starter:
                    if not self._read_pipe():
                        selector.close()
                        return
                    continue
                try:
                    message = starter.receive(0)
                except OSError:
                    selector.unregister(starter)
                    continue
                if message is not None and message.get("kind") == "stop":
                    self._request(str(message["reason"]))
            self._check_time()

    def _read_pipe(self) -> bool:
        """Handle what lies in the pipe: numbers of signals and texts. False at the end."""
        data = self._reader.recv(4096)
        while data:
            number, data = data[0], data[1:]
            if number == _QUIT:
                return False
            if number == _TEXT:
                text, _, data = data.partition(b"\n")
                self._request(text.decode())
            elif number in SIGNALS:
                self._request(signal.Signals(number).name)
        return True

    def _request(self, reason: str) -> None:
        now = time.monotonic()
        if self._saved:
            return
        if self.reason is None:
            self.reason, self._asked_at = reason, now
            if not self.at_boundaries:
                with suppress(OSError, RuntimeError, ValueError):
                    signal.pthread_kill(self._main.ident or 0, WAKE)
        elif now - self._asked_at > SAME_REQUEST_SECONDS:
            number = getattr(signal, reason, signal.SIGTERM)
            cause = f"asked to stop a second time ({reason}): exiting immediately"
            self._exit_process(cause, 128 + int(number))

    def _check_time(self) -> None:
        if self.reason is None or self._saved:
            return
        waited = time.monotonic() - self._asked_at
        if self.at_boundaries and waited > self.grace_seconds:
            self._exit_process(
                f"asked to stop ({self.reason}), but the step was not finished and saved within "
                f"{self.grace_seconds:g} s (--grace_seconds)",
                EXIT_RESUME,
            )
        elif not self.at_boundaries and waited > min(STUCK_SECONDS, self.grace_seconds):
            self._exit_process(_unsaved(self.reason), EXIT_RESUME)

    def _exit_process(self, cause: str, code: int) -> None:
        with suppress(OSError):
            os.write(2, f"{cause}\n".encode())
        with suppress(Exception):
            self.on_exit(cause, code)
        os._exit(code)


def _unsaved(reason: str) -> str:
    return f"stopped by {reason}, with nothing to save; run the same command again"


_active: PreemptionHandler | None = None
_registered_at_fork = False


@contextmanager
def handle_preemption(grace_seconds: float) -> Iterator[PreemptionHandler | None]:
    """Context for a process's work, during which it can be asked to stop.

    An inner one gives the outer one's handler; outside the main thread there is none.
    """
    global _active, _registered_at_fork
    if threading.current_thread() is not threading.main_thread() or _active is not None:
        yield _active
        return
    if not _registered_at_fork:
        _registered_at_fork = True
        os.register_at_fork(after_in_child=_in_child)
    handler = PreemptionHandler(grace_seconds)
    handler.start()
    _active = handler
    try:
        yield handler
    except Stopped:
        handler.mark_saved()
        raise
    finally:
        _active = None
        handler.stop()


def active() -> PreemptionHandler | None:
    """This process's handler, if it has one."""
    return _active


def _in_child() -> None:
    if _active is not None:
        _active.in_child()
