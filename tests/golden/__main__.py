"""``python -m tests.golden``: how far the package is off the golden files.

Prints a table with the largest deviations of each family under each profile, relative to the
golden run under ``cpu``: of figures / of weights. Then checkpoints, plans and texts. Exit code 1
where one is off. Without ``--all``: every family under ``cpu``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.golden import plans, texts
from tests.golden.compare import (
    BOUND,
    KNOWN,
    WEIGHTS_BOUND,
    Deviation,
    deviation,
    resumed,
    same_environment,
)
from tests.golden.runs import (
    CHECKPOINT_FAMILY,
    CHECKPOINT_PROFILES,
    FAMILIES,
    RANKS,
    SAVED_AT,
    XLA,
    CommandFailed,
    Trajectory,
    trained,
)


def main() -> int:
    """Compare, print, and say whether all is within the bound."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("--all", action="store_true", help="every profile, and all other files")
    parser.add_argument("--profiles", nargs="+", choices=RANKS, help="these profiles alone")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument(
        "--xla_python",
        help="an interpreter with torch-xla; without it, those profiles are left out",
    )
    options = parser.parse_args()
    profiles = options.profiles or (list(RANKS) if options.all else ["cpu"])
    profiles = [name for name in profiles if name not in XLA or options.xla_python]
    python = options.xla_python or sys.executable
    same = same_environment()
    print(f"to the bit under cpu: {'expected' if same else 'not expected, another environment'}")
    good = True
    with tempfile.TemporaryDirectory(prefix="s2s-scale-golden-") as scratch:
        folder = Path(scratch)
        cells = [(family, profile) for profile in profiles for family in options.families]
        table: dict[tuple[str, str], str] = {}
        for family, profile, run in trained(cells, folder / "runs", xla_python=python):
            exact = profile == "cpu" and same
            cell, fine = _judge(run, family, exact=exact)
            known = (family, profile) in KNOWN
            note = (" (mended: take it out of KNOWN)" if fine else " (known)") if known else ""
            table[family, profile] = cell + note
            good = good and (fine != known)
            print(f"{family} {profile}: {table[family, profile]}", file=sys.stderr)
        shown = Table("figures / weights", *(f"{name} x {RANKS[name]}" for name in profiles))
        for family in options.families:
            shown.add_row(family, *(table[family, profile] for profile in profiles))
        Console(width=None if sys.stdout.isatty() else 180).print(shown)
        if options.all:
            good = _rest(folder, profiles, python, same=same) and good
    print(f"all within {BOUND:g} / {WEIGHTS_BOUND:g}: {'yes' if good else 'NO'}")
    return 0 if good else 1


def _judge(
    run: Trajectory | CommandFailed, family: str, *, exact: bool, after: int = 0
) -> tuple[str, bool]:
    """A run in words, and whether it is as it must be."""
    if isinstance(run, CommandFailed):
        return "failed", False
    off: Deviation = deviation(family, run, after=after)
    return str(off), off.exact or (off.within and not exact)


def _rest(folder: Path, profiles: list[str], python: str, *, same: bool) -> bool:
    """Checkpoints under ``cpu`` and under their own profile, plans, streams and texts."""
    good = True
    moves = {(source, target) for source in CHECKPOINT_PROFILES for target in ("cpu", source)}
    wanted = sorted(move for move in moves if move[1] in profiles)
    for source, target, run in resumed(wanted, folder / "resumed", xla_python=python):
        exact = same and source == target == "cpu"
        cell, fine = _judge(run, CHECKPOINT_FAMILY, exact=exact, after=SAVED_AT)
        print(f"checkpoint of {source} under {target}: {cell}")
        good = good and fine
    fine = plans.planned(folder / "plans") == plans.read()["plans"]
    print(f"plans: {'equal' if fine else 'DIFFERENT'}")
    found, expected = plans.streamed(folder / "streams"), plans.read()["streams"]
    off = max(
        abs(a - b) / b
        for mode, seeds in expected.items()
        for seed, losses in seeds.items()
        for a, b in zip(found[mode][seed], losses, strict=True)
    )
    print(f"streams: {off:.1e}")
    good = good and fine and off <= (0 if same else BOUND)
    for family in texts.FAMILIES:
        for beams, lines in texts.generated(family, folder / "texts").items():
            different = texts.different(lines, texts.golden(family, beams))
            print(f"texts of {family}, {beams} beams: {different} of {texts.ROWS} differ")
            good = good and different <= (0 if same else texts.TIES)
    return good


if __name__ == "__main__":
    sys.exit(main())
