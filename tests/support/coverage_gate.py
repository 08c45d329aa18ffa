"""Line and branch coverage apart, and a bar for the lines.

coverage's own ``fail_under`` mixes lines and branches into one figure.
Usage: python -m tests.support.coverage_gate REPORT.json --lines 90
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def coverage(report: dict[str, dict[str, int]]) -> tuple[float, float]:
    """Percent of lines and percent of branches covered, from coverage's JSON report."""
    totals = report["totals"]
    lines, branches = totals["num_statements"], totals["num_branches"]
    if not lines or not branches:
        raise ValueError(f"nothing was measured: {lines} lines, {branches} branches")
    return 100 * totals["covered_lines"] / lines, 100 * totals["covered_branches"] / branches


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("--lines", type=float, required=True, help="least percentage of lines")
    options = parser.parse_args(argv)
    lines, branches = coverage(json.loads(options.report.read_text(encoding="utf-8")))
    print(
        f"coverage: {lines:.1f} % of lines (bar: {options.lines:g} %), {branches:.1f} % of branches"
    )
    return 0 if lines >= options.lines else 1


if __name__ == "__main__":
    raise SystemExit(main())
