"""The health monitor with a clock of the test's own, and the watchdog's threads with a real one."""

from __future__ import annotations

import threading
import time

import pytest

from s2s_scale.resilience import health, hub, watchdog
from s2s_scale.resilience.health import HealthMonitor
from s2s_scale.resilience.hub import Hub
from s2s_scale.resilience.watchdog import Watchdog


def beat(progress, position="at training step (step 5)", *, paused=False, waiting=False):
    return {"progress": progress, "position": position, "paused": paused, "waiting": waiting}


class Story:
    """A monitor, and a clock that is moved by hand."""

    def __init__(self, ranks=2, hang_seconds=60.0):
        self.now = 1000.0
        hosts = [f"host-{rank}" for rank in range(ranks)]
        self.monitor = HealthMonitor(
            hosts, hang_seconds=hang_seconds, silence_seconds=20, now=self.now
        )

    def passes(self, seconds, **beats):
        """Let time pass; ``r0=beat(…)`` is what rank 0 says every two seconds meanwhile."""
        fault = None
        for step in range(round(seconds * 4)):
            self.now += 0.25
            for name, message in beats.items():
                if step % 8 == 0:
                    self.monitor.heartbeat(int(name[1:]), message, self.now)
            fault = self.monitor.check(self.now)
        return fault


def test_a_rank_without_a_heartbeat_is_lost_after_20_seconds():
    story = Story()
    assert story.passes(4, r0=beat(1), r1=beat(1)) is None
    assert story.passes(17, r0=beat(1)) is None
    fault = story.passes(4, r0=beat(1))
    assert str(fault) == "rank 1 on host-1: no heartbeat for 20 s"
    assert fault.positions[0] == "rank 0 on host-0: at training step (step 5)"


def test_a_done_rank_may_be_silent():
    story = Story()
    story.monitor.done(1)
    story.monitor.disconnected(1)
    assert story.passes(100, r0=beat(1)) is not None, "rank 0 alone hangs"
    story = Story(hang_seconds=0)
    story.monitor.done(1)
    assert story.passes(100, r0=beat(1)) is None


def test_a_closed_connection_is_a_dead_rank_at_once():
    story = Story()
    story.monitor.disconnected(1)
    assert "rank 1 on host-1: ended without reporting an error" in str(
        story.monitor.check(story.now)
    )


def test_the_first_fault_stays():
    story = Story(3)
    story.monitor.failed(2, "ValueError: x")
    story.monitor.disconnected(2)
    story.monitor.disconnected(1)
    fault = story.monitor.check(story.now)
    assert str(fault) == "rank 2 on host-2: ValueError: x" and fault.orderly


def test_a_hang_names_the_rank_with_the_fewest_marks():
    story = Story(3)
    ahead, behind = beat(9, waiting=True), beat(8, "at training step (step 4), in f, m.py:3")
    assert story.passes(59, r0=ahead, r1=behind, r2=ahead) is None
    fault = story.passes(4, r0=ahead, r1=behind, r2=ahead)
    assert str(fault).startswith("rank 1 on host-1: no progress for 60 s")
    assert "it is at training step (step 4), in f, m.py:3" in str(fault)
    assert len(fault.positions) == 3


def test_among_equals_the_one_that_does_not_wait_is_behind():
    story = Story(3)
    fault = story.passes(64, r0=beat(9, waiting=True), r1=beat(9), r2=beat(9))
    assert fault.rank == 1 and "likewise rank 2 on host-2" in fault.cause
    story = Story()
    fault = story.passes(64, r0=beat(9, waiting=True), r1=beat(9, waiting=True))
    assert fault.rank == 0 and "likewise rank 1" in fault.cause


def test_one_rank_that_goes_on_is_progress_enough():
    story = Story()
    for progress in range(40):
        assert story.passes(10, r0=beat(progress), r1=beat(3, waiting=True)) is None


def test_work_without_marks_has_a_longer_limit():
    story = Story()
    loading = beat(0, "at preparing", paused=True)
    assert story.passes(3590, r0=loading, r1=beat(1, waiting=True)) is None
    assert "no progress for 3600 s" in str(story.passes(15, r0=loading, r1=beat(1, waiting=True)))


def test_a_monitor_that_was_stopped_itself_blames_nobody():
    story = Story()
    story.passes(4, r0=beat(1), r1=beat(1))
    story.now += 500
    assert story.monitor.check(story.now) is None
    assert story.passes(4, r0=beat(1), r1=beat(1)) is None


# The threads, with short times.


@pytest.fixture
def quick(monkeypatch):
    for module in (health, hub, watchdog):
        monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.3)


class Starters(threading.local):
    """Where each rank, here a thread, was told that its hub is."""

    location = None


@pytest.fixture(autouse=True)
def starters(monkeypatch):
    made = Starters()
    monkeypatch.setattr(watchdog, "hub_address", lambda: made.location)
    return made


def start(ranks, *, hang_seconds=0.0, silence_seconds=20.0, starters=None, locations=()):
    """Watchdogs of ``ranks`` in this one process, and the faults that each is told.

    ``locations``: of the hub that each rank's starter has; by default there is none.
    """
    faults = [[] for _ in range(ranks)]
    watchdogs = [
        Watchdog(
            rank,
            ranks,
            host=f"host-{rank}",
            hang_seconds=hang_seconds,
            silence_seconds=silence_seconds,
            on_fault=faults[rank].append,
        )
        for rank in range(ranks)
    ]
    barrier, values = threading.Barrier(ranks), [None] * ranks

    def begin(rank):
        def gather(value):
            values[rank] = value
            barrier.wait(10)
            everyone = list(values)
            barrier.wait(10)
            return everyone

        if locations:
            starters.location = locations[rank]
        watchdogs[rank].start(gather, address="127.0.0.1")

    threads = [threading.Thread(target=begin, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return watchdogs, faults


def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_a_clean_end_is_no_fault_whoever_ends_first(quick, order):
    watchdogs, faults = start(3)
    for each in watchdogs:
        each.at("training step", step=1)
    time.sleep(0.7)
    for rank in order:
        watchdogs[rank].stop()
        time.sleep(0.4)
    assert faults == [[], [], []]
    assert not any(each._thread.is_alive() for each in watchdogs)


def test_every_rank_hears_of_an_error(quick):
    watchdogs, faults = start(3)
    watchdogs[2].failed("ValueError: x")
    assert until(lambda: all(faults))
    assert {str(fault) for told in faults for fault in told} == {"rank 2 on host-2: ValueError: x"}
    assert watchdogs[0].wait_for_fault().orderly
    for each in watchdogs:
        each.stop()


def test_a_dead_rank_is_named_on_the_others(quick):
    watchdogs, faults = start(3)
    time.sleep(0.5)
    watchdogs[1]._stopping.set()
    watchdogs[1]._send = lambda *_, **__: None
    watchdogs[1].stop()
    assert until(lambda: faults[0] and faults[2])
    assert str(faults[2][0]).startswith("rank 1 on host-1: ended without reporting an error")
    for each in watchdogs:
        each.stop()


def test_a_dead_rank_0_is_named_by_the_others(quick):
    watchdogs, faults = start(2)
    watchdogs[0]._hub.close()
    assert until(lambda: faults[1])
    assert faults[1][0].rank == 0
    for each in watchdogs:
        each.stop()


def test_the_process_that_started_the_run_has_the_hub(quick, starters):
    with Hub() as opened:
        watchdogs, faults = start(3, starters=starters, locations=[opened.location] * 3)
        assert not any(each._hub for each in watchdogs)
        watchdogs[0].stop()  # the others are watched on
        time.sleep(0.7)
        assert faults == [[], [], []] and opened.first_failure() is None
        watchdogs[1]._stopping.set()
        watchdogs[1]._send = lambda *_, **__: None
        watchdogs[1].stop()
        assert until(lambda: faults[2])
        cause = "ended without reporting an error (killed, or crashed)"
        assert str(faults[2][0]) == f"rank 1 on host-1: {cause}"
        failure = opened.first_failure()
        assert failure.lines == [str(faults[2][0])] and failure.code == 75
        watchdogs[2].stop()


def test_an_error_that_a_rank_reports_itself_is_no_failure_of_the_hubs_own(quick, starters):
    with Hub() as opened:
        watchdogs, faults = start(2, starters=starters, locations=[opened.location] * 2)
        watchdogs[1].failed("stopped by SIGTERM", 85)
        assert until(lambda: all(faults)) and faults[0][0].code == 85
        assert opened.first_failure() is None
        for each in watchdogs:
            each.stop()


def test_ranks_end_when_the_process_that_started_the_run_is_gone(quick, starters):
    with Hub() as opened:
        watchdogs, faults = start(2, starters=starters, locations=[opened.location] * 2)
        time.sleep(0.5)
    assert until(lambda: all(faults))
    assert str(faults[1][0]).startswith("rank 1 on host-1: lost contact with the process that")
    for each in watchdogs:
        each.stop()


@pytest.mark.parametrize("second", ["another", "unreachable", "none"])
def test_rank_0_has_the_hub_where_not_all_ranks_reach_the_same_one(quick, starters, second):
    with Hub() as opened, Hub() as other:
        found = {"another": other.location, "unreachable": ("127.0.0.1", 9, "x"), "none": None}
        locations = [opened.location, found[second]]
        watchdogs, faults = start(2, starters=starters, locations=locations)
        assert watchdogs[0]._hub is not None
        watchdogs[1].failed("ValueError: x")
        assert until(lambda: all(faults))
        for each in watchdogs:
            each.stop()
        assert opened.first_failure() is None and other.first_failure() is None


def test_a_hang_is_noticed_and_a_pause_is_not_one(quick):
    watchdogs, faults = start(2, hang_seconds=1.0)
    for each in watchdogs:
        each.at("training step", step=3)
    with watchdogs[1].pause("the report"):
        time.sleep(2)
        assert faults == [[], []]
    assert until(lambda: all(faults))
    assert "at training step (step 3), in " in faults[0][0].cause
    for each in watchdogs:
        each.stop()


def test_marks_without_a_watchdog_do_nothing():
    watchdog.at("training step", step=1)
    with watchdog.pause("x"):
        pass
