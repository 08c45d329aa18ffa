"""``python -m tests.faults --runs N``: the kill test.

Each of N runs of a tiny model, under one backend after the other, is killed (SIGKILL, one rank or
all of them) one to three times at random moments, and started again by the same command. The final
weights must be those of the run that nothing happened to. Exit code 1 where one run needed a hand.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.faults.kills import Outcome, kill_runs
from tests.faults.runs import BOUND, make_task


def main() -> int:
    """Do the runs and print what became of them as a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--runs", type=int, default=100, help="how many runs (100)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and victims (0)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time (2)")
    given = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", USE_TORCH_XLA="0")
    began, outcomes = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="s2s-scale-faults-") as scratch:
        os.environ["S2S_SCALE_CACHE"] = str(Path(scratch, "cache"))
        task = make_task(Path(scratch, "task"))
        folder = Path(scratch)
        for outcome in kill_runs(given.runs, task, folder, seed=given.seed, workers=given.workers):
            outcomes.append(outcome)
            print(
                f"{len(outcomes)}: {outcome.profile}, {len(outcome.kills)} kills, "
                f"{outcome.deviation:.0e}, {outcome.seconds:.0f} s",
                file=sys.stderr,
            )
            if outcome.trouble:
                print(f"{outcome.profile}: {outcome.trouble}", file=sys.stderr)
    print(table(outcomes))
    print(f"{time.monotonic() - began:.0f} s")
    return 1 if any(outcome.trouble for outcome in outcomes) else 0


def table(outcomes: list[Outcome]) -> str:
    """What became of the runs, as Markdown."""
    kills = [kill for outcome in outcomes for kill in outcome.kills]
    several = [kill for kill in kills if kill.ranks > 1]
    good = [outcome for outcome in outcomes if not outcome.trouble]
    profiles = Counter(outcome.profile for outcome in outcomes)
    rows = [
        ("runs", f"{len(outcomes)} ({', '.join(f'{n} {p}' for p, n in profiles.items())})"),
        ("kills", len(kills)),
        ("of the only process", len(kills) - len(several)),
        ("of one of two ranks", sum(not kill.of_all for kill in several)),
        ("of all ranks", sum(kill.of_all for kill in several)),
        ("during a save", sum(kill.in_a_save for kill in kills)),
        ("before the first checkpoint", sum(kill.before_the_first for kill in kills)),
        ("runs killed during a save", sum(any(k.in_a_save for k in o.kills) for o in outcomes)),
        (f"ended with the same weights ({BOUND:g})", len(good)),
        ("largest deviation", f"{max((o.deviation for o in good), default=0):.0e}"),
        ("needing a hand", len(outcomes) - len(good)),
    ]
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
