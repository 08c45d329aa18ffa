"""Processes of ``s2s-scale``, and of any module, as forks of one that has imported everything.

A fresh process imports torch, transformers and the rest for six seconds; a fork starts at once. The
forks are ordinary processes, with variables, a log and a process group of their own, to be killed
like any other.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import gc
import importlib.util
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.variables import free_port, rank_variables

LIMIT_SECONDS = 120
PRELOADED = (
    "s2s_scale.runner.train",
    "s2s_scale.runner.generate",
    "s2s_scale.launch.launchers",
    "s2s_scale.resilience.supervisor",
    "s2s_scale.settings.build",
    "s2s_scale.backends.base",
    "torch.distributed",
    "transformers.models.t5.modeling_t5",
    "transformers.models.t5.tokenization_t5",
    "transformers.generation.utils",
    "matplotlib.figure",
    "sacrebleu",
    "rouge_score.rouge_scorer",
    "datasets",
    "accelerate",
)
#: Loaded where they are installed.
OPTIONAL = ("deepspeed", "fairscale.optim.oss", "torch_xla")


@dataclass
class Rank:
    """A running process: its number, where it writes, and who knows how it ended."""

    pid: int
    log: Path
    server: ForkServer

    @property
    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def poll(self) -> int | None:
        """The exit code, as ``subprocess`` says it; None while the process runs."""
        return self.server.code(self)

    def send_signal(self, number: int) -> None:
        """Send a signal, if the process is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


class ForkServer:
    """The process that forks; a context."""

    def __init__(self) -> None:
        self._codes: dict[int, int] = {}
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> ForkServer:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forkserver"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",  # it outlives the test that starts it, and that test's folder
            env={**os.environ, "OMP_NUM_THREADS": "1", "USE_TORCH_XLA": "0"},
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.close()
        self._process.kill()  # its ranks have been waited for
        self._process.wait(30)

    def start(
        self,
        words: Sequence[object],
        *,
        ranks: int,
        folder: Path,
        environment: Mapping[str, str] | None = None,
    ) -> list[Rank]:
        """``s2s-scale WORDS`` on so many ranks, as a launcher starts them; one rank is alone."""
        port, started = free_port(), []
        folder.mkdir(parents=True, exist_ok=True)
        for rank in range(ranks):
            variables = {"OMP_NUM_THREADS": "1", **(environment or {})}
            if ranks > 1:
                variables |= rank_variables(rank, ranks, port)
            log = folder / f"rank-{rank}.log"
            environment_now = {**os.environ, **variables}
            started.append(self.fork("s2s_scale", words, log=log, environment=environment_now))
        return started

    def fork(
        self, module: str, words: Sequence[object], *, log: Path, environment: Mapping[str, str]
    ) -> Rank:
        """``python -m MODULE WORDS`` with exactly these variables; it prints into ``log``."""
        order = {
            "module": module,
            "words": list(map(str, words)),
            "environment": dict(environment),
            "log": str(log.resolve()),
            "folder": os.getcwd(),
        }
        return Rank(self._ask(order)["pid"], log, self)

    def code(self, rank: Rank) -> int | None:
        """How the rank ended, as ``subprocess`` says it; None while it runs."""
        ended = self._ask({})["ended"]
        self._codes |= {int(pid): code for pid, code in ended.items()}
        return self._codes.get(rank.pid)

    def wait(self, ranks: Sequence[Rank], *, limit: float = LIMIT_SECONDS) -> list[int]:
        """Wait for all ranks.

        Raises:
            AssertionError: some ran longer than ``limit`` seconds; all are killed.
        """
        deadline = time.monotonic() + limit
        while None in (codes := [self.code(rank) for rank in ranks]):
            if time.monotonic() > deadline:
                for rank in ranks:
                    rank.send_signal(signal.SIGKILL)
                texts = "\n".join(rank.text for rank in ranks)
                raise AssertionError(f"{codes} after {limit:g} s:\n{texts}")
            time.sleep(0.02)
        return [code for code in codes if code is not None]

    def run(self, words: Sequence[object], *, ranks: int, folder: Path, **more: Any) -> list[str]:
        """Start and wait; what each rank printed. All must end well."""
        started = self.start(words, ranks=ranks, folder=folder, **more)
        codes = self.wait(started)
        texts = [rank.text for rank in started]
        assert codes == [0] * ranks, "\n".join(map(str, [codes, *texts]))
        return texts

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        answer: dict[str, Any] = json.loads(process.stdout.readline())
        return answer


@functools.cache
def shared() -> ForkServer:
    """One server for all tests of this process; it ends with it."""
    server = ForkServer().__enter__()
    atexit.register(server.__exit__)
    return server


def main() -> None:
    """Answer orders until there are no more; in a fork, run what was ordered."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Loaded lazily by our own code: here once for all.
    for name in PRELOADED:
        importlib.import_module(name)
    for name in OPTIONAL:
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # DeepSpeed collects garbage often: not among all that was imported
    for line in sys.stdin:
        order = json.loads(line)
        if not order:
            _answer({"ended": _ended()})
            continue
        pid = os.fork()
        if pid == 0:
            _begin(order)
            code = _run(order["module"], order["words"])
            # What a process does at its end, without taking all it has imported to pieces.
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            os._exit(code)
        _answer({"pid": pid})


def _run(module: str, words: Sequence[str]) -> int:
    """The module as ``python -m`` runs it; its exit code."""
    from tests.support import moments

    moments.install()
    sys.argv = [module, *words]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter does at its end
        traceback.print_exc()
        return 1
    return 0


def _answer(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _ended() -> dict[int, int]:
    found = {}
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            found[pid] = os.waitstatus_to_exitcode(status)
    return found


def _begin(order: dict[str, Any]) -> None:
    """Become the process that was ordered: folder, variables, log, process group."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    null = os.open(os.devnull, os.O_RDONLY)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for target, source in ((0, null), (1, log), (2, log)):
        os.dup2(source, target)
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    if os.environ.get("PYTHONFAULTHANDLER"):
        faulthandler.enable()


if __name__ == "__main__":
    main()
