"""Runs ``s2s-scale`` as a user does, and says what a refusal must look like.

``run_command`` starts a process; ``Here`` calls the same entry point in the test's own process,
which spares the seconds that importing torch takes. What both return reads the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from s2s_scale import cli
from tests.support.processes import descendants

COMMAND = (sys.executable, "-m", "s2s_scale")
LIMIT_S = 180


class Outcome(NamedTuple):
    """How a command ended: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The problems that were reported, without the ``error: `` before each."""
        prefix = "error: "
        return [line[len(prefix) :] for line in self.err.splitlines() if line.startswith(prefix)]


def start_command(*words: object, before: tuple[str, ...] = (), **options: Any) -> subprocess.Popen:
    """Start ``s2s-scale`` with ``words`` in a process group of its own.

    ``before`` stands in front of the command, such as ``("unshare", "-m")``.
    """
    return subprocess.Popen(
        [*before, *COMMAND, *map(str, words)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def finish(process: subprocess.Popen, *, limit_s: float = LIMIT_S) -> Outcome:
    """Wait for a started command; past the limit, end it and all that it started, and fail."""
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        for pid in (process.pid, *descendants(process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"{shlex.join(process.args)} ran past {limit_s} s\n{out}\n{err}")
    return Outcome(process.returncode, out, err)


def run_command(
    *words: object,
    limit_s: float = LIMIT_S,
    environ: Mapping[str, str] | None = None,
    preexec_fn: Callable[[], None] | None = None,
    cwd: Path | None = None,
) -> Outcome:
    """Run ``s2s-scale`` to its end; ``environ`` is added to the test's own environment."""
    process = start_command(
        *words, env={**os.environ, **(environ or {})}, preexec_fn=preexec_fn, cwd=cwd
    )
    return finish(process, limit_s=limit_s)


class Here:
    """Calls the command line in this process, as ``here("train", "--max_steps", 1)``."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: object) -> Outcome:
        self._capsys.readouterr()
        code = cli.main([str(word) for word in words])
        captured = self._capsys.readouterr()
        return Outcome(code, captured.out, captured.err)


def refused(outcome: Outcome, *parts: str) -> None:
    """Check a refusal: exit code 2, no traceback, one error line that holds all ``parts``."""
    assert outcome.code == 2, f"exit code {outcome.code}\n{outcome.out}\n{outcome.err}"
    assert "Traceback" not in outcome.out + outcome.err
    assert outcome.errors, f"no error line in:\n{outcome.err}"
    best = max(outcome.errors, key=lambda line: sum(part in line for part in parts))
    missing = [part for part in parts if part not in best]
    assert not missing, f"no line says {missing}; the nearest:\n{best}\nall:\n{outcome.err}"


def snapshot(folder: Path) -> dict[str, str]:
    """Every path below ``folder`` with a digest of its content, to compare before and after."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        content = path.read_bytes() if path.is_file() else b""
        found[name] = hashlib.sha256(content).hexdigest() if path.is_file() else "folder"
    return found
