"""A tiny model and an uninterrupted run for the tests of faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.runs import EVALUATES, Task, make_task
from tests.support.ranks import run_command


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="session")
def whole(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of the run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    run_command(task.words(folder / "run", *EVALUATES), ranks=1, folder=folder)
    return folder / "run"
