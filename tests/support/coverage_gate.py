"""Line and branch coverage apart, and a bar for the lines.

coverage's own ``fail_under`` mixes lines and branches into one figure.
Usage: python -m tests.support.coverage_gate REPORT.json --lines 90 [--without FILE …]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def coverage(report: dict[str, Any], without: Sequence[str] = ()) -> tuple[float, float]:
    """Percent of lines and of branches covered, from coverage's JSON report.

    Files of ``without`` do not count: what they need is not installed.
    """
    total = report["totals"]
    absent = [report["files"][name]["summary"] for name in without]

    def sum_of(name: str) -> int:
        return int(total[name]) - sum(part[name] for part in absent)

    lines, branches = sum_of("num_statements"), sum_of("num_branches")
    if not lines or not branches:
        raise ValueError(f"nothing was measured: {lines} lines, {branches} branches")
    return 100 * sum_of("covered_lines") / lines, 100 * sum_of("covered_branches") / branches


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("--lines", type=float, required=True, help="least percentage of lines")
    parser.add_argument("--without", nargs="*", default=[], help="files that do not count")
    options = parser.parse_args(argv)
    report = json.loads(options.report.read_text(encoding="utf-8"))
    lines, branches = coverage(report, options.without)
    print(
        f"coverage: {lines:.1f} % of lines (bar: {options.lines:g} %), {branches:.1f} % of branches"
    )
    return 0 if lines >= options.lines else 1


if __name__ == "__main__":
    raise SystemExit(main())
