"""Starts a run again after a fault: the same command, with the processes that are left."""

from __future__ import annotations

import dataclasses
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from s2s_scale.errors import UserError
from s2s_scale.launch.hosts import answering
from s2s_scale.launch.spec import Launch, Wishes, without_flags
from s2s_scale.reports import EXIT_FAULT, RUN_VARIABLE
from s2s_scale.supervision import Ended

LOOK_SECONDS = 2.0
PATIENCE_SECONDS = 30.0
"""How long a host may take to answer again where the run may go on without it."""
STEP_FLAGS = ("per_device_train_batch_size", "gradient_accumulation_steps")
STEP_DEFAULTS = (8, 1)


@dataclass(frozen=True)
class Command:
    """What is started: the words with their verb, the wishes for hosts, the settings' values."""

    words: tuple[str, ...]
    wishes: Wishes
    values: Mapping[str, Any]

    @property
    def by_tokens(self) -> bool:
        """Whether a step's size depends on no number of processes."""
        return self.values.get("batching") == "tokens" or "tokens_per_step" in self.values


def run_to_its_end(
    launch: Launch,
    command: Command,
    *,
    plan: Callable[[tuple[str, ...], Wishes], Launch],
    start: Callable[[Launch], Ended],
    fault_seconds: float,
) -> int:
    """Start the run, again after each fault as often as ``--max_restarts`` allows; its exit code.

    A fault is a rank that was killed, hung or lost its network, not one that ended with an error.
    ``plan`` makes a launch of words and wishes, as for the first one.

    Raises:
        UserError: fewer processes are left than the run may have.
    """
    mark = secrets.token_hex(8)
    most = command.wishes.max_restarts or 0
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
    plan: Callable[[tuple[str, ...], Wishes], Launch],
    fault_seconds: float,
) -> Launch:
    """The launch after ``before``: the same, or with the hosts and devices that are left."""
    wishes, least = command.wishes, command.wishes.min_processes
    if before.remote:
        patience = fault_seconds if least is None else min(PATIENCE_SECONDS, fault_seconds)
        left = _wait_for(before.hosts, patience)
        if len(left) < len(before.hosts):
            wishes = _only(left, before, wishes)
    launch = plan(command.words, wishes)
    wanted, there = len(before.ranks), len(launch.ranks)
    if there >= wanted:
        return launch
    if least is None or there < least:
        raise UserError(
            f"{there} of {wanted} processes are left; expected {least or wanted} or more; mend "
            "what is gone, or allow fewer with --min_processes"
        )
    return plan(_same_step(command, wanted, there), wishes)


def _wait_for(hosts: Sequence[str], seconds: float) -> list[str]:
    """The hosts that answer; all of them, unless that takes longer than ``seconds``."""
    deadline = time.monotonic() + seconds
    while len(left := answering(hosts)) < len(hosts) and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
    return left


def _only(hosts: Sequence[str], before: Launch, wishes: Wishes) -> Wishes:
    """The wishes for these hosts alone, each with the slots that it had."""
    if not hosts:
        raise UserError(f"none of {', '.join(before.hosts)} answers over ssh any more")
    gone = [host for host in before.hosts if host not in hosts]
    print(f"note: without {', '.join(gone)}, which does not answer", file=sys.stderr)
    slots = {host: [r.slot for r in before.ranks if r.host == host] for host in hosts}
    include = "@".join(f"{host}:{','.join(names)}" for host, names in slots.items())
    return dataclasses.replace(
        wishes, include=include, exclude=None, num_nodes=None, num_processes=None, master_addr=None
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
