"""After which ends a run is started again, and with what."""

from __future__ import annotations

import dataclasses
import os
import sys

import pytest

from s2s_scale.errors import UserError
from s2s_scale.launch.launchers import plan_launch
from s2s_scale.launch.spec import Launch, LaunchOptions, Rank
from s2s_scale.resilience import supervisor
from s2s_scale.resilience.reports import RUN_VARIABLE
from s2s_scale.resilience.supervisor import (
    Command,
    Ended,
    divide_step,
    run_with_restarts,
    start,
)
from s2s_scale.settings.profiles import resolve

WORDS = ("train", "--per_device_train_batch_size=4", "--data_dir", "d")


def launch_on(*hosts, words=WORDS, remote=True):
    ranks = tuple(Rank(n, host, "cpu", str(n % 2)) for n, host in enumerate(hosts))
    return Launch(command=words, environment={}, ranks=ranks, in_process=False, remote=remote)


class Story:
    """Ends of a run one after the other, and what was started for each."""

    def __init__(self, *ends, hosts=("a", "a", "b", "b")):
        self.ends = list(ends)
        self.hosts = hosts
        self.started = []

    def plan(self, words, options):
        if options.include:
            hosts = [p.split(":")[0] for p in options.include.split("@") for _ in range(2)]
        else:
            hosts = self.hosts
        return launch_on(*hosts, words=words)

    def start(self, launch):
        self.started.append(launch)
        return self.ends.pop(0)

    def run(self, *, values=None, **options):
        command = Command(
            WORDS, LaunchOptions(**options), values or {"per_device_train_batch_size": 4}
        )
        return run_with_restarts(
            launch_on(*self.hosts), command, plan=self.plan, start=self.start, fault_seconds=0.1
        )


@pytest.fixture(autouse=True)
def all_answer(monkeypatch):
    monkeypatch.setattr(supervisor, "reachable_hosts", list)
    monkeypatch.setattr(supervisor, "CHECK_SECONDS", 0.01)


FAULT, KILLED, DONE = Ended(75), Ended(137), Ended(0)


@pytest.mark.parametrize("ended", [DONE, Ended(1), Ended(2), Ended(85), Ended(137, asked=True)])
def test_ends_that_are_no_fault(ended):
    assert not ended.is_fault
    story = Story(ended)
    assert story.run(max_restarts=3) == ended.code and len(story.started) == 1


def test_a_run_is_started_again_after_each_fault_under_one_mark(capsys):
    story = Story(FAULT, KILLED, DONE)
    assert story.run(max_restarts=2) == 0
    assert len({launch.environment[RUN_VARIABLE] for launch in story.started}) == 1
    assert [launch.command for launch in story.started] == [WORDS] * 3
    assert "(2 of --max_restarts 2)" in capsys.readouterr().err


def test_the_last_fault_is_the_end():
    story = Story(FAULT, FAULT)
    assert story.run(max_restarts=1) == 75 and len(story.started) == 2
    assert Story(FAULT).run() == 75


def test_a_host_that_is_gone_is_left_out_and_steps_keep_their_rows(monkeypatch, capsys):
    monkeypatch.setattr(supervisor, "reachable_hosts", lambda hosts: [h for h in hosts if h == "a"])
    story = Story(FAULT, DONE)
    assert story.run(max_restarts=1, min_processes=2) == 0
    assert [rank.host for rank in story.started[1].ranks] == ["a", "a"]
    assert story.started[1].command == (
        *("train", "--data_dir", "d"),
        *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"),
    )
    assert "without b, which does not answer" in capsys.readouterr().err


def test_tokens_need_no_other_step():
    story = Story(FAULT, DONE, hosts=("a", "a", "b", "b"))
    values = {"batching": "tokens"}
    assert story.run(max_restarts=1, values=values) == 0


def test_fewer_than_allowed_end_the_run(monkeypatch):
    monkeypatch.setattr(supervisor, "reachable_hosts", lambda hosts: [h for h in hosts if h == "a"])
    with pytest.raises(UserError, match="2 of 4 processes are left; expected 4 or more"):
        Story(FAULT, DONE).run(max_restarts=1)
    with pytest.raises(UserError, match="2 of 4 processes are left; expected 3 or more"):
        Story(FAULT, DONE).run(max_restarts=1, min_processes=3)


@pytest.mark.parametrize(
    ("rows", "processes", "most", "found"),
    [
        (32, 2, 8, (8, 2)),
        (48, 3, 12, (8, 2)),
        (48, 3, 16, (16, 1)),
        (32, 3, 8, None),
        (2, 2, 8, (1, 1)),
    ],
)
def test_rows_of_a_step_on_fewer_processes(rows, processes, most, found):
    assert divide_step(rows, processes, most) == found


DIES_ONCE = """
import os, pathlib, signal, sys
from s2s_scale.launch.spec import reporting_rank
from s2s_scale.resilience.reports import report_done
marks = pathlib.Path(sys.argv[1])
marks.write_text(marks.read_text() + os.environ["S2S_SCALE_RUN"] + "\\n")
if len(marks.read_text().split()) == 1:
    os.kill(os.getpid(), signal.SIGKILL)
report_done(rank=reporting_rank(os.environ))
"""


def test_a_run_of_one_process_that_is_killed_starts_again(tmp_path, capfd):
    """The launch is that of ``--profile cpu``; what it starts is a small program."""
    marks, options = tmp_path / "marks", LaunchOptions(max_restarts=2)
    marks.touch()

    def plan(words, options):
        planned = plan_launch(resolve("cpu"), words, environ={}, options=options)
        program = (sys.executable, "-c", DIES_ONCE, str(marks))
        return dataclasses.replace(planned, command=program)

    def begin(launch):
        return start(launch, environ=os.environ)

    first = plan(("train",), options)
    command = Command(("train",), options, {})
    assert run_with_restarts(first, command, plan=plan, start=begin, fault_seconds=1.0) == 0
    one, other = marks.read_text().split()
    assert one == other, "both belong to the same command"
    error = capfd.readouterr().err
    assert "ended with exit code 137; started again from the newest checkpoint (1 of" in error
    assert "without saying" not in error


def test_a_process_that_may_be_started_again_is_not_this_one():
    def planned(*, profile="cpu", verb="train", environ=None, **options):
        words = (verb, "--x")
        return plan_launch(
            resolve(profile),
            words,
            environ=environ or {},
            options=LaunchOptions(**options),
        )

    assert planned().in_process and planned(max_restarts=0).in_process
    apart = planned(max_restarts=1)
    assert not apart.in_process
    assert planned(max_restarts=1, environ=apart.environment).in_process
    for values in ({"verb": "generate"}, {"profile": "tpu-vm"}):
        with pytest.raises(UserError, match="--max_restarts: has no effect with profile"):
            planned(max_restarts=1, **values)
