"""What a process makes of signals: raised before training, noted afterwards, forced at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from s2s_scale.errors import EXIT_RESUME
from s2s_scale.resilience import preemption
from s2s_scale.resilience.preemption import SIGNALS, Stopped, handle_preemption


def wait_for_reason(guard):
    deadline = time.monotonic() + 10
    while guard.reason is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return guard.reason


@pytest.mark.parametrize("number", SIGNALS)
def test_before_training_a_request_is_raised(number):
    before = [signal.getsignal(n) for n in SIGNALS]
    signal.signal(number, signal.SIG_DFL)

    def work():
        with handle_preemption(60):
            os.kill(os.getpid(), number)
            time.sleep(10)

    try:
        with pytest.raises(Stopped, match=f"stopped by {number.name}, with nothing to save"):
            work()
    finally:
        for n, handler in zip(SIGNALS, before, strict=True):
            signal.signal(n, handler)


def test_in_training_it_is_noted_and_signals_that_follow_at_once_are_the_same():
    with handle_preemption(60) as guard:
        guard.at_boundaries = True
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert wait_for_reason(guard) == "SIGTERM"
        time.sleep(0.2)
        assert guard.reason == "SIGTERM"


def test_signals_are_given_back():
    before = [signal.getsignal(n) for n in SIGNALS]
    with handle_preemption(60), handle_preemption(60) as inner:
        assert inner is preemption.active()
    assert [signal.getsignal(n) for n in SIGNALS] == before and preemption.active() is None


def test_a_background_job_is_not_meant_by_ctrl_c():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with handle_preemption(60) as guard:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            assert guard.reason is None
    finally:
        signal.signal(signal.SIGINT, before)


HEAD = """
import os, signal, sys, time
from s2s_scale.resilience.preemption import handle_preemption
"""


def run(program, limit=30):
    return subprocess.run(
        [sys.executable, "-c", HEAD + program], capture_output=True, text=True, timeout=limit
    )


def test_a_main_thread_that_cannot_listen_is_ended_when_its_grace_is_over():
    """It swallows what the handler does, as a long compilation would."""
    program = """
with handle_preemption(1.0) as guard:
    guard.at_boundaries = True
    os.kill(os.getpid(), signal.SIGTERM)
    end = time.monotonic() + 20
    while time.monotonic() < end:
        time.sleep(0.1)
"""
    done = run(program)
    assert done.returncode == EXIT_RESUME
    assert "within 1 s (--grace_seconds)" in done.stderr


def test_a_second_signal_ends_at_once():
    program = """
import s2s_scale.resilience.preemption as preemption
preemption.SAME_REQUEST_SECONDS = 0.2
with handle_preemption(60) as guard:
    guard.at_boundaries = True
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(20)
"""
    done = run(program)
    assert done.returncode == 128 + signal.SIGTERM
    assert "asked to stop a second time (SIGTERM)" in done.stderr


def test_workers_of_a_loader_live_until_their_parent_has_stopped():
    program = """
with handle_preemption(60) as guard:
    guard.at_boundaries = True
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(1)
    time.sleep(0.2)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        os.kill(child, number)
    time.sleep(0.3)
    assert os.waitpid(child, os.WNOHANG) == (0, 0), "ended too early"
    assert guard.reason is None, "a child's signal is not the parent's"
    guard.mark_saved()
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
"""
    done = run(program)
    assert done.returncode == 0, done.stderr
