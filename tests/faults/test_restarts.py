"""``--max_restarts``: a run whose rank is killed starts again, and ends as if nothing had been."""

from __future__ import annotations

import os
import signal

import pytest

from tests.faults.runs import BOUND, STEPS, deviation, history
from tests.support.command import finish, start_command
from tests.support.processes import rank_below

pytestmark = pytest.mark.slow


def test_a_killed_rank_is_a_restart(task, whole, tmp_path):
    output = tmp_path / "run"
    assert task.words(output)[-2] == "--resume_from_checkpoint", "which a restart needs not"
    words = task.words(output, "--save_steps", 2, profile="cpu-ddp", ranks=2)
    process = start_command(*words[:-2], "--max_restarts", 1)
    os.kill(rank_below(process.pid, "1", output), signal.SIGKILL)
    outcome = finish(process)
    assert outcome.code == 0, outcome.err
    assert "error: rank 1 on " in outcome.err
    assert "started again from the newest checkpoint (1 of --max_restarts 1)" in outcome.err
    assert "note: resuming from " in outcome.err
    assert history(output, "loss") == pytest.approx(history(whole, "loss"), rel=BOUND)
    assert list(history(output, "loss")) == list(range(1, STEPS + 1))
    assert deviation(output, whole) < BOUND
