"""How a rank tells the process that started the run what went wrong, or that it is done.

The process that starts a run opens a ``Hub`` (see ``hub``) and puts its address and key into every
rank's environment. ``report_failure`` and ``report_done`` open a connection for one report, so they
work in any process, at any moment of its life.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum

from s2s_scale.errors import EXIT_FAULT, EXIT_USER_ERROR, UserError
from s2s_scale.resilience.messages import Message, MessageClient

HUB_ADDRESS = "S2S_SCALE_HUB"
"""Environment variable: ``host:port`` of the process that started the run."""
HUB_KEY = "S2S_SCALE_HUB_KEY"
"""Environment variable: the run's key, which only its ranks know. Never printed."""
RUN_VARIABLE = "S2S_SCALE_RUN"
"""Environment variable: identifies the checkpoints of one command, however often it restarts."""

ANSWER_SECONDS = 5.0


class FailureSource(IntEnum):
    """Where a report comes from, the nearest to the cause first.

    Of several failures the one with the lowest value is shown, and of equals the earliest: when a
    rank dies, the others lose contact with it and fail too, often before anybody has seen why the
    first one died.
    """

    REPORTED = 0  # the rank itself
    SIGNAL = 1  # its launcher saw a signal end it
    WATCHDOG = 2  # its heartbeats stopped, or it made no progress
    SECONDARY = 3  # an error that says only that another rank went away
    EXIT_CODE = 4  # its launcher saw it end with an exit code


@dataclass(frozen=True)
class Failure:
    """What is wrong with ``rank``; ``code`` is the exit code of the run."""

    rank: int
    host: str
    problems: tuple[str, ...]
    code: int = 1
    source: FailureSource = FailureSource.REPORTED

    @property
    def lines(self) -> list[str]:
        """One line per problem, with rank and host first."""
        return [f"rank {self.rank} on {self.host}: {problem}" for problem in self.problems]


def report_failure(
    problems: Sequence[str],
    *,
    rank: int,
    host: str | None = None,
    code: int = 1,
    source: FailureSource = FailureSource.REPORTED,
) -> bool:
    """Tell the process that started the run what is wrong with ``rank``.

    ``host``: that of ``rank``, if it is not this one. Returns whether the report was received.
    """
    failure = Failure(rank, host or socket.gethostname(), tuple(problems), code, source)
    return _send({"kind": "failure", **asdict(failure)})


def report_error(error: BaseException, *, rank: int) -> bool:
    """Tell the process that started the run of an exception, as ``report_failure``."""
    lost = lost_contact(error)
    return report_failure(
        problems_of(error),
        rank=rank,
        code=EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAULT if lost else 1,
        source=FailureSource.SECONDARY if lost else FailureSource.REPORTED,
    )


def report_done(*, rank: int, code: int = 0) -> bool:
    """Tell the process that started the run that ``rank`` has ended in an orderly way."""
    return _send({"kind": "done", "rank": rank, "code": code})


def problems_of(error: BaseException) -> tuple[str, ...]:
    """A user's mistakes line by line, any other exception as one line with its name."""
    if isinstance(error, UserError):
        return error.problems
    text = " ".join(str(error).split())
    return (f"{type(error).__name__}: {text}" if text else type(error).__name__,)


_LOST = ("closed by peer", "connection reset", "gloo/transport", "broken pipe", "nccl", "timed out")


def lost_contact(error: BaseException) -> bool:
    """Whether an exception says only that another rank no longer answers."""
    text = f"{type(error).__name__}: {error}".lower()
    known = isinstance(error, RuntimeError) and any(sign in text for sign in _LOST)
    return known or type(error).__name__ in ("DistBackendError", "DistNetworkError")


def hub_address() -> tuple[str, int, str] | None:
    """Host, port and key of the hub of the process that started the run; None without one."""
    address, key = os.environ.get(HUB_ADDRESS), os.environ.get(HUB_KEY)
    if not address or not key:
        return None
    host, _, port = address.rpartition(":")
    return host, int(port), key


def _send(message: Message) -> bool:
    """Send one report and wait until it is received. Says on standard error if it cannot be."""
    address = hub_address()
    if address is None:
        return False
    try:
        client = MessageClient(*address)
        try:
            client.send(message)
            if client.receive(ANSWER_SECONDS) is not None:
                return True
            reason = f"no answer within {ANSWER_SECONDS:g} s"
        finally:
            client.close()
    except OSError as error:
        reason = str(error)
    host, port, _ = address
    print(
        f"{host}:{port}, where this run was started, cannot be reached: {reason}", file=sys.stderr
    )
    return False
