"""Runs a launcher's command to its end, and ends it when a rank has failed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from s2s_scale.reports import Reports

ORDERLY_SECONDS = 20.0
"""How long a launcher may take to end after the first rank has failed: then SIGTERM."""
TERMINATION_SECONDS = 5.0
"""How long it may take to end after SIGTERM: then SIGKILL, to everything below it."""
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def supervise(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    hosts: Mapping[int, str],
    address: str = "127.0.0.1",
    share: Callable[[Mapping[str, str]], None] = lambda variables: None,
) -> int:
    """Run ``command`` to its end and return the run's exit code.

    ``hosts``: rank -> host, of the ranks that must say that they are done; ``address``: where they
    reach this process; ``share`` is given, before anything is started, the variables that ranks on
    other hosts must find in their environment.

    The rank nearest to the cause is named, with its host, in one line on standard error. The exit
    code is not 0 unless every rank said that it was done, whatever the launcher says: pdsh ends
    with 0 when a rank on another host has failed.
    """
    with Reports(address) as reports:
        share(reports.environment)
        process = subprocess.Popen(
            list(command),
            env={**environment, **reports.environment},
            start_new_session=True,  # so that all of it can be ended at once
        )
        with _forwarding(process):
            code = _wait(process, reports)
    return _verdict(code if code >= 0 else 128 - code, reports, hosts)


def _verdict(code: int, reports: Reports, hosts: Mapping[int, str]) -> int:
    failure, done = reports.first_failure(), reports.done_ranks
    if failure is not None:
        _print_errors(failure.lines)
        return failure.code or 1
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


@contextlib.contextmanager
def _forwarding(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Hand on the signals that ask this process to end: the launcher is in a session of its own."""

    def forward(number: int, frame: FrameType | None) -> None:
        _signal_group(process.pid, signal.Signals(number))

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(process: subprocess.Popen[bytes], reports: Reports) -> int:
    """Wait for the launcher; once a rank has failed, only so long."""
    terminated: float | None = None
    while True:
        try:
            return process.wait(0.2)
        except subprocess.TimeoutExpired:
            now = time.monotonic()
        if reports.failed_at is None or now - reports.failed_at < ORDERLY_SECONDS:
            continue
        if terminated is None:
            terminated = now
            _signal_group(process.pid, signal.SIGTERM)
        elif now - terminated > TERMINATION_SECONDS:
            _kill(process.pid)


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
