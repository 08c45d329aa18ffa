"""Asked to stop at any moment, a run saves, ends with 85, and goes on as if nothing had been."""

from __future__ import annotations

import signal
import time

import pytest

from s2s_scale.checkpoint import newest_verified
from s2s_scale.errors import EXIT_RESUME
from tests.faults.runs import BOUND, EVALUATED, EVALUATES, STEPS, deviation, history
from tests.support.moments import MARK, MOMENT
from tests.support.ranks import run_command, start_command, wait

pytestmark = pytest.mark.slow
SECONDS = 10.0
GENERATE = ("--predict_with_generate", "--metrics", "exact_match")

# Moment -> the signal, more flags, and what is saved; one after the other in the same folder.
MOMENTS = {
    "loading": (signal.SIGTERM, (), None),
    "training:3": (signal.SIGUSR1, (), 3),
    "evaluation:2": (signal.SIGTERM, (), 4),
    "generation:2": (signal.SIGINT, GENERATE, 4),
}


def wait_for(path, ranks):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, [rank.text for rank in ranks]
        assert ranks[0].poll() is None, ranks[0].text
        time.sleep(0.01)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_run_that_is_stopped_four_times_is_the_run_that_was_not(task, whole, tmp_path, count):
    output, seconds = tmp_path / "run", {}
    profile = "cpu" if count == 1 else "cpu-ddp"
    words = task.words(output, *EVALUATES, profile=profile, ranks=count)
    for moment, (number, more, step) in MOMENTS.items():
        mark = tmp_path / moment
        ranks = start_command(
            [*words, *more],
            ranks=count,
            folder=tmp_path / f"at-{moment}",
            environment={MOMENT: moment, MARK: str(mark)},
        )
        wait_for(mark, ranks)
        began = time.monotonic()
        ranks[-1].send_signal(number)
        codes = wait(ranks)
        seconds[moment] = time.monotonic() - began
        texts = "\n".join(rank.text for rank in ranks)
        assert codes == [EXIT_RESUME] * count, texts
        assert "Traceback" not in texts
        saved = newest_verified(output)
        assert saved == (None if step is None else output / f"checkpoint-{step}"), texts
        assert f"stopped by {signal.Signals(number).name}" in ranks[0].text
        assert step is None or f"at step {step}, saved in {saved}" in ranks[0].text
    print(f"{count} ranks: seconds from the signal to the end of all: {seconds}")
    assert max(seconds.values()) < SECONDS
    run_command([*words, *GENERATE], ranks=count, folder=tmp_path / "end")
    assert history(output, "loss") == pytest.approx(history(whole, "loss"), rel=BOUND)
    assert list(history(output, "loss")) == list(range(1, STEPS + 1))
    assert history(output, "eval_loss") == pytest.approx(history(whole, "eval_loss"), rel=BOUND)
    assert list(history(output, "eval_loss")) == list(EVALUATED)
    assert list(history(output, "eval_exact_match")) == list(EVALUATED)
    assert deviation(output, whole) < BOUND
