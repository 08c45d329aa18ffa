"""Runs a launcher's command to its end, ends it when a rank has failed, asks it to stop if told."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from s2s_scale.config import DEFAULT_GRACE_SECONDS
from s2s_scale.preemption import EXIT_RESUME, SAME_SECONDS, SIGNALS
from s2s_scale.reports import Certainty, Reports

ORDERLY_SECONDS = 20.0
"""How long a launcher may take to end after the first rank has failed: then SIGTERM."""
TERMINATION_SECONDS = 5.0
"""How long it may take to end after SIGTERM: then SIGKILL, to everything below it."""
STOPPING_SECONDS = 15.0
"""How long a launcher may take to end, beyond the grace of its ranks, after a request to stop."""


def supervise(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    hosts: Mapping[int, str],
    address: str = "127.0.0.1",
    grace_seconds: float = DEFAULT_GRACE_SECONDS,
    share: Callable[[Mapping[str, str]], None] = lambda variables: None,
) -> Ended:
    """Run ``command`` to its end and return how the run ended.

    ``hosts``: rank -> host, of the ranks that must say that they are done; ``address``: where they
    reach this process; ``share`` is given, before anything is started, the variables that ranks on
    other hosts must find in their environment.

    The rank nearest to the cause is named, with its host, in one line on standard error. The exit
    code is not 0 unless every rank said that it was done, whatever the launcher says: pdsh ends
    with 0 when a rank on another host has failed.

    SIGTERM, SIGINT and SIGUSR1 are handed to the ranks by a message, on whichever host they are: a
    launcher would end them in ways of its own. A second one ends everything at once.
    """
    with Reports(address) as reports:
        share(reports.environment)
        stopping = _Stopping(reports, grace_seconds)
        # Launchers that know nothing of SIGUSR1 would die of it and leave their ranks behind.
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGUSR1,)}
        process = subprocess.Popen(
            list(command),
            env={**environment, **reports.environment},
            start_new_session=True,  # so that all of it can be ended at once
        )
        before |= {number: signal.signal(number, stopping.take) for number in SIGNALS[:2]}
        signal.signal(signal.SIGUSR1, stopping.take)
        try:
            code = _wait(process, reports, stopping)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    code = _verdict(code if code >= 0 else 128 - code, reports, hosts, stopping)
    failure = reports.first_failure()
    return Ended(code, stopping.reason is not None, failure.host if failure else None)


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code, whether it was asked to stop, the host of a failure."""

    code: int
    asked: bool = False
    host: str | None = None


class _Stopping:
    """What this process was asked, and what has become of it."""

    def __init__(self, reports: Reports, grace_seconds: float) -> None:
        self.reason: str | None = None
        self.at_once = False
        self._reports = reports
        self._grace_seconds = grace_seconds
        self._asked_at = 0.0

    def take(self, number: int, frame: FrameType | None) -> None:
        """The handler of the signals."""
        now, name = time.monotonic(), signal.Signals(number).name
        if self.reason is None:
            self.reason, self._asked_at = name, now
            self._reports.ask_to_stop(name)
        elif now - self._asked_at > SAME_SECONDS:
            self.reason, self.at_once = name, True

    @property
    def overdue(self) -> bool:
        """Whether everything is to be ended now."""
        limit = self._grace_seconds + STOPPING_SECONDS
        late = self.reason is not None and time.monotonic() - self._asked_at > limit
        return self.at_once or late


def _verdict(code: int, reports: Reports, hosts: Mapping[int, str], stopping: _Stopping) -> int:
    failure, done = reports.first_failure(), reports.done_ranks
    if failure is not None and stopping.reason is None and failure.certainty <= Certainty.MISSED:
        _print_errors(failure.lines)  # the others were then asked to stop by their launcher
        return failure.code or 1
    if EXIT_RESUME in done.values():
        return EXIT_RESUME  # whatever became of the others meanwhile
    if stopping.at_once:
        return 128 + int(getattr(signal, str(stopping.reason)))
    if failure is not None and (stopping.reason is None or failure.certainty == Certainty.SAID):
        _print_errors(failure.lines)
        return failure.code or 1
    if stopping.reason is not None and (code or not done):
        return EXIT_RESUME  # before any rank could speak, or when its time was over
    interrupted = max(done.values(), default=0)
    if code or interrupted:
        return code or interrupted
    silent = [f"rank {rank} on {host}" for rank, host in hosts.items() if rank not in done]
    if silent:
        _print_errors([f"{', '.join(silent)}: ended and never said that it was done"])
    return 1 if silent else 0


def _print_errors(lines: Sequence[str]) -> None:
    for line in lines:
        print(f"error: {line}", file=sys.stderr)


def _wait(process: subprocess.Popen[bytes], reports: Reports, stopping: _Stopping) -> int:
    """Wait for the launcher; once a rank has failed, only so long."""
    terminated: float | None = None
    while True:
        try:
            code = process.wait(0.2)
        except subprocess.TimeoutExpired:
            code = None
        if code is not None and not (stopping.reason and _is_there(process.pid)):
            return code
        if code is not None:  # it died of a signal that everybody got; its ranks still save
            time.sleep(0.2)
        now = time.monotonic()
        if stopping.overdue:
            _kill(process.pid)
        if reports.failed_at is None or now - reports.failed_at < ORDERLY_SECONDS:
            continue
        if terminated is None:
            terminated = now
            _signal_group(process.pid, signal.SIGTERM)
        elif now - terminated > TERMINATION_SECONDS:
            _kill(process.pid)


def _is_there(group: int) -> bool:
    """Whether a process of the launcher's group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _kill(pid: int) -> None:
    """SIGKILL to the launcher's group, and to the ranks that it put into sessions of their own."""
    below = list(_descendants(pid))
    _signal_group(pid, signal.SIGKILL)
    for child in below:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _descendants(pid: int) -> Iterator[int]:
    """Processes below ``pid``, where the system has /proc."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, path.read_text().split()):
                yield child
                yield from _descendants(child)
