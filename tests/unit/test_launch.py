"""How a profile and a command line become a command, an environment and a map of ranks."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from s2s_scale.errors import UserError
from s2s_scale.launch.launchers import LAUNCHERS, plan_launch
from s2s_scale.launch.spec import Launch, LaunchOptions, describe
from s2s_scale.resilience.supervisor import start
from s2s_scale.settings import profiles
from s2s_scale.settings.profiles import LauncherProfile


def profile(**values) -> LauncherProfile:
    return LauncherProfile(name="mine", path=Path("mine.yaml"), **values)


def test_every_launcher_that_a_profile_may_name_is_in_the_table():
    assert set(LAUNCHERS) == set(profiles.LAUNCHERS)


def test_no_launcher_runs_here_with_the_profiles_environment():
    launch = plan_launch(profile(environment={"A": "1"}), ["train", "c.yaml"], environ={})
    assert launch.in_process
    assert launch.command == (sys.executable, "-m", "s2s_scale", "train", "c.yaml")
    assert launch.environment == {"A": "1"}
    assert [(place.rank, place.device) for place in launch.ranks] == [(0, "cpu")]


def test_one_cuda_device_is_visible_of_those_allowed():
    def visible(**environ):
        launch = plan_launch(profile(device="cuda"), ["train"], environ=environ)
        return launch.environment["CUDA_VISIBLE_DEVICES"], launch.ranks[0].device

    assert visible() == ("0", "cuda:0")
    assert visible(CUDA_VISIBLE_DEVICES="3,1") == ("3", "cuda:3")


def test_description_says_what_replaces_a_variable_of_the_shell():
    launch = plan_launch(
        profile(environment={"A": "1", "B": "x y"}), ["train", "--a=b c"], environ={}
    )
    text = describe(launch, environ={"A": "2", "B": "x y"})
    assert "train '--a=b c'" in text
    assert "A=1   (replaces '2' of the shell)\n" in text
    assert "B='x y'\n" in text
    assert "rank 0:" in text


def test_description_without_environment():
    launch = plan_launch(profile(), ["train"], environ={})
    assert "nothing is changed" in describe(launch, environ={})


def ranks_of(launch):
    return [(place.rank, place.device) for place in launch.ranks]


def test_torchrun_starts_the_profiles_number_of_processes_unless_told_otherwise():
    ddp = profile(launcher="torchrun", processes=2)
    launch = plan_launch(ddp, ["train", "c.yaml"], environ={"OMP_NUM_THREADS": "3"})
    assert not launch.in_process
    assert launch.command[-5:] == ("--nproc-per-node=2", "-m", "s2s_scale", "train", "c.yaml")
    assert "OMP_NUM_THREADS" not in launch.environment
    assert ranks_of(launch) == [(0, "cpu"), (1, "cpu")]
    four = plan_launch(ddp, ["train"], environ={}, options=LaunchOptions(num_processes=4))
    assert "--nproc-per-node=4" in four.command and len(four.ranks) == 4


def test_cores_are_divided_among_the_ranks(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    ddp = profile(launcher="torchrun", processes=3)
    assert plan_launch(ddp, ["train"], environ={}).environment["OMP_NUM_THREADS"] == "2"


def test_a_rank_per_visible_gpu_and_no_more():
    ddp = profile(launcher="torchrun", device="cuda")
    environ = {"CUDA_VISIBLE_DEVICES": "2,5"}
    launch = plan_launch(ddp, ["train"], environ=environ)
    assert ranks_of(launch) == [(0, "cuda:2"), (1, "cuda:5")]
    with pytest.raises(UserError, match="3 processes, but 2 CUDA device"):
        plan_launch(ddp, ["train"], environ=environ, options=LaunchOptions(num_processes=3))


def test_gpus_are_counted_by_the_drivers_folder(monkeypatch, tmp_path):
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / "gpus" / name).mkdir(parents=True)
    monkeypatch.setattr(profiles, "NVIDIA_GPUS", tmp_path / "gpus")
    assert profiles.cuda_devices({}) == ["0", "1"]
    assert profiles.cuda_devices({"CUDA_VISIBLE_DEVICES": ""}) == []


def test_a_process_started_by_a_launcher_is_a_rank_and_keeps_its_devices():
    environ = {"RANK": "3", "LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "0,1"}
    for launcher in ("none", "torchrun"):
        launch = plan_launch(profile(launcher=launcher, device="cuda"), ["train"], environ=environ)
        assert launch.in_process and launch.environment == {}
        assert ranks_of(launch) == [(3, "cuda:1")]


def test_one_process_profiles_refuse_a_number_of_processes():
    with pytest.raises(UserError, match="--num_processes 2"):
        plan_launch(profile(), ["train"], environ={}, options=LaunchOptions(num_processes=2))


def test_the_first_failure_is_printed_once_and_the_exit_code_kept(capfd):
    program = (
        "import sys; from s2s_scale.resilience.reports import report_failure; "
        "assert report_failure(['a.txt:3: empty line'], rank=1, code=2); "
        "assert report_failure(['later words'], rank=1); sys.exit(2)"
    )
    launch = Launch(
        command=(sys.executable, "-c", program), environment={}, ranks=(), in_process=False
    )
    assert start(launch, environ=os.environ).code == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: rank 1 on ")
    assert lines[0].endswith(": a.txt:3: empty line")


def test_a_signal_becomes_an_exit_code():
    program = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    launch = Launch(
        command=(sys.executable, "-c", program), environment={}, ranks=(), in_process=False
    )
    assert start(launch, environ=os.environ).code == 128 + 15
