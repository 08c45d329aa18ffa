"""Runs a launcher to its end, and starts the run again after a fault.

``supervise`` runs one command: it ends the command's processes when a rank has failed, passes on
requests to stop, and says how the run ended. ``start`` does so for a planned ``Launch``.
``run_with_restarts`` starts the launch, and after a fault again, with the processes that are left.
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from s2s_scale.config import DEFAULT_GRACE_SECONDS
from s2s_scale.errors import EXIT_FAULT, EXIT_RESUME, UserError
from s2s_scale.launch.hosts import reachable_hosts
from s2s_scale.launch.spec import Launch, LaunchOptions, without_flags
from s2s_scale.resilience.hub import Hub
from s2s_scale.resilience.preemption import SAME_REQUEST_SECONDS
from s2s_scale.resilience.reports import RUN_VARIABLE, FailureSource

ORDERLY_SECONDS = 20.0
"""How long a launcher may take to end after the first rank has failed: then SIGTERM."""
TERMINATION_SECONDS = 5.0
"""How long it may take to end after SIGTERM: then SIGKILL, to everything below it."""
STOPPING_SECONDS = 15.0
"""How long a launcher may take to end, beyond the grace of its ranks, after a request to stop."""
CHECK_SECONDS = 2.0
"""How often hosts that do not answer are asked again."""
REDUCED_SECONDS = 30.0
"""How long a host may take to answer again if the run may continue without it."""
DEEPSPEED_ENVIRONMENT = "DS_ENV_FILE"
STEP_FLAGS = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
"""The flags that make up the rows of a step, and their defaults."""


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code, whether it was asked to stop, the host of a failure."""

    code: int
    asked: bool = False
    host: str | None = None

    @property
    def is_fault(self) -> bool:
        """Whether a rank was lost or hung, against the will of the run and of its user."""
        return not self.asked and (self.code == EXIT_FAULT or self.code > 128)


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
    reach this process; ``share`` is called, before anything is started, with the variables that
    ranks on other hosts must find in their environment.

    The rank nearest to the cause is named, with its host, in one line on standard error. The exit
    code is 0 only if every rank said that it was done, whatever the launcher says: pdsh exits with
    0 when a rank on another host has failed.

    SIGTERM, SIGINT and SIGUSR1 reach the ranks as a message, on whichever host they are: launchers
    would end them in ways of their own. A second signal ends everything at once.
    """
    with Hub(address, ranks=len(hosts)) as hub:
        share(hub.environment)
        stopping = _StopRequest(hub, grace_seconds)
        # Launchers do not handle SIGUSR1 and would die of it, leaving their ranks behind.
        before = {signal.SIGUSR1: signal.signal(signal.SIGUSR1, signal.SIG_IGN)}
        process = subprocess.Popen(
            list(command),
            env={**environment, **hub.environment},
            start_new_session=True,  # so that all of it can be ended at once
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, stopping.on_signal)
        signal.signal(signal.SIGUSR1, stopping.on_signal)
        try:
            code = _wait(process, hub, stopping)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    code, lines = _verdict(code if code >= 0 else 128 - code, hub, hosts, stopping)
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    failure = hub.first_failure()
    return Ended(code, stopping.reason is not None, failure.host if failure else None)


class _StopRequest:
    """Whether this process was asked to stop, and for how long."""

    def __init__(self, hub: Hub, grace_seconds: float) -> None:
        self.reason: str | None = None
        self.immediate = False
        self._hub = hub
        self._limit = grace_seconds + STOPPING_SECONDS
        self._asked_at = 0.0

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        now, name = time.monotonic(), signal.Signals(number).name
        if self.reason is None:
            self.reason, self._asked_at = name, now
            self._hub.ask_to_stop(name)
        elif now - self._asked_at > SAME_REQUEST_SECONDS:
            self.reason, self.immediate = name, True

    @property
    def overdue(self) -> bool:
        """Whether everything is to be ended now."""
        late = self.reason is not None and time.monotonic() - self._asked_at > self._limit
        return self.immediate or late


def _verdict(
    code: int, hub: Hub, hosts: Mapping[int, str], stopping: _StopRequest
) -> tuple[int, list[str]]:
    """The run's exit code, given its launcher's, and the errors to print."""
    failure, done = hub.first_failure(), hub.done_ranks
    asked = stopping.reason is not None
    if failure is not None and not asked and failure.source <= FailureSource.WATCHDOG:
        return failure.code or 1, failure.lines  # the launcher then asked the others to stop
    if EXIT_RESUME in done.values():
        return EXIT_RESUME, []  # whatever became of the others meanwhile
    if stopping.immediate:
        return 128 + int(getattr(signal, str(stopping.reason))), []
    if failure is not None and (not asked or failure.source == FailureSource.REPORTED):
        return failure.code or 1, failure.lines
    if asked and (code or not done):
        return EXIT_RESUME, []  # before any rank could answer, or when its time was over
    code = code or max(done.values(), default=0)
    silent = [f"rank {rank} on {host}" for rank, host in hosts.items() if rank not in done]
    if code or not silent:
        return code, []
    return 1, [f"{', '.join(silent)}: ended without saying that it was done"]


def _wait(process: subprocess.Popen[bytes], hub: Hub, stopping: _StopRequest) -> int:
    """Wait for the launcher; once a rank has failed, only for so long."""
    terminated: float | None = None
    while True:
        try:
            code = process.wait(0.2)
        except subprocess.TimeoutExpired:
            code = None
        if code is not None:
            if not stopping.reason or not _signal_group(process.pid, 0):
                return code
            time.sleep(0.2)  # a signal to the whole group ended it; its ranks are still saving
        now = time.monotonic()
        if stopping.overdue:
            _kill(process.pid)
        if hub.failed_at is None or now - hub.failed_at < ORDERLY_SECONDS:
            continue
        if terminated is None:
            terminated = now
            _signal_group(process.pid, signal.SIGTERM)
        elif now - terminated > TERMINATION_SECONDS:
            _kill(process.pid)


def _kill(pid: int) -> None:
    """SIGKILL to the launcher's group, and to the ranks that it put into sessions of their own."""
    below: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        below = psutil.Process(pid).children(recursive=True)
    _signal_group(pid, signal.SIGKILL)
    for process in below:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _signal_group(group: int, number: int) -> bool:
    """Send a signal (0: none) to a process group. Returns whether it still has a process."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def start(
    launch: Launch, *, environ: Mapping[str, str], grace_seconds: float = DEFAULT_GRACE_SECONDS
) -> Ended:
    """Run a launch to its end, and return how it ended; see ``supervise``."""
    environment = {**environ, **launch.environment}
    hosts = {place.rank: place.host for place in launch.ranks}
    if not launch.remote:
        return supervise(
            launch.command, environment=environment, hosts=hosts, grace_seconds=grace_seconds
        )
    with tempfile.TemporaryDirectory(prefix="s2s-scale-") as folder:
        file = Path(folder, "environment")

        def share(variables: Mapping[str, str]) -> None:
            """Write what DeepSpeed's launcher exports on every host: the user's, then ours."""
            files = (Path("~/.deepspeed_env").expanduser(), Path(".deepspeed_env"))
            lines = [line for f in files if f.is_file() for line in f.read_text().splitlines()]
            ours = {**launch.environment, **variables}
            lines += [f"{name}={value}" for name, value in ours.items()]
            file.write_text("\n".join([*lines, ""]), encoding="utf-8")

        return supervise(
            launch.command,
            environment={**environment, DEEPSPEED_ENVIRONMENT: str(file)},
            hosts=hosts,
            address=_address_towards(launch.hosts[0]),
            grace_seconds=grace_seconds,
            share=share,
        )


def _address_towards(host: str) -> str:
    """The address of this host on the route to another one; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:
            return socket.gethostname()
        return str(probe.getsockname()[0])


@dataclass(frozen=True)
class Command:
    """What is started: the arguments with their command, the launch options, the settings."""

    argv: tuple[str, ...]
    options: LaunchOptions
    values: Mapping[str, Any]

    @property
    def by_tokens(self) -> bool:
        """Whether the size of a step does not depend on the number of processes."""
        return self.values.get("batching") == "tokens" or "tokens_per_step" in self.values


Plan = Callable[[tuple[str, ...], LaunchOptions], Launch]


def run_with_restarts(
    launch: Launch,
    command: Command,
    *,
    plan: Plan,
    start: Callable[[Launch], Ended],
    fault_seconds: float,
) -> int:
    """Start the run, and again after each fault as often as ``--max_restarts`` allows.

    A fault is a rank that was killed, hung or lost its network, not one that ended with an error.
    ``plan`` makes a launch of arguments and options, as it did for the first one.

    Returns the exit code.

    Raises:
        UserError: fewer processes are left than the run may have.
    """
    run_id = secrets.token_hex(8)
    most = command.options.max_restarts or 0
    for number in range(most + 1):
        environment = {**launch.environment, RUN_VARIABLE: run_id}
        ended = start(dataclasses.replace(launch, environment=environment))
        if number == most or not ended.is_fault:
            return ended.code
        print(
            f"note: ended with exit code {ended.code}; started again from the newest checkpoint "
            f"({number + 1} of --max_restarts {most})",
            file=sys.stderr,
        )
        launch = _plan_again(launch, command, plan=plan, fault_seconds=fault_seconds)
    raise AssertionError("the last start returns")


def _plan_again(before: Launch, command: Command, *, plan: Plan, fault_seconds: float) -> Launch:
    """The launch after ``before``: the same, or with the hosts and devices that are left."""
    options, least = command.options, command.options.min_processes
    if before.remote:
        limit = fault_seconds if least is None else min(REDUCED_SECONDS, fault_seconds)
        deadline = time.monotonic() + limit
        while len(left := reachable_hosts(before.hosts)) < len(before.hosts):
            if time.monotonic() >= deadline:
                options = _only_hosts(left, before, options)
                break
            time.sleep(CHECK_SECONDS)
    launch = plan(command.argv, options)
    wanted, available = len(before.ranks), len(launch.ranks)
    if available >= wanted:
        return launch
    if least is None or available < least:
        raise UserError(
            f"{available} of {wanted} processes are left; expected {least or wanted} or more; "
            "repair the lost ones, or allow fewer with --min_processes"
        )
    return plan(_with_same_step(command, wanted, available), options)


def _only_hosts(hosts: Sequence[str], before: Launch, options: LaunchOptions) -> LaunchOptions:
    """The options for these hosts alone, each with the slots that it had."""
    if not hosts:
        raise UserError(f"none of {', '.join(before.hosts)} answers over ssh any more")
    gone = [host for host in before.hosts if host not in hosts]
    print(f"note: continuing without {', '.join(gone)}, which does not answer", file=sys.stderr)
    slots = {host: [r.slot for r in before.ranks if r.host == host] for host in hosts}
    return dataclasses.replace(
        options,
        include="@".join(f"{host}:{','.join(names)}" for host, names in slots.items()),
        exclude=None,
        num_nodes=None,
        num_processes=None,
        master_addr=None,
    )


def _with_same_step(command: Command, before: int, now: int) -> tuple[str, ...]:
    """The arguments with a batch size and accumulation that keep the rows of a step."""
    if command.by_tokens:
        return command.argv
    rows, accumulation = (
        int(command.values.get(name) or default) for name, default in STEP_FLAGS.items()
    )
    total = rows * accumulation * before
    divided = divide_step(total, now, rows)
    if divided is None:
        raise UserError(
            f"{total} rows of a step cannot be divided among {now} processes; expected a multiple "
            f"of {now}; change --per_device_train_batch_size"
        )
    flags = [w for name, n in zip(STEP_FLAGS, divided, strict=True) for w in (f"--{name}", str(n))]
    return (*without_flags(command.argv, set(STEP_FLAGS)), *flags)


def divide_step(rows: int, processes: int, most: int) -> tuple[int, int] | None:
    """(rows of a micro-batch, micro-batches) that make ``rows`` a step on so many processes.

    The largest micro-batch of at most ``most`` rows; None if there is none.
    """
    own, rest = divmod(rows, processes)
    if rest:
        return None
    return next((size, own // size) for size in range(min(most, own), 0, -1) if own % size == 0)
