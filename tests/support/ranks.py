"""Ranks on this machine: processes with variables, a log and a process group of their own.

Unless an interpreter is given, they are forks of one process, multiprocessing's fork server, that
has imported everything. They are signalled and killed like any other process.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.support.variables import free_port, rank_variables

LIMIT_SECONDS = 120.0
END_SECONDS = 10.0
"""How long a rank may take to print where it stands, once its time is over."""
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.support.preloaded"])
_LOCK = threading.Lock()
"""To start a process is to poll all others, and only one thread may read how a process ended."""


@dataclass(frozen=True)
class Rank:
    """A process that was started, and the file that it prints into."""

    process: BaseProcess | subprocess.Popen[bytes]
    log: Path

    @property
    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def poll(self) -> int | None:
        """The exit code, -N after signal N; None while the process runs."""
        if isinstance(self.process, subprocess.Popen):
            return self.process.poll()
        with _LOCK:
            return self.process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal, if the process is still there."""
        if self.poll() is None and self.process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)


def start(
    module: str,
    words: Sequence[object],
    *,
    ranks: int,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    python: str | None = None,
    launched: bool = True,
) -> list[Rank]:
    """``python -m MODULE WORDS`` once per rank; each has a log and a group of its own.

    Rank N prints into ``rank-N.log`` in ``folder``. ``environment``: variables beside those of this
    process. ``python``: an interpreter that is started anew for each rank, instead of a fork.
    ``launched``: whether ranks get the variables that a launcher sets.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port, started = free_port(), []
    for rank in range(ranks):
        log = folder / f"rank-{rank}.log"
        variables = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",  # so that a rank that hangs says where
            **(environment or {}),
            **(rank_variables(rank, ranks, port) if launched else {}),
        }
        if python is not None:
            with log.open("wb") as out:
                process: BaseProcess | subprocess.Popen[bytes] = subprocess.Popen(
                    [python, "-m", module, *map(str, words)],
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=variables,
                    start_new_session=True,
                )
        else:
            order = (module, list(map(str, words)), os.getcwd(), variables, log.resolve())
            process = _FORKS.Process(target=_become, args=order)
            with _LOCK:
                process.start()
        started.append(Rank(process, log))
        atexit.register(started[-1].send_signal, signal.SIGKILL)  # else the end waits for it
    return started


def start_command(
    words: Sequence[object],
    *,
    ranks: int,
    folder: Path,
    environment: Mapping[str, str] | None = None,
) -> list[Rank]:
    """``s2s-scale WORDS`` on so many ranks, as a launcher starts them; one rank is alone."""
    return start(
        "s2s_scale",
        words,
        ranks=ranks,
        folder=folder,
        environment=environment,
        launched=ranks > 1,
    )


def wait(
    ranks: Sequence[Rank], *, limit: float = LIMIT_SECONDS, grace: float | None = None
) -> list[int]:
    """Wait for all ranks; their exit codes.

    ``grace``: how many seconds the others have left once a rank has failed, as under a launcher.

    Raises:
        AssertionError: some ran longer; all are ended, and the message holds what each had printed,
            and where those that hung stood.
    """
    deadline = time.monotonic() + limit
    while None in (codes := [rank.poll() for rank in ranks]):
        if grace is not None and any(codes):
            deadline = min(deadline, time.monotonic() + grace)
        if time.monotonic() > deadline:
            hung = [number for number, code in enumerate(codes) if code is None]
            _end(ranks)
            texts = "\n".join(rank.text for rank in ranks)
            raise AssertionError(
                f"ranks {hung} of {codes} did not end within {limit:g} s:\n{texts}"
            )
        time.sleep(0.02)
    return [code for code in codes if code is not None]


def _end(ranks: Sequence[Rank]) -> None:
    for number in (signal.SIGABRT, signal.SIGKILL):
        for rank in ranks:
            rank.send_signal(number)
        deadline = time.monotonic() + END_SECONDS
        while None in [rank.poll() for rank in ranks] and time.monotonic() < deadline:
            time.sleep(0.02)


def run_command(
    words: Sequence[object],
    *,
    ranks: int,
    folder: Path,
    environment: Mapping[str, str] | None = None,
) -> list[str]:
    """``start_command`` and wait; what each rank printed. All must end well."""
    started = start_command(words, ranks=ranks, folder=folder, environment=environment)
    codes = wait(started, grace=END_SECONDS)
    texts = [rank.text for rank in started]
    assert codes == [0] * ranks, "\n".join(map(str, [codes, *texts]))
    return texts


def _become(
    module: str, words: list[str], folder: str, environment: dict[str, str], log: Path
) -> None:
    """In a fork: become ``python -m MODULE WORDS`` with exactly these variables."""
    from tests.support import moments

    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(out)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if os.environ.get("PYTHONFAULTHANDLER"):
        faulthandler.enable()
    moments.install()
    sys.argv = [module, *words]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        # What an interpreter does at its end, and a fork of the standard library's does not.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
