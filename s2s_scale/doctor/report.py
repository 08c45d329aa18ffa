"""The tables that ``s2s-scale doctor`` prints."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from s2s_scale.doctor.checks import Finding
from s2s_scale.doctor.compare import Deviation
from s2s_scale.doctor.figures import Case


def print_findings(findings: Sequence[Finding], *, title: str) -> bool:
    """Print every finding; whether all are well."""
    table = Table("check", "", "found", "remedy", title=escape(title), title_justify="left")
    for finding in findings:
        verdict = "[green]ok[/]" if finding.ok else "[red]problem[/]"
        table.add_row(finding.what, verdict, escape(finding.found), escape(finding.remedy))
    _console().print(table)
    return all(finding.ok for finding in findings)


def print_deviations(deviations: Mapping[Case, Deviation], *, bound: float, title: str) -> bool:
    """Print how far each case is from its reference; whether all are within ``bound``."""
    table = Table("model", "", "loss", "gradient norm", "weights", "worst step", title=title)
    for case, found in deviations.items():
        verdict = "[green]ok[/]" if found.within(bound) else "[red]problem[/]"
        figures = (f"{value:.1e}" for value in (found.loss, found.grad_norm, found.weights))
        table.add_row(str(case), verdict, *figures, str(found.step))
    _console().print(table)
    good = all(found.within(bound) for found in deviations.values())
    print(f"largest deviation allowed: {bound:g} (loss and norm relative, weights absolute)")
    return good


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 120, file=sys.stdout)
