"""torchrun leaves requests to stop to its ranks, and has the exit code of the first that failed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from s2s_scale.resilience.hub import Hub

RANK = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "as a rank expects them"
(folder / ("ready-" + os.environ["RANK"])).touch()
while not (folder / "end").exists():
    time.sleep(0.05)
code = (folder / "end").read_text()
if os.environ["RANK"] == "1" and code == "KILL":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(code) if os.environ["RANK"] == "1" and code != "KILL" else 0)
"""
WAYS = {
    "the installed torch's": "",
    "without --signals-to-handle": "torchrun.hasattr = lambda *_: False; ",
}


@pytest.fixture
def start(tmp_path):
    (tmp_path / "rank.py").write_text(RANK, encoding="utf-8")
    processes = []

    def started(way="", **environment):
        program = f"import sys; from s2s_scale.resilience import torchrun; {way}"
        program += "sys.exit(torchrun.main(sys.argv[1:]))"
        words = ("--standalone", "--nproc-per-node=2", str(tmp_path / "rank.py"), str(tmp_path))
        process = subprocess.Popen(
            [sys.executable, "-c", program, *words], env={**os.environ, **environment}
        )
        processes.append(process)
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("ready-*"))) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        return process

    yield started
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize("way", WAYS)
def test_requests_to_stop_are_left_to_the_ranks(start, tmp_path, way):
    process = start(WAYS[way])
    for number in (signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
        time.sleep(0.5)
        assert process.poll() is None
    (tmp_path / "end").write_text("0", encoding="utf-8")
    assert process.wait(30) == 0


@pytest.mark.parametrize("way", WAYS)
def test_a_closed_terminal_ends_the_ranks(start, way):
    process = start(WAYS[way])
    process.send_signal(signal.SIGHUP)
    assert process.wait(30) != 0


@pytest.mark.parametrize(
    ("end", "code", "problem"),
    [
        ("7", 7, "ended by exit code 7; its output is above"),
        ("KILL", 137, "ended by signal SIGKILL; its output is above"),
    ],
)
def test_the_code_and_the_report_of_the_first_rank_that_failed(start, tmp_path, end, code, problem):
    with Hub() as hub:
        process = start(**hub.environment)
        (tmp_path / "end").write_text(end, encoding="utf-8")
        assert process.wait(30) == code
        failure = hub.first_failure()
    assert failure.rank == 1 and failure.code == code and failure.problems == (problem,)
