"""Five runs of ``python -m tests.faults``."""

from __future__ import annotations

import pytest

from tests.faults.__main__ import table
from tests.faults.kills import kill_runs

pytestmark = pytest.mark.slow


def test_five_runs_that_are_killed_end_like_the_one_that_is_not(task, tmp_path):
    outcomes = list(kill_runs(5, task, tmp_path, seed=1))
    print(table(outcomes))
    assert len(outcomes) == 5
    assert not [outcome.trouble for outcome in outcomes if outcome.trouble]
    assert sum(len(outcome.kills) for outcome in outcomes) >= 5
    assert any(kill.in_a_save for outcome in outcomes for kill in outcome.kills)
