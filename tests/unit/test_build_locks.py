"""Locks that killed processes left on compiled extensions."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from s2s_scale.backends.build_locks import (
    ABANDONED_SECONDS,
    extensions_folder,
    remove_abandoned_locks,
)


def lock_in(folder, name, *, age):
    path = folder / "py311_cpu" / name / "lock"
    path.parent.mkdir(parents=True)
    path.write_text("")
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_only_old_locks_that_nobody_has_open_are_removed(tmp_path, caplog):
    old = lock_in(tmp_path, "old", age=2 * ABANDONED_SECONDS)
    fresh = lock_in(tmp_path, "fresh", age=0)
    held = lock_in(tmp_path, "held", age=2 * ABANDONED_SECONDS)
    with held.open() as stream:
        process = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[stream.fileno()]
        )
    try:
        assert remove_abandoned_locks(tmp_path) == [old]
    finally:
        process.communicate(b"")
    assert not old.exists() and fresh.exists() and held.exists()
    assert "left by a process that was killed" in caplog.text
    assert remove_abandoned_locks(tmp_path / "nothing") == []


def test_the_folder_is_torchs(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert extensions_folder() == tmp_path
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    assert extensions_folder().name == "torch_extensions"
