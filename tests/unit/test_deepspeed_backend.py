"""DeepSpeed compiles its ops with one and the same ninja, whatever the shell's PATH."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from s2s_scale.backends.deepspeed import backend, patches


def test_the_ninja_beside_this_python_comes_first_and_once(tmp_path, monkeypatch):
    pytest.importorskip("ninja", reason="ninja is not installed (extra: backend)")
    other = tmp_path / "ninja"
    other.write_text("#!/bin/sh\n", encoding="utf-8")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin")
    assert shutil.which("ninja") == str(other)
    for _ in range(2):
        backend._own_tools_first()
    beside = Path(sys.executable).parent
    assert os.environ["PATH"].split(os.pathsep) == [str(beside), str(tmp_path), "/usr/bin"]
    assert shutil.which("ninja") == str(beside / "ninja")


def test_numactl_is_started_once(monkeypatch):
    numa = pytest.importorskip("deepspeed.utils.numa", reason="DeepSpeed is not installed")
    started = []
    monkeypatch.setattr(numa, "get_numa_cores", lambda: started.append(1) or [])
    for _ in range(3):
        patches.run_numactl_once()
        assert numa.get_numa_cores() == []
    assert len(started) == 1
