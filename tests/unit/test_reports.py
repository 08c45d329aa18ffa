"""What ranks tell the process that started them, and what it makes of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from s2s_scale.errors import EXIT_RESUME, UserError
from s2s_scale.resilience import messages, supervisor
from s2s_scale.resilience.hub import Hub
from s2s_scale.resilience.messages import MessageClient
from s2s_scale.resilience.preemption import SAME_REQUEST_SECONDS
from s2s_scale.resilience.reports import (
    HUB_KEY,
    FailureSource,
    lost_contact,
    report_done,
    report_error,
    report_failure,
)
from s2s_scale.resilience.supervisor import supervise

HEAD = "import os, sys, time, signal; from s2s_scale.resilience.reports import *; "


@pytest.fixture
def hub(monkeypatch):
    with Hub() as opened:
        for name, value in opened.environment.items():
            monkeypatch.setenv(name, value)
        yield opened


def test_the_failure_nearest_to_the_cause_is_shown_however_late_it_comes(hub):
    assert hub.first_failure() is None and hub.failed_at is None
    assert report_error(RuntimeError("Connection closed by peer [::1]:1"), rank=0)
    assert report_failure(["no heartbeat"], rank=1, host="b", source=FailureSource.WATCHDOG)
    assert report_failure(["signal SIGKILL"], rank=1, code=137, source=FailureSource.SIGNAL)
    assert hub.first_failure().code == 137
    assert report_error(UserError("a.txt:3: empty", "b.txt:1: empty"), rank=2)
    assert report_error(ValueError("later"), rank=3)
    first = hub.first_failure()
    where = f"rank 2 on {socket.gethostname()}"
    assert first.lines == [f"{where}: a.txt:3: empty", f"{where}: b.txt:1: empty"]
    assert first.code == 2 and hub.failed_at <= time.monotonic()


def test_done_ranks(hub):
    assert report_done(rank=1) and report_done(rank=0, code=130)
    assert hub.done_ranks == {1: 0, 0: 130}


def test_a_stranger_is_not_listened_to(hub, monkeypatch, capsys):
    monkeypatch.setenv(HUB_KEY, "guess")
    monkeypatch.setattr(messages, "ATTEMPTS", 1)
    assert not report_failure(["x"], rank=0)
    error = capsys.readouterr().err
    assert "cannot be reached" in error and "guess" not in error
    assert hub.first_failure() is None


MALFORMED = (
    {},
    {"kind": "unknown"},
    {"kind": "done", "rank": "x", "code": 0},
    {"kind": "done", "rank": float("inf"), "code": 0},
    {"kind": "failure", "rank": 1},
    {"kind": "failure", "rank": 1, "host": "a", "problems": 3, "code": 1, "source": 0},
    {"kind": "failure", "rank": 1, "host": "a", "problems": [], "code": 1, "source": 99},
    {"kind": "heartbeat", "progress": 1},
    {"kind": "join", "rank": 0, "hosts": 3},
    {"kind": "join", "rank": 2, "hosts": ["a", "b"], "hang_seconds": 0, "silence_seconds": 9},
    {"kind": ["join"]},
)


@pytest.mark.parametrize("message", MALFORMED, ids=str)
def test_malformed_reports_are_skipped(hub, message):
    client = MessageClient(*hub.location)
    client.send(message)
    client.send({"kind": "done", "rank": 0, "code": 0})
    assert client.receive(10) == {"kind": "received"}
    client.close()
    assert report_done(rank=1)
    assert hub.done_ranks == {0: 0, 1: 0} and hub.first_failure() is None


def test_without_anybody_listening_the_rank_speaks_for_itself():
    assert not report_failure(["x"], rank=0) and not report_done(rank=0)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
        (RuntimeError("NCCL communicator was aborted"), True),
        (RuntimeError("size mismatch"), False),
        (UserError("the file timed out"), False),
    ],
)
def test_errors_that_only_say_that_another_rank_is_gone(error, lost):
    assert lost_contact(error) is lost


def run(program, ranks=2, **more):
    hosts = {rank: f"host-{rank}" for rank in range(ranks)}
    command = (sys.executable, "-c", HEAD + program)
    return supervise(command, environment=os.environ, hosts=hosts, **more).code


def test_a_launcher_that_exits_with_0_is_not_believed(capfd):
    assert run("report_done(rank=0)") == 1
    err = capfd.readouterr().err
    assert err == "error: rank 1 on host-1: ended without saying that it was done\n"
    assert run("report_done(rank=0); report_done(rank=1)") == 0
    assert capfd.readouterr().err == ""


def test_a_failure_counts_whatever_the_launcher_says(capfd):
    assert run("report_failure(['x'], rank=1, host='b', code=3)") == 3
    assert capfd.readouterr().err == "error: rank 1 on b: x\n"


def test_a_failure_counts_although_its_launcher_has_then_asked_the_others_to_stop(capfd):
    program = "report_failure(['a.txt:3: empty'], rank=1, code=2); report_done(rank=0, code=85)"
    assert run(f"{program}; sys.exit(2)") == 2
    assert "a.txt:3: empty" in capfd.readouterr().err


def test_a_rank_that_lost_contact_with_one_that_was_asked_to_stop_is_no_failure():
    program = (
        "report_done(rank=0, code=85); "
        "report_failure(['closed'], rank=1, source=FailureSource.SECONDARY); sys.exit(85)"
    )
    assert run(program) == EXIT_RESUME


def test_an_interrupted_rank_is_not_success():
    assert run("report_done(rank=0, code=130); report_done(rank=1)") == 130


def test_a_launcher_that_goes_on_after_a_failure_is_ended(monkeypatch, capfd):
    monkeypatch.setattr(supervisor, "ORDERLY_SECONDS", 0.5)
    monkeypatch.setattr(supervisor, "TERMINATION_SECONDS", 0.5)
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']"
    program = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); import subprocess; "
        f"child = {child}, start_new_session=True); print(child.pid, flush=True); "
        "report_failure(['x'], rank=1); time.sleep(60)"
    )
    began = time.monotonic()
    assert run(program) == 1
    assert time.monotonic() - began < 15
    pid = int(capfd.readouterr().out)
    time.sleep(0.2)
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    assert state.stdout.strip() == "" or state.stdout.startswith("Z")


SETTLES = """
from s2s_scale.resilience.preemption import handle_preemption
with handle_preemption(60) as guard:
    guard.at_boundaries = True
    os.kill(os.getppid(), signal.{name})
    while guard.reason is None:
        time.sleep(0.01)
    open({file!r}, "w").write(guard.reason)
    time.sleep({more})
    report_done(rank=0, code=85)
    sys.exit(85)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_is_handed_to_the_ranks_and_they_end_by_themselves(name, tmp_path):
    file = tmp_path / "reason"
    assert run(SETTLES.format(name=name, file=str(file), more=0)) == EXIT_RESUME
    assert file.read_text(encoding="utf-8") == name


def test_a_second_signal_ends_everything(tmp_path):
    program = SETTLES.format(name="SIGTERM", file=str(tmp_path / "reason"), more=60)
    again = threading.Timer(SAME_REQUEST_SECONDS + 3, os.kill, (os.getpid(), signal.SIGTERM))
    again.start()
    began = time.monotonic()
    assert run(program) == 128 + signal.SIGTERM
    assert time.monotonic() - began < SAME_REQUEST_SECONDS + 10


def test_ranks_that_do_not_end_are_ended_when_their_grace_is_over(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "STOPPING_SECONDS", 1.0)
    program = SETTLES.format(name="SIGTERM", file=str(tmp_path / "reason"), more=60)
    assert run(program, grace_seconds=1.0) == EXIT_RESUME
