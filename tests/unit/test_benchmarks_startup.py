"""The benchmark of starting up: phases end where they should, and the table adds them up."""

from __future__ import annotations

import pytest

from benchmarks import startup


def test_each_moment_belongs_to_the_phase_that_ends_next(monkeypatch):
    clock = iter([3.0, 4.0, 9.0, 10.0])
    monkeypatch.setattr(startup.time, "time", lambda: next(clock))
    phases = startup.Phases(1.0)
    phases.end("imports")
    wrapped = phases.ending("trainer", lambda value: value + 1, before="settings")
    assert wrapped(1) == 2
    phases.end("first step")
    assert phases.seconds == {
        "imports": 2.0,
        "settings": 1.0,
        "data and tokens": 0.0,
        "model and tokenizer": 0.0,
        "trainer": 5.0,
        "first step": 1.0,
    }


def test_the_table_has_the_medians_and_the_median_of_the_sums():
    runs = [{phase: float(number) for phase in startup.PHASES} for number in (1, 2, 9)]
    report = startup.report_of({("s2s-scale", "empty"): runs}, "title")
    assert report.entries[0]["imports"] == 2.0
    assert report.entries[0]["in all"] == pytest.approx(2.0 * len(startup.PHASES))
    assert report.rows[0][-1] == "12.00"
