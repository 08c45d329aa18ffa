"""Locks on compiled extensions: one process at a time, and none left by one that was killed."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time

import pytest
from torch.utils import cpp_extension, file_baton

from s2s_scale.backends.deepspeed.patches import (
    ABANDONED_SECONDS,
    OURS,
    BuildLock,
    abandoned,
    use_own_locks,
)

HOLD = """
import sys, time
from s2s_scale.backends.deepspeed.patches import BuildLock
lock = BuildLock(sys.argv[1])
lock.try_acquire()
print("held", flush=True)
sys.stdin.read()
lock.release()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock until its standard input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_one_process_at_a_time(tmp_path, holder):
    path = tmp_path / "lock"
    assert not file_baton.FileBaton(str(path)).try_acquire(), "torch's own lock is excluded too"
    waiting = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert not select.select([waiting.stdout], [], [], 1)[0], "it waits"
    holder.communicate("", timeout=30)
    assert waiting.stdout.readline() == "held\n"
    waiting.communicate("", timeout=30)
    assert not path.exists()


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path, holder, caplog):
    path = tmp_path / "lock"
    holder.send_signal(signal.SIGKILL)
    holder.wait(30)
    assert path.read_text() == OURS
    lock = BuildLock(str(path))
    assert lock.try_acquire()
    assert f"{path}: left by a process that was killed" in caplog.text
    lock.release()
    assert not path.exists()


def test_of_torchs_own_only_an_old_one_that_nobody_has_open_is_abandoned(tmp_path):
    path = tmp_path / "lock"
    assert not abandoned(path)
    path.write_text("")
    assert not abandoned(path)
    long_ago = time.time() - 2 * ABANDONED_SECONDS
    os.utime(path, (long_ago, long_ago))
    assert abandoned(path)
    with path.open() as stream:
        process = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[stream.fileno()]
        )
    try:
        assert not abandoned(path)
    finally:
        process.communicate(b"")


def test_torch_compiles_under_it(monkeypatch):
    monkeypatch.setattr(cpp_extension, "FileBaton", file_baton.FileBaton)
    use_own_locks()
    assert cpp_extension.FileBaton is BuildLock
