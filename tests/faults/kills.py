"""Runs whose ranks are killed at random moments, and started again by the same command."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.runs import BOUND, STEPS, Task, deviation, history
from tests.support.moments import NO_REPORT
from tests.support.ranks import Rank, run_command, start_command, wait

PROFILES = (
    ("cpu", 1),
    ("cpu-ddp", 2),
    ("cpu-zero2", 2),
    ("cpu", 1),
    ("cpu-oss", 2),
    ("cpu-zero1", 2),
    ("cpu-zero3", 2),
)
FLAGS = "--save_steps 2 --save_total_limit 2".split()
IN_A_SAVE = 0.55
"""Share of kills that are aimed at a save; some of them come too late."""
LONGEST_SECONDS = 4.0
"""A kill that is aimed at no save comes within so many seconds of the start."""
SAVE_SECONDS = 0.12
ENDED = (-signal.SIGABRT, -signal.SIGKILL)
"""Exit codes of a rank that was killed, and of one that ``wait`` has ended."""
LEAVE_SECONDS = 30.0
"""How long the ranks that are left may take to see that one is gone."""


@dataclass
class Kill:
    """A kill: which ranks of how many, and whether a checkpoint was being written."""

    victims: int
    ranks: int
    in_a_save: bool
    before_the_first: bool

    @property
    def of_all(self) -> bool:
        return self.victims == self.ranks


@dataclass
class Outcome:
    """What became of a run. ``trouble``: why it needed a hand; empty where it did not."""

    profile: str
    kills: list[Kill] = field(default_factory=list)
    deviation: float = float("inf")
    trouble: str = ""
    seconds: float = 0.0


def kill_runs(
    count: int, task: Task, folder: Path, *, seed: int = 0, workers: int = 2
) -> Iterator[Outcome]:
    """So many runs, each killed one to three times and brought to its end."""
    run_command(task.words(folder / "whole", *FLAGS), ranks=1, folder=folder / "logs", **_QUIET)

    def work(number: int) -> Outcome:
        return one_run(task, folder, number, random.Random(f"{seed}-{number}"))

    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(work, range(count))


_QUIET = {"environment": {NO_REPORT: "1"}}


def one_run(task: Task, folder: Path, number: int, chance: random.Random) -> Outcome:
    """Kill a run one to three times, go on by the same command, and look at what it gave."""
    profile, count = PROFILES[number % len(PROFILES)]
    output, logs = folder / f"run-{number}", folder / f"logs-{number}"
    words = task.words(output, *FLAGS, profile=profile, ranks=count)
    outcome, began = Outcome(profile), time.monotonic()
    for leg in range(chance.randint(1, 3)):
        ranks = start_command(words, ranks=count, folder=logs / str(leg), **_QUIET)
        kill = _kill(ranks, output, chance)
        if kill is not None:
            outcome.kills.append(kill)
        try:
            codes = _wait(ranks, killed=kill is not None)
        except AssertionError as error:
            outcome.trouble = f"ranks that were left did not end: {error}"
            return outcome
        # A rank that writes no results ends a little before the one that does.
        if 0 in codes and set(codes) != {0} and not (output / "model.safetensors").is_file():
            outcome.trouble = f"a rank ended well although another was killed: {codes}"
            return outcome
        # 1: an error that says only that the other rank is gone, before the watchdog began.
        wrong = [code for code in codes if code not in (0, 1, 75, *ENDED)]
        if wrong:
            outcome.trouble = f"exit codes {codes}:\n" + "\n".join(r.text for r in ranks)
            return outcome
    try:
        run_command(words, ranks=count, folder=logs / "last", **_QUIET)
        outcome.deviation = deviation(output, folder / "whole")
        losses = history(output, "loss")
        if outcome.deviation > BOUND:
            outcome.trouble = f"final weights are off by {outcome.deviation:.1e}"
        elif list(losses) != list(range(1, STEPS + 1)):
            outcome.trouble = f"steps in the log: {list(losses)}"
    except AssertionError as error:
        outcome.trouble = f"it did not go on: {error}"
    outcome.seconds = time.monotonic() - began
    return outcome


def _wait(ranks: Sequence[Rank], *, killed: bool) -> list[int]:
    """Wait for the ranks that are left; where none has saved yet, a launcher would end them.

    Before the ranks know of each other, they wait for the one that is gone.
    """
    try:
        return wait(ranks, limit=LEAVE_SECONDS)
    except AssertionError:
        together = any("training" in rank.text or "loss" in rank.text for rank in ranks)
        if not killed or together:
            raise
        return [code if code is not None else -9 for code in (rank.poll() for rank in ranks)]


def _kill(ranks: Sequence[Rank], output: Path, chance: random.Random) -> Kill | None:
    """Kill one rank or all of them at a random moment; None if the run was over before."""
    if chance.random() < IN_A_SAVE:
        _wait_for_save(ranks, output, chance.randint(1, 3))
        time.sleep(chance.random() * SAVE_SECONDS)
    else:
        time.sleep(chance.random() * LONGEST_SECONDS)
    if any(rank.poll() is not None for rank in ranks):
        return None
    victims = list(ranks) if chance.random() < 0.5 else [chance.choice(ranks)]
    for rank in victims:
        rank.send_signal(signal.SIGKILL)
    # A killed rank 0 writes no more, so what it was writing still stands there.
    saving = any(output.glob(".checkpoint-*"))
    return Kill(len(victims), len(ranks), saving, not any(output.glob("checkpoint-*")))


def _wait_for_save(ranks: Sequence[Rank], output: Path, wanted: int) -> None:
    """Until the so-many-th checkpoint is being written, or the run is over."""
    seen: set[str] = set()
    looks = 0
    while len(seen) < wanted:
        seen |= {path.name for path in output.glob(".checkpoint-*.incomplete")}
        looks += 1
        if looks % 50 == 0 and any(rank.poll() is not None for rank in ranks):
            return
        time.sleep(0.002)
