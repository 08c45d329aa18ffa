"""The command line ``s2s-scale``. Imports neither torch nor transformers before work begins."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from s2s_scale import __version__
from s2s_scale.errors import EXIT_RESUME, EXIT_USER_ERROR, UserError, did_you_mean
from s2s_scale.launch.spec import reporting_rank, set_rank_env
from s2s_scale.resilience.preemption import Stopped
from s2s_scale.settings.commands import all_commands

HELP_FLAGS = ("-h", "--help")
VERSIONS_SHOWN = ("torch", "transformers", "datasets")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``s2s-scale`` with these arguments (default: the process's own). Returns the exit code.

    0: done; 2: the user gave something wrong, printed line by line; 85: asked to stop, and to be
    started again; 130: interrupted; 141: what read the output went away. An error in the program
    itself keeps its traceback.
    """
    set_rank_env(os.environ)
    argv = list(sys.argv[1:] if argv is None else argv)
    if "RANK" in os.environ and argv and argv[0].startswith("--local_rank="):
        argv = argv[1:]  # from DeepSpeed's launcher; the environment says the same
    try:
        code = _dispatch(argv)
        sys.stdout.flush()  # here, so that a closed pipe is met inside this try
        _report_done(code)
        return code
    except UserError as error:
        rank = os.environ.get("RANK", "")
        if rank.isdigit():
            from s2s_scale.resilience.reports import report_error

            # The process that started this rank prints the problems, once for all ranks.
            if report_error(error, rank=int(rank)):
                return EXIT_USER_ERROR
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return EXIT_USER_ERROR
    except Stopped as stop:
        if os.environ.get("RANK", "0") == "0":
            print(stop, file=sys.stderr)
        _report_done(EXIT_RESUME)
        return EXIT_RESUME
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Python flushes stdout once more at exit: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _report_done(code: int) -> None:
    """Report, as a rank, an orderly end: 0, or interrupted."""
    rank = reporting_rank(os.environ)
    if rank is not None:
        from s2s_scale.resilience.reports import report_done

        report_done(rank=rank, code=code)


def _dispatch(argv: list[str]) -> int:
    """Print help or version, or run the command that ``argv`` begins with."""
    if not argv or argv[0] in HELP_FLAGS:
        from s2s_scale.cli.help import overview

        print(overview(), end="", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else EXIT_USER_ERROR
    if argv[0] == "--version":
        print(version_line())
        return 0
    table = all_commands()
    command = table.get(argv[0], table.get(argv[0].replace("_", "-")))
    if command is None:
        expected = f"expected one of: {', '.join(table)}"
        if argv[0].startswith("-"):
            raise UserError(f"'{argv[0]}' comes before the command; {expected}")
        near = did_you_mean(argv[0], table)
        raise UserError(f"unknown command '{argv[0]}'{near}; {expected}")
    if any(word in HELP_FLAGS for word in argv[1:]):
        from s2s_scale.cli.help import command_help

        print(command_help(command), end="")
        return 0
    from s2s_scale.cli.commands import run

    return run(command, argv)


def version_line() -> str:
    """``s2s-scale 0.1.0 (Python 3.11.4, torch 2.13.0, …)``, read from the installed packages."""
    from s2s_scale.utils import package_versions

    python = ".".join(str(part) for part in sys.version_info[:3])
    built_on = (f"{name} {number}" for name, number in package_versions(VERSIONS_SHOWN).items())
    return f"s2s-scale {__version__} (Python {python}, {', '.join(built_on)})"
