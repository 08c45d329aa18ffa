"""The shell scripts pass arguments on unharmed, and say what is missing in one line."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CPU = ROOT / "launchers" / "cpu.sh"
MAKE_VENV = ROOT / "constraints" / "make_venv.sh"


def run(script, *words, path, **environment):
    # the fakes come first; bash and the core utilities are where the system has them
    return subprocess.run(
        ["bash", script, *words],
        env={"PATH": f"{path}:/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def fake(folder, name, body):
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({"THREADS": "3"}, "3"),
        ({"OMP_NUM_THREADS": "5"}, "5"),
        ({}, str(len(os.sched_getaffinity(0)))),
    ],
)
def test_cpu_launcher_hands_every_word_on(tmp_path, environment, threads):
    fake(tmp_path, "s2s-scale", 'echo "$OMP_NUM_THREADS"; printf "%s\\n" "$@"; exit 7')
    done = run(CPU, "my conf.yaml", "--source_prefix", "a 'b' $c: ", path=tmp_path, **environment)
    assert done.stdout.split("\n")[:-1] == [
        threads,
        "train",
        "--profile",
        "cpu",
        "my conf.yaml",
        "--source_prefix",
        "a 'b' $c: ",
    ]
    assert done.returncode == 7


def test_cpu_launcher_without_words_shows_its_use(tmp_path):
    done = run(CPU, path=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")


def test_cpu_launcher_says_that_the_command_is_missing(tmp_path):
    done = run(CPU, "conf.yaml", path=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no 's2s-scale' on PATH")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (None, "error: no 'somepython' on PATH; expected Python 3.10 to 3.13"),
        ("echo 3.9", "error: 'somepython' is Python 3.9; expected 3.10 to 3.13"),
        ("echo 3.14", "error: 'somepython' is Python 3.14; expected 3.10 to 3.13"),
        (
            'case "$2" in *ensurepip*) exit 1;; *) echo 3.12;; esac',
            "error: 'somepython' has no venv module",
        ),
    ],
)
def test_environment_is_refused_with_the_reason(tmp_path, body, message):
    if body is not None:
        fake(tmp_path, "somepython", body)
    done = run(MAKE_VENV, "somepython", str(tmp_path / "venv"), path=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(("version", "noted"), [("3.11", False), ("3.13", True)])
def test_environment_is_made_with_the_python_that_was_named(tmp_path, version, noted):
    fake(tmp_path, "somepython", f'if [ "$1" = -m ]; then echo "$@"; else echo {version}; fi')
    done = run(MAKE_VENV, "somepython", "a folder", path=tmp_path)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "-m venv a folder"
    assert ("note: the pins were made for Python 3.11" in done.stderr) == noted
