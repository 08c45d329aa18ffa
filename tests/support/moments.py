"""Places in a run at which a test acts: the rank says that it is there, and lingers for a while.

Called in a forked rank before it starts; the product knows nothing of it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARK = "TEST_MOMENT_MARK"
"""Environment variable: a file that the rank makes when it comes to the place."""
MOMENT = "TEST_MOMENT"
"""Environment variable: ``PLACE`` or ``PLACE:N``, the N-th time (from 1)."""
NO_REPORT = "TEST_NO_REPORT"
"""Environment variable: when set, no report is drawn, which takes longer than all the training."""
SECONDS = 0.3


def install() -> None:
    """Mark the moment that the environment names, if it does."""
    if os.environ.get(NO_REPORT):
        from s2s_scale.runner import train

        train.write_run_report = lambda *_, **__: ("no report", "no picture")  # type: ignore[assignment]
    place, _, count = os.environ.get(MOMENT, "").partition(":")
    if place:
        _PLACES[place](int(count or 1))


def _loading(count: int) -> None:
    from s2s_scale.runner import train

    _wrap(train, "load_model", count, seconds=60)


def _training(count: int) -> None:
    from s2s_scale import Seq2SeqTrainer

    _wrap(Seq2SeqTrainer, "training_step", count)


def _evaluation(count: int) -> None:
    from s2s_scale import Seq2SeqTrainer

    _wrap(Seq2SeqTrainer, "prediction_step", count)


def _generation(count: int) -> None:
    from s2s_scale.trainer.evaluation import Generator

    _wrap(Generator, "generate", count)


def _wrap(owner: Any, name: str, count: int, *, seconds: float = SECONDS) -> None:
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            Path(os.environ[MARK]).write_text("here", encoding="utf-8")
            time.sleep(seconds)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


_PLACES: dict[str, Callable[[int], None]] = {
    "loading": _loading,
    "training": _training,
    "evaluation": _evaluation,
    "generation": _generation,
}
