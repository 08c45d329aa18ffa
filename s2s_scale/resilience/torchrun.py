"""torchrun without its own report of a failure, run by ``python -m s2s_scale.resilience.torchrun``.

torchrun ends with a traceback of its own when a rank fails, whatever the rank said, and with exit
code 1. Here the exit code is that of the rank that failed first, and the rank's own words stand.
A request to stop is left to the ranks, which the process that started the run tells of it: torchrun
would end them after 30 seconds.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from s2s_scale.resilience.preemption import EXIT_RESUME, SIGNALS
from s2s_scale.resilience.reports import FailureSource, report_failure


def main(arguments: Sequence[str]) -> int:
    """Start the ranks, wait for them, and return the exit code of the first that failed, or 0."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    _leave_requests_to_ranks()
    try:
        run(parse_args(list(arguments)))
    except ChildFailedError as error:
        for rank, failure in error.failures.items():
            _report(rank, int(failure.exitcode))
        code = int(error.get_first_failure()[1].exitcode)
        return _exit_code(code)
    return 0


def _leave_requests_to_ranks() -> None:
    """torchrun sets its own handler when it starts the ranks; SIGHUP and SIGQUIT still go there."""
    ending: Any = api._terminate_process_handler

    def handler(number: int, frame: FrameType | None) -> None:
        if number not in SIGNALS:
            ending(number, frame)

    module: Any = api
    module._terminate_process_handler = handler


def _report(rank: int, code: int) -> None:
    """Say how a rank ended. A signal is news; a rank that exits has said more itself.

    SIGTERM is none: with it torchrun ends the other ranks when one has failed.
    """
    if code == EXIT_RESUME:
        return
    ended = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
    news = code < 0 and code != -signal.SIGTERM
    report_failure(
        [f"ended by {ended}; what it printed is above"],
        rank=rank,
        code=_exit_code(code),
        certainty=FailureSource.SEEN if news else FailureSource.ENDED,
    )


def _exit_code(code: int) -> int:
    return code if code > 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
