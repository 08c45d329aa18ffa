"""The shell scripts pass arguments on unharmed, and say what is missing in one line."""

from __future__ import annotations

import os
import shutil
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


DEEPSPEED = ROOT / "launchers" / "deepspeed.sh"
SLURM = ROOT / "launchers" / "slurm.sbatch"


def test_deepspeed_launcher_hands_every_word_on(tmp_path):
    fake(tmp_path, "s2s-scale", 'printf "%s\\n" "$@"; exit 7')
    done = run(DEEPSPEED, "my hosts", "conf.yaml", "--source_prefix", "a $b: ", path=tmp_path)
    words = ["train", "conf.yaml", "--source_prefix", "a $b: "]
    assert done.stdout.splitlines() == [*words, "--profile", "gpu-zero2", "--hostfile", "my hosts"]
    assert done.returncode == 7
    done = run(DEEPSPEED, "hosts", "conf.yaml", path=tmp_path, PROFILE="gpu-zero3")
    assert "gpu-zero3" in done.stdout.splitlines()


@pytest.mark.parametrize("words", [(), ("hosts",)])
def test_deepspeed_launcher_shows_its_use(tmp_path, words):
    done = run(DEEPSPEED, *words, path=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("usage: ")


def slurm(tmp_path, *words, **more):
    """The batch script under a made-up Slurm with two hosts; srun runs both tasks in turn."""
    shown = "printf 'node-a\\nnode-b\\n'"
    fake(tmp_path, "scontrol", f'[[ $1 == requeue ]] && echo "requeue $2" || {shown}')
    fake(
        tmp_path,
        "srun",
        'shift; for n in 0 1; do SLURM_NODEID=$n "$@" || exit $?; done',
    )
    fake(tmp_path, "s2s-scale", 'printf "<%s> " "$@"; echo; cat "$WORK"/hosts-*; ${FAIL:-true}')
    environment = {
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_JOB_ID": "41234",
        "SLURM_GPUS_ON_NODE": "4",
        "WORK": str(tmp_path),
        **more,
    }
    return subprocess.run(
        ["bash", SLURM, *words],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_slurm_starts_one_task_per_host(tmp_path):
    done = slurm(tmp_path, "my conf.yaml", "--source_prefix", "a 'b' $c: ")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    hosts = ["node-a slots=4", "node-b slots=4"]
    assert lines[1:3] == hosts and lines[4:6] == hosts
    for number, line in enumerate((lines[0], lines[3])):
        assert line == (
            "<train> <my conf.yaml> <--source_prefix> <a 'b' $c: > "
            "<--resume_from_checkpoint> <auto> <--profile> <gpu-zero2> "
            f"<--hostfile> <{tmp_path}/hosts-41234> <--node_rank> <{number}> "
            "<--master_addr> <node-a> <--master_port> <21234> "
        )
    assert not list(tmp_path.glob("hosts-*"))


def test_slurm_passes_a_failure_on(tmp_path):
    assert slurm(tmp_path, "conf.yaml", FAIL="exit 2").returncode == 2


def test_slurm_puts_a_job_that_was_stopped_back_into_the_queue(tmp_path):
    done = slurm(tmp_path, "conf.yaml", FAIL="exit 85")
    assert done.returncode == 85
    assert done.stdout.splitlines()[-1] == "requeue 41234"
    assert "requeue" not in slurm(tmp_path, "conf.yaml", FAIL="exit 75").stdout


def test_slurm_leaves_the_users_own_checkpoint_alone(tmp_path):
    done = slurm(tmp_path, "conf.yaml", "--resume_from_checkpoint", "latest")
    assert "<auto>" not in done.stdout and "<latest>" in done.stdout


def test_slurm_outside_a_job_shows_its_use(tmp_path):
    done = run(SLURM, "conf.yaml", path=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("usage: sbatch ")


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck (Debian) is not installed")
def test_shellcheck_has_nothing_to_say():
    scripts = [*ROOT.glob("launchers/*.s*"), *ROOT.glob("constraints/*.sh"), ROOT / ".ci" / "run"]
    assert len(scripts) >= 5
    done = subprocess.run(
        ["shellcheck", *scripts], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout
