"""How a rank tells the process that started the run what went wrong, or that it is done.

The process that starts a run opens ``Reports`` and gives every rank ``Reports.environment``; a rank
calls ``report_failure`` and ``report_done``, which send one line each over TCP. A rank that stays
connected (see ``preemption``) is told when the run is asked to stop.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from types import TracebackType

from s2s_scale.errors import UserError
from s2s_scale.resilience.messages import LineClient, Message, MessageServer

REPORT_TO = "S2S_SCALE_REPORT_TO"
"""Environment variable: ``host:port`` of the process that started the run."""
REPORT_TOKEN = "S2S_SCALE_REPORT_TOKEN"
"""Environment variable: what a report must begin with."""
RUN_VARIABLE = "S2S_SCALE_RUN"
"""Environment variable: what marks the checkpoints of one command, however often it restarts."""

EXIT_USER_ERROR = 2
EXIT_FAULT = 75
"""Exit code where a rank was lost (sysexits' EX_TEMPFAIL: trying again may help)."""
ATTEMPTS = 3
ANSWER_SECONDS = 5.0


class FailureSource(IntEnum):
    """How near a report is to the cause. The nearest is shown, and of equals the earliest.

    When a rank dies, the others lose contact with it and fail too, often sooner than anybody has
    seen why the first one died.
    """

    REPORTED = 0  # the rank's own words
    SEEN = 1  # its launcher saw a signal end it
    WATCHDOG = 2  # the other ranks' watchdogs
    SECONDARY = 3  # an error that says only that another rank went away
    ENDED = 4  # its launcher saw it end with an exit code


@dataclass(frozen=True)
class Failure:
    """What is wrong with ``rank``; ``code`` is the exit code that the run ends with."""

    rank: int
    host: str
    problems: tuple[str, ...]
    code: int = 1
    certainty: FailureSource = FailureSource.REPORTED

    @property
    def lines(self) -> list[str]:
        """One line per problem, with rank and host first."""
        return [f"rank {self.rank} on {self.host}: {problem}" for problem in self.problems]


class Reports:
    """Listens for the ranks' reports; a context that ends when the run has ended.

    ``address`` is the name under which the ranks reach this host: ``127.0.0.1`` where all of them
    are on it, and then nobody else can connect.
    """

    def __init__(self, address: str = "127.0.0.1") -> None:
        self._address = address
        self._server = MessageServer(host=address, on_line=self._take, on_idle=self._tell)
        self._failures: list[Failure] = []
        self._done: dict[int, int] = {}
        self._stop: str | None = None
        self._told: set[int] = set()
        self._listening: set[int] = set()
        self.failed_at: float | None = None
        """When the first failure came, by ``time.monotonic``."""

    def __enter__(self) -> Reports:
        self._server.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.close()

    @property
    def environment(self) -> dict[str, str]:
        """What every rank, on every host, must find in its environment."""
        return {
            REPORT_TO: f"{self._address}:{self._server.port}",
            REPORT_TOKEN: self._server.token,
        }

    @property
    def done_ranks(self) -> dict[int, int]:
        """Rank -> exit code, of those that came to an orderly end."""
        return dict(self._done)

    def ask_to_stop(self, reason: str) -> None:
        """Tell every rank that stays connected, now or later; ``reason`` is such as 'SIGTERM'.

        Once more for each further reason: the ranks then end at once.
        """
        self._stop = reason
        self._told = set()

    def _tell(self) -> None:
        if self._stop is not None:
            for peer in self._listening - self._told:
                self._told.add(peer)
                self._server.answer(peer, {"stop": self._stop})

    def first_failure(self) -> Failure | None:
        """The failure nearest to the cause, or None where nothing has failed."""
        return min(self._failures, key=lambda failure: failure.certainty, default=None)

    def _take(self, peer: int, message: Message) -> None:
        try:
            if "listens" in message:
                self._listening.add(peer)
                self._told.discard(peer)
                self._tell()
                return
            if "done" in message:
                self._done[int(message["done"])] = int(message["code"])
            else:
                self._failures.append(_failure(message))
                self.failed_at = self.failed_at or time.monotonic()
        except (KeyError, TypeError, ValueError):
            return
        self._server.answer(peer, {"taken": True})


def _failure(message: Message) -> Failure:
    return Failure(
        rank=int(message["rank"]),
        host=str(message["host"]),
        problems=tuple(map(str, message["problems"])),
        code=int(message["code"]),
        certainty=FailureSource(message["certainty"]),
    )


def report_failure(
    problems: Sequence[str],
    *,
    rank: int,
    host: str | None = None,
    code: int = 1,
    certainty: FailureSource = FailureSource.REPORTED,
) -> bool:
    """Tell the process that started the run what is wrong with ``rank``; False if nobody listens.

    ``host``: that of ``rank``, if it is not this one.
    """
    where = host or socket.gethostname()
    failure = Failure(rank, where, tuple(problems), code, certainty)
    return _sent(asdict(failure))


def report_error(error: BaseException, *, rank: int) -> bool:
    """Tell the process that started the run of an exception; False if nobody listens."""
    lost = lost_contact(error)
    return report_failure(
        problems_of(error),
        rank=rank,
        code=EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAULT if lost else 1,
        certainty=FailureSource.SECONDARY if lost else FailureSource.REPORTED,
    )


def report_done(*, rank: int, code: int = 0) -> bool:
    """Tell the process that started the run that ``rank`` has come to an orderly end."""
    return _sent({"done": rank, "code": code})


def problems_of(error: BaseException) -> tuple[str, ...]:
    """A user's mistakes line by line, any other exception as one line with its name."""
    if isinstance(error, UserError):
        return error.problems
    text = " ".join(str(error).split())
    return (f"{type(error).__name__}: {text}" if text else type(error).__name__,)


_LOST = ("closed by peer", "connection reset", "gloo/transport", "broken pipe", "nccl", "timed out")


def lost_contact(error: BaseException) -> bool:
    """Whether an exception says only that another rank does not answer any more."""
    text = f"{type(error).__name__}: {error}".lower()
    known = isinstance(error, RuntimeError) and any(sign in text for sign in _LOST)
    return known or type(error).__name__ in ("DistBackendError", "DistNetworkError")


def starter_address() -> tuple[str, int, str] | None:
    """Host, port and token of the process that started the run; None where nobody listens."""
    address, token = os.environ.get(REPORT_TO), os.environ.get(REPORT_TOKEN)
    if not address or not token:
        return None
    host, _, port = address.rpartition(":")
    return host, int(port), token


def _sent(message: Message) -> bool:
    address = starter_address()
    if address is None:
        return False
    for attempt in range(ATTEMPTS):
        try:
            client = LineClient(*address)
            try:
                client.send(message)
                if client.receive(ANSWER_SECONDS):
                    return True
            finally:
                client.close()
        except OSError as error:
            reason = str(error)
        else:
            reason = "no answer"
        if attempt + 1 < ATTEMPTS:
            time.sleep(0.5)
    host, port, _ = address
    print(f"{host}:{port}, where this run was started, is out of reach: {reason}", file=sys.stderr)
    return False
