"""How a profile and a command line become a command, an environment and a map of ranks."""

from __future__ import annotations

import sys
from pathlib import Path

from s2s_scale import profiles
from s2s_scale.launch import LAUNCHERS, describe, plan_launch
from s2s_scale.profiles import LauncherProfile


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
