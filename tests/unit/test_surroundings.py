"""Tests see nothing of the checkout's contents, and nothing of their caller's own settings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.surroundings import ROOT, surroundings

OWN = Path("/own")


@pytest.mark.parametrize("turn", ["first", "second"])
def test_each_test_starts_in_an_empty_folder_outside_the_checkout(turn):
    here = Path.cwd()
    assert not here.is_relative_to(ROOT)
    assert list(here.iterdir()) == []
    Path("runs").mkdir()
    Path("runs", turn).touch()


@pytest.mark.parametrize("turn", ["first", "second"])
def test_each_test_starts_from_the_same_variables(turn):
    assert "S2S_SCALE_LEFT" not in os.environ
    assert Path.home().is_dir() and Path.home() == Path(os.environ["HOME"])
    os.environ["S2S_SCALE_LEFT"] = turn
    os.environ["HOME"] = "/nowhere"


def test_a_caller_s_settings_are_left_out():
    theirs = {
        "CUDA_VISIBLE_DEVICES": "3",
        "HF_HOME": "/models",
        "HF_HUB_OFFLINE": "0",
        "HOME": "/home/somebody",
        "LC_ALL": "C.UTF-8",
        "PATH": "/usr/bin",
        "PYTHONPATH": "/theirs",
        "RANK": "1",
        "S2S_SCALE_CACHE": "/cache",
        "SLURM_PROCID": "0",
        "TMPDIR": "/scratch",
        "WANDB_PROJECT": "theirs",
        "XDG_CACHE_HOME": "/cache",
    }
    found = surroundings(theirs, own=OWN, caches=OWN)
    same = {name for name in theirs if found.get(name) == theirs[name]}
    assert same == {"LC_ALL", "PATH", "TMPDIR"}
    assert found["HOME"].startswith("/own/") and found["S2S_SCALE_CACHE"].startswith("/own/")
    assert found["PYTHONPATH"] == f"{ROOT}:/theirs"
    assert found["HF_HUB_OFFLINE"] == "1"
    gone = {name for name in theirs if name not in found}
    assert gone >= {"CUDA_VISIBLE_DEVICES", "HF_HOME", "RANK", "SLURM_PROCID", "XDG_CACHE_HOME"}


def test_commands_that_a_test_starts_find_the_package_and_the_tests():
    code = "import s2s_scale, tests.support; print(s2s_scale.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == ROOT / "s2s_scale" / "__init__.py"
