"""``--dry_run`` of every shipped profile, held against golden files.

After a change that is meant: ``RENEW_GOLDEN=1 pytest tests/unit/test_dry_run.py``, then read the
difference.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from pathlib import Path

import pytest

from s2s_scale.launch import spec
from s2s_scale.launch.launchers import plan_launch
from s2s_scale.launch.spec import LaunchOptions, describe
from s2s_scale.settings import profiles
from s2s_scale.settings.profiles import available, resolve

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "dry_run"
SHIPPED = sorted(path.stem for path in profiles.shipped_folder("launchers").rglob("*.yaml"))
WORDS = ("train", "--model", "my model", "--data_dir", "data", "--output_dir", "runs/first")
HOSTS = "worker-1 slots=2\nworker-2 slots=2\n"


@pytest.fixture
def machine(monkeypatch):
    """A machine with 8 cores and two GPUs, called ``here``."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    monkeypatch.setattr(spec, "cuda_devices", lambda environ: ["0", "1"])


def text_of(profile, words=WORDS, options=None):
    planned = plan_launch(resolve(profile), words, environ={}, options=options)
    text = describe(planned, environ={}).replace(sys.executable, "python")
    return re.sub(r"(--master_port) \d+", r"\1 PORT", text)


def check(name, text):
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("RENEW_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), f"no golden file for '{name}'; see the top of this file"
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profile(machine, name):
    assert len(SHIPPED) == len(set(SHIPPED)) >= 16
    check(name, text_of(name, ("train", "--profile", name, *WORDS[1:])))


def test_two_hosts(machine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("hosts").write_text(HOSTS, encoding="utf-8")
    for number, options in enumerate(
        (
            LaunchOptions(hostfile="hosts"),
            LaunchOptions(hostfile="hosts", num_nodes=1, num_processes=1),
            LaunchOptions(hostfile="hosts", include="worker-2:1", master_addr="10.0.0.2"),
            LaunchOptions(hostfile="hosts", launcher_runner="openmpi", master_port=2345),
        )
    ):
        check(f"two-hosts-{number}", text_of("gpu-zero2", options=options))


def test_one_of_two_torchrun_hosts(machine):
    options = LaunchOptions(num_nodes=2, node_rank=1, master_addr="worker-1", master_port=2345)
    check("torchrun-second-host", text_of("gpu-ddp", options=options))


def test_no_golden_file_is_left_over():
    others = {"two-hosts-0", "two-hosts-1", "two-hosts-2", "two-hosts-3", "torchrun-second-host"}
    assert {path.stem for path in GOLDEN.glob("*.txt")} == {*SHIPPED, *others}
    assert set(SHIPPED) == set(available())
