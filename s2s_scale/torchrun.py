"""torchrun without its own report of a failure: ``python -m s2s_scale.torchrun``, torchrun's flags.

torchrun ends with a traceback of its own when a rank fails, whatever the rank said, and with exit
code 1. Here the exit code is that of the rank that failed first, and the rank's own words stand.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from s2s_scale.launch import report_failure


def main(arguments: Sequence[str]) -> int:
    """Start the ranks, wait for them, and return the exit code of the first that failed, or 0."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(parse_args(list(arguments)))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = int(failure.exitcode)
        ended = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
        report_failure([f"ended by {ended}; what it printed is above"], rank=rank)
        return code if code > 0 else 128 - code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
