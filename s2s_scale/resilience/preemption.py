"""A process that is asked to stop: signals, the process that started the run, notices of its host.

``handle_preemption`` turns SIGTERM, SIGINT and SIGUSR1 into one request. Before training nothing
has to be saved, so the request is raised in the main thread, as Ctrl-C is. From ``at_boundaries``
on it is only noted: the trainer looks at ``reason`` where it can stop, agrees on that with the
other ranks, saves, and raises ``Stopped`` itself.

A thread reads the signals from a pipe, so that neither a compilation nor a collective keeps one
from being seen. It ends the process when it is asked a second time, or when ``grace_seconds`` are
over.

Notices of Google's cloud that this host will be taken away: maintenance, and preemption.

The metadata server of a VM is asked by one process of the host, in a thread. ``GCE_METADATA_HOST``
names another server, as it does for Google's own libraries.
"""

from __future__ import annotations

import http.client
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

from s2s_scale.resilience.messages import LineClient
from s2s_scale.resilience.reports import starter_address

EXIT_RESUME = 85
"""Exit code of a run that was asked to stop: start it again (HTCondor's code for a checkpoint)."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_SECONDS = 2.0
"""Requests so soon after the first are that one again: launchers hand a signal on, some twice."""
STUCK_SECONDS = 5.0
"""How long the main thread may take to end while there is nothing to save."""
WAKE = signal.SIGUSR1
"""What the watching thread sends the main thread, to raise a request that was no signal."""

_TEXT, _QUIT = 254, 255  # in the pipe, beside the numbers of signals

Ending = Callable[[str, int], None]


class Stopped(BaseException):
    """The process was asked to stop and does so now. No ``Exception``, so that nobody handles it.

    ``agreed``: all ranks stop at this place, so that none has to be told.
    """

    def __init__(self, text: str, *, agreed: bool = False) -> None:
        super().__init__(text)
        self.agreed = agreed


class PreemptionHandler:
    """What this process was asked. One is active at a time; see ``handle_preemption``."""

    def __init__(self, grace_seconds: float) -> None:
        self.grace_seconds = grace_seconds
        self.reason: str | None = None
        self.at_boundaries = False
        self.on_end: Ending = lambda cause, code: None
        """Called before the process is ended by force, with why and with the exit code."""
        self._asked_at = 0.0
        self._settled = False
        self._main = threading.main_thread()
        self._reader, self._writer = socket.socketpair()
        for end in (self._reader, self._writer):
            end.setblocking(False)
        self._children_may_end = mmap.mmap(-1, 1)
        self._before: dict[int, object] = {}
        self._wakeup = -1
        self._raised = False
        self._thread = threading.Thread(target=self._watch, name="asked to stop", daemon=True)

    def start(self) -> None:
        """Take the signals over; for the main thread."""
        for number in SIGNALS:
            # A job of a script that ends in '&' is not meant by the Ctrl-C of its terminal.
            ignored = signal.getsignal(number) is signal.SIG_IGN
            if number != signal.SIGINT or not ignored:
                self._before[number] = signal.signal(number, self._on_signal)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread.start()

    def stop(self) -> None:
        """Give the signals back."""
        self._children_may_end[0] = 1
        signal.set_wakeup_fd(self._wakeup)
        # What ends the other ranks must not change the exit code of this one.
        rank_ends = self._settled and "RANK" in os.environ
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if rank_ends else handler)  # type: ignore[arg-type]
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
        """All that can be saved is: the rest of this process's life needs no more requests."""
        self._settled = True
        self._children_may_end[0] = 1
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # The thread reads the signal from the pipe; here the main thread is only interrupted.
        if not (self.at_boundaries or self._settled or self._raised):
            self._raised = True  # a second time could cut short what the first one brings about
            raise Stopped(_unsaved(self.reason or signal.Signals(number).name))

    def _watch(self) -> None:
        """The thread: requests from the pipe and from the process that started the run."""
        selector = selectors.DefaultSelector()
        selector.register(self._reader, selectors.EVENT_READ)
        starter = _Starter.reach()
        if starter is not None:
            selector.register(starter.connection, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select(self._patience()):
                if starter is not None and key.fileobj is starter.connection:
                    for reason in starter.read():
                        self._asked(reason)
                    if starter.closed:
                        selector.unregister(starter.connection)
                        starter = None
                elif not self._read_pipe():
                    selector.close()
                    return
            self._check_time()

    def _read_pipe(self) -> bool:
        """Take what lies in the pipe: numbers of signals and texts; False at the end."""
        data = self._reader.recv(4096)
        while data:
            number, data = data[0], data[1:]
            if number == _QUIT:
                return False
            if number == _TEXT:
                text, _, data = data.partition(b"\n")
                self._asked(text.decode())
            elif number in SIGNALS:
                self._asked(signal.Signals(number).name)
        return True

    def _asked(self, reason: str) -> None:
        now = time.monotonic()
        if self._settled:
            return
        if self.reason is None:
            self.reason, self._asked_at = reason, now
            if not self.at_boundaries:
                with suppress(OSError, RuntimeError, ValueError):
                    signal.pthread_kill(self._main.ident or 0, WAKE)
        elif now - self._asked_at > SAME_SECONDS:
            number = getattr(signal, reason, signal.SIGTERM)
            self._end(f"asked to stop a second time ({reason}): ended at once", 128 + int(number))

    def _patience(self) -> float | None:
        return None if self.reason is None or self._settled else 0.25

    def _check_time(self) -> None:
        if self.reason is None or self._settled:
            return
        waited = time.monotonic() - self._asked_at
        if self.at_boundaries and waited > self.grace_seconds:
            self._end(
                f"asked to stop ({self.reason}), and not at a step's end and saved within "
                f"{self.grace_seconds:g} s (--grace_seconds)",
                EXIT_RESUME,
            )
        elif not self.at_boundaries and waited > min(STUCK_SECONDS, self.grace_seconds):
            self._end(_unsaved(self.reason), EXIT_RESUME)

    def _end(self, cause: str, code: int) -> None:
        with suppress(OSError):
            os.write(2, f"{cause}\n".encode())
        with suppress(Exception):
            self.on_end(cause, code)
        os._exit(code)

    def in_child(self) -> None:
        """In a forked process: its parent decides when to stop.

        Signals to a whole group reach the workers of a data loader too, and without them the
        parent could not finish its step. Before training, workers end as they always do.
        """
        signal.set_wakeup_fd(-1)
        signal.signal(WAKE, signal.SIG_IGN)
        if not self.at_boundaries:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            return
        parent, may_end = os.getppid(), self._children_may_end

        def unless_needed(number: int, frame: FrameType | None) -> None:
            if may_end[0] or os.getppid() != parent:
                os._exit(128 + number)

        signal.signal(signal.SIGTERM, unless_needed)
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _unsaved(reason: str) -> str:
    return f"stopped by {reason}, with nothing to save; start the same command again"


class _Starter:
    """The process that started the run; it tells of the signals that it got."""

    def __init__(self, client: LineClient) -> None:
        self._client = client
        self.connection = client.connection
        self.closed = False

    @classmethod
    def reach(cls) -> _Starter | None:
        """A connection, or None where there is no such process, or none that answers."""
        address = starter_address()
        if address is None:
            return None
        with suppress(OSError):
            client = LineClient(*address)
            client.send({"listens": os.getpid()})
            return cls(client)
        return None

    def read(self) -> list[str]:
        try:
            messages = self._client.receive(0.1)
        except OSError:
            self.closed = True
            return []
        return [str(message["stop"]) for message in messages if "stop" in message]


_active: PreemptionHandler | None = None


@contextmanager
def handle_preemption(grace_seconds: float) -> Iterator[PreemptionHandler | None]:
    """A process's work, which can be asked to stop. Does nothing outside the main thread."""
    global _active
    if threading.current_thread() is not threading.main_thread() or _active is not None:
        yield _active
        return
    _once_at_forks()
    guard = PreemptionHandler(grace_seconds)
    guard.start()
    _active = guard
    try:
        yield guard
    except Stopped:
        guard.mark_saved()
        raise
    finally:
        _active = None
        guard.stop()


def active() -> PreemptionHandler | None:
    """This process's guard, if it has one."""
    return _active


_forks_seen = False


def _once_at_forks() -> None:
    global _forks_seen
    if not _forks_seen:
        _forks_seen = True
        os.register_at_fork(after_in_child=_in_child)


def _in_child() -> None:
    if _active is not None:
        _active.in_child()


SERVER = "metadata.google.internal"
VARIABLE = "GCE_METADATA_HOST"
EVERY_SECONDS = 5.0
ANSWER_SECONDS = 2.0
PATHS = ("maintenance-event", "preempted")
NOTHING = ("NONE", "FALSE", "")


class MaintenanceWatcher:
    """Asks until there is a notice or it is stopped; ``tell`` gets the notice, once."""

    def __init__(
        self, tell: Callable[[str], None], *, every_seconds: float = EVERY_SECONDS
    ) -> None:
        self._tell = tell
        self._every = every_seconds
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="maintenance", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """No more questions; does not wait for an answer that is due."""
        self._stopping.set()

    def _watch(self) -> None:
        while not self._stopping.wait(self._every):
            found = notice()
            if found is not None:
                self._tell(found)
                return


def notice() -> str | None:
    """What the metadata server has to say, such as 'preempted=TRUE'; None for nothing.

    A server that cannot be reached has nothing to say: this host is none of Google's.
    """
    for path in PATHS:
        value = _ask(path)
        if value is not None and value.upper() not in NOTHING:
            return f"{path}={value}"
    return None


def _ask(path: str) -> str | None:
    """The value of an attribute of this VM; None where there is no answer in time."""
    host = os.environ.get(VARIABLE) or SERVER
    connection = http.client.HTTPConnection(host, timeout=ANSWER_SECONDS)
    try:
        # No proxy is asked, whatever the environment says: the server is on this very host.
        connection.request(
            "GET",
            f"/computeMetadata/v1/instance/{path}",
            headers={"Metadata-Flavor": "Google"},
        )
        answer = connection.getresponse()
        text = answer.read(1000).decode("utf-8", "replace").strip()
        return text if answer.status == http.HTTPStatus.OK else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
