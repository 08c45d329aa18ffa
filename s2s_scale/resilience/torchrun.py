"""torchrun without its own report of a failure, run by ``python -m s2s_scale.resilience.torchrun``.

torchrun prints a traceback of its own when a rank fails, whatever the rank said, and exits with 1.
Here the exit code is that of the rank that failed first, and the rank's own message stands.
Requests to stop are left to the ranks, which the process that started the run passes them on to:
torchrun would end the ranks after 30 seconds.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from s2s_scale.errors import EXIT_RESUME
from s2s_scale.resilience.compat import keep_from_torchrun
from s2s_scale.resilience.preemption import SIGNALS
from s2s_scale.resilience.reports import FailureSource, report_failure


def main(arguments: Sequence[str]) -> int:
    """Start the ranks, wait for them, and return the exit code of the first that failed, or 0."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    options = parse_args(list(arguments))
    if hasattr(options, "signals_to_handle"):
        options.signals_to_handle = "SIGHUP,SIGQUIT"
        for number in (signal.SIGTERM, signal.SIGINT):
            # Not SIG_IGN, which the ranks would inherit.
            signal.signal(number, lambda number, frame: None)
    else:
        keep_from_torchrun(SIGNALS)
    try:
        run(options)
    except ChildFailedError as error:
        for rank, failure in error.failures.items():
            _report(rank, int(failure.exitcode))
        return _exit_code(int(error.get_first_failure()[1].exitcode))
    return 0


def _report(rank: int, code: int) -> None:
    """Report how a rank ended. A signal is news; a rank that exits has said more itself.

    SIGTERM is no news: with it torchrun ends the other ranks when one has failed.
    """
    if code == EXIT_RESUME:
        return
    ended = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
    news = code < 0 and code != -signal.SIGTERM
    report_failure(
        [f"ended by {ended}; its output is above"],
        rank=rank,
        code=_exit_code(code),
        source=FailureSource.SIGNAL if news else FailureSource.EXIT_CODE,
    )


def _exit_code(code: int) -> int:
    return code if code > 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
