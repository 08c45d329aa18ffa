"""``python -m tests.parity``: every family under every profile against one process.

Prints a table; with ``--markdown`` as Markdown, and then of loss, gradient norm and weights the
one that is off most. Exit code 1 where a figure is off by more than 1e-5. The last column is the
first loss of transformers' own trainer as a multiple of the true one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from s2s_scale.doctor.parity import Deviation, Job
from tests.parity.matrix import BOUND, CASES, columns, stock_factors, xla_columns


def main() -> int:
    """Run the matrix and print it."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each run (20)")
    parser.add_argument("--xla", action="store_true", help="on virtual XLA devices instead")
    options = parser.parse_args()
    # Rows of a step divide by 2 micro-batches and every number of ranks or devices.
    job = Job(cases=CASES, steps=options.steps, rows_per_step=32 if options.xla else 24)
    make = xla_columns if options.xla else columns
    with tempfile.TemporaryDirectory(prefix="s2s-scale-parity-") as scratch:
        found = []
        for column in make(job, Path(scratch)):
            print(f"{column.profile} x {column.ranks}: done", file=sys.stderr)
            found.append(column)
        factors = stock_factors(job, Path(scratch))
    cell = _largest if options.markdown else _each
    rows = [
        [str(case), *(cell(column.deviations[case]) for column in found), f"{factors[case]:.2f} x"]
        for case in job.cases
    ]
    heads = [*(f"{column.profile} x {column.ranks}" for column in found), "transformers x 2"]
    first = "largest deviation" if options.markdown else "loss / grad norm / weights"
    _show([first, *heads], rows, markdown=options.markdown)
    good = all(d.within(BOUND) for column in found for d in column.deviations.values())
    print(f"all within {BOUND:g}: {'yes' if good else 'NO'}")
    return 0 if good else 1


def _each(deviation: Deviation) -> str:
    return f"{deviation.loss:.0e} / {deviation.grad_norm:.0e} / {deviation.weights:.0e}"


def _largest(deviation: Deviation) -> str:
    return f"{max(deviation.loss, deviation.grad_norm, deviation.weights):.1e}"


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
