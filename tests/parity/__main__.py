"""``python -m tests.parity``: every family under every profile against one process.

Prints a table; with ``--markdown`` as Markdown. Exit code 1 where a figure is off by more than
1e-5.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from s2s_scale.doctor.figures import Job
from tests.parity.matrix import BOUND, CASES, Column, columns, stock_factors


def main() -> int:
    """Run the matrix and print it."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each run (20)")
    options = parser.parse_args()
    job = Job(cases=CASES, steps=options.steps)
    with tempfile.TemporaryDirectory(prefix="s2s-scale-parity-") as scratch:
        found = []
        for column in columns(job, Path(scratch)):
            print(f"{column.profile}, {column.ranks} ranks: done", file=sys.stderr)
            found.append(column)
        factors = stock_factors(job, Path(scratch))
    rows = [
        [str(case), *(_cell(column, case) for column in found), f"{factors[case]:.2f} x"]
        for case in job.cases
    ]
    heads = ["loss / grad norm / weights", *(f"{c.profile} x {c.ranks}" for c in found)]
    _show([*heads, "transformers x 2"], rows, markdown=options.markdown)
    good = all(d.within(BOUND) for column in found for d in column.deviations.values())
    print(f"all within {BOUND:g}: {'yes' if good else 'NO'}")
    return 0 if good else 1


def _cell(column: Column, case: object) -> str:
    deviation = column.deviations[case]  # type: ignore[index]
    return f"{deviation.loss:.0e} / {deviation.grad_norm:.0e} / {deviation.weights:.0e}"


def _show(heads: list[str], rows: list[list[str]], *, markdown: bool) -> None:
    if markdown:
        lines = [heads, ["---"] * len(heads), *rows]
        print("\n".join(f"| {' | '.join(line)} |" for line in lines))
        return
    table = Table(*heads)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


if __name__ == "__main__":
    sys.exit(main())
