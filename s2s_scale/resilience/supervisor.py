"""Runs a launcher's command to its end, ends it when a rank has failed, asks it to stop if told.

Starts a run again after a fault: the same command, with the processes that are left.

Starts what was planned, and runs it to its end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from s2s_scale.config import DEFAULT_GRACE_SECONDS
from s2s_scale.errors import UserError
from s2s_scale.launch.hosts import answering
from s2s_scale.launch.spec import Launch, LaunchOptions, without_flags
from s2s_scale.resilience.preemption import EXIT_RESUME, SAME_SECONDS, SIGNALS
from s2s_scale.resilience.reports import EXIT_FAULT, RUN_VARIABLE, FailureSource, Reports

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
    if (
        failure is not None
        and stopping.reason is None
        and failure.certainty <= FailureSource.WATCHDOG
    ):
        _print_errors(failure.lines)  # the others were then asked to stop by their launcher
        return failure.code or 1
    if EXIT_RESUME in done.values():
        return EXIT_RESUME  # whatever became of the others meanwhile
    if stopping.at_once:
        return 128 + int(getattr(signal, str(stopping.reason)))
    if failure is not None and (
        stopping.reason is None or failure.certainty == FailureSource.REPORTED
    ):
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


LOOK_SECONDS = 2.0
PATIENCE_SECONDS = 30.0
"""How long a host may take to answer again where the run may go on without it."""
STEP_FLAGS = ("per_device_train_batch_size", "gradient_accumulation_steps")
STEP_DEFAULTS = (8, 1)


@dataclass(frozen=True)
class Command:
    """What is started: the words with their verb, the options for hosts, the settings' values."""

    words: tuple[str, ...]
    options: LaunchOptions
    values: Mapping[str, Any]

    @property
    def by_tokens(self) -> bool:
        """Whether a step's size depends on no number of processes."""
        return self.values.get("batching") == "tokens" or "tokens_per_step" in self.values


def run_with_restarts(
    launch: Launch,
    command: Command,
    *,
    plan: Callable[[tuple[str, ...], LaunchOptions], Launch],
    start: Callable[[Launch], Ended],
    fault_seconds: float,
) -> int:
    """Start the run, again after each fault as often as ``--max_restarts`` allows; its exit code.

    A fault is a rank that was killed, hung or lost its network, not one that ended with an error.
    ``plan`` makes a launch of words and options, as for the first one.

    Raises:
        UserError: fewer processes are left than the run may have.
    """
    mark = secrets.token_hex(8)
    most = command.options.max_restarts or 0
    for number in range(most + 1):
        marked = {**launch.environment, RUN_VARIABLE: mark}
        ended = start(dataclasses.replace(launch, environment=marked))
        if number == most or not is_fault(ended):
            return ended.code
        print(
            f"note: ended with exit code {ended.code}; started again from the newest checkpoint "
            f"({number + 1} of --max_restarts {most})",
            file=sys.stderr,
        )
        launch = _again(launch, command, plan=plan, fault_seconds=fault_seconds)
    raise AssertionError("the last start returns")


def is_fault(ended: Ended) -> bool:
    """Whether the run ended by no will of its own, nor of whoever started it."""
    return not ended.asked and (ended.code == EXIT_FAULT or ended.code > 128)


def _again(
    before: Launch,
    command: Command,
    *,
    plan: Callable[[tuple[str, ...], LaunchOptions], Launch],
    fault_seconds: float,
) -> Launch:
    """The launch after ``before``: the same, or with the hosts and devices that are left."""
    options, least = command.options, command.options.min_processes
    if before.remote:
        patience = fault_seconds if least is None else min(PATIENCE_SECONDS, fault_seconds)
        left = _wait_for(before.hosts, patience)
        if len(left) < len(before.hosts):
            options = _only(left, before, options)
    launch = plan(command.words, options)
    wanted, there = len(before.ranks), len(launch.ranks)
    if there >= wanted:
        return launch
    if least is None or there < least:
        raise UserError(
            f"{there} of {wanted} processes are left; expected {least or wanted} or more; mend "
            "what is gone, or allow fewer with --min_processes"
        )
    return plan(_same_step(command, wanted, there), options)


def _wait_for(hosts: Sequence[str], seconds: float) -> list[str]:
    """The hosts that answer; all of them, unless that takes longer than ``seconds``."""
    deadline = time.monotonic() + seconds
    while len(left := answering(hosts)) < len(hosts) and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
    return left


def _only(hosts: Sequence[str], before: Launch, options: LaunchOptions) -> LaunchOptions:
    """The options for these hosts alone, each with the slots that it had."""
    if not hosts:
        raise UserError(f"none of {', '.join(before.hosts)} answers over ssh any more")
    gone = [host for host in before.hosts if host not in hosts]
    print(f"note: without {', '.join(gone)}, which does not answer", file=sys.stderr)
    slots = {host: [r.slot for r in before.ranks if r.host == host] for host in hosts}
    include = "@".join(f"{host}:{','.join(names)}" for host, names in slots.items())
    return dataclasses.replace(
        options,
        include=include,
        exclude=None,
        num_nodes=None,
        num_processes=None,
        master_addr=None,
    )


def _same_step(command: Command, before: int, now: int) -> tuple[str, ...]:
    """The words with rows per device and accumulation that keep the rows of a step."""
    if command.by_tokens:
        return command.words
    rows, accumulation = (
        int(command.values.get(name) or default)
        for name, default in zip(STEP_FLAGS, STEP_DEFAULTS, strict=True)
    )
    found = divided(rows * accumulation * before, now, rows)
    if found is None:
        raise UserError(
            f"{rows * accumulation * before} rows of a step cannot be shared by {now} processes; "
            f"expected a multiple of {now}; change --per_device_train_batch_size"
        )
    flags = [w for name, n in zip(STEP_FLAGS, found, strict=True) for w in (f"--{name}", str(n))]
    return (*without_flags(command.words, set(STEP_FLAGS)), *flags)


def divided(rows: int, processes: int, most: int) -> tuple[int, int] | None:
    """(rows of a micro-batch, micro-batches) that make ``rows`` a step on so many processes.

    The largest micro-batch of at most ``most`` rows; None where there is none.
    """
    own, rest = divmod(rows, processes)
    if rest:
        return None
    return next((size, own // size) for size in range(min(most, own), 0, -1) if own % size == 0)


DEEPSPEED_ENVIRONMENT = "DS_ENV_FILE"


def start(
    launch: Launch, *, environ: Mapping[str, str], grace_seconds: float = DEFAULT_GRACE_SECONDS
) -> Ended:
    """Run the command to its end, and return how it ended.

    The rank that failed is named, with its host and the cause, in one line on standard error.
    """
    environment = {**environ, **launch.environment}
    hosts = {place.rank: place.host for place in launch.ranks}
    if not launch.remote:
        return supervise(
            launch.command, environment=environment, hosts=hosts, grace_seconds=grace_seconds
        )
    with tempfile.TemporaryDirectory(prefix="s2s-scale-") as folder:
        file = Path(folder, "environment")

        def share(variables: Mapping[str, str]) -> None:
            own = {**launch.environment, **variables}
            file.write_text(_deepspeed_environment(own), encoding="utf-8")

        return supervise(
            launch.command,
            environment={**environment, DEEPSPEED_ENVIRONMENT: str(file)},
            hosts=hosts,
            address=_address_towards(launch.hosts[0]),
            grace_seconds=grace_seconds,
            share=share,
        )


def _deepspeed_environment(variables: Mapping[str, str]) -> str:
    """What DeepSpeed's launcher exports on every host: the user's own files, then ``variables``."""
    own = (Path("~/.deepspeed_env").expanduser(), Path(".deepspeed_env"))
    lines = [line for path in own if path.is_file() for line in path.read_text().splitlines()]
    return "\n".join([*lines, *(f"{name}={value}" for name, value in variables.items()), ""])


def _address_towards(host: str) -> str:
    """The address of this host on the way to another one; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:
            return socket.gethostname()
        return str(probe.getsockname()[0])
