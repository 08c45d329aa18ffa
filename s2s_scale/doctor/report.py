"""The tables printed by ``s2s-scale doctor``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from s2s_scale.doctor.checks import Finding
from s2s_scale.doctor.parity import Case, Deviation
from s2s_scale.utils import table_console


def print_findings(findings: Sequence[Finding], *, title: str) -> bool:
    """Print every finding; returns whether there is no problem."""
    table = Table("check", "", "found", "remedy", title=title, title_justify="left")
    for finding in findings:
        verdict = Text("warning", "yellow") if finding.warning else _verdict(finding.ok)
        table.add_row(finding.what, verdict, finding.found, finding.remedy)
    table_console().print(table)
    return all(finding.ok for finding in findings)


def print_deviations(deviations: Mapping[Case, Deviation], *, bound: float, title: str) -> bool:
    """Print each case's deviation from its reference; returns whether all are within ``bound``."""
    table = Table("model", "", "loss", "gradient norm", "weights", "worst step", title=title)
    for case, found in deviations.items():
        figures = (f"{value:.1e}" for value in (found.loss, found.grad_norm, found.weights))
        table.add_row(str(case), _verdict(found.within(bound)), *figures, str(found.step))
    table_console().print(table)
    good = all(found.within(bound) for found in deviations.values())
    print(f"largest deviation allowed: {bound:g} (loss and norm relative, weights absolute)")
    return good


def _verdict(good: bool) -> Text:
    return Text("ok", "green") if good else Text("problem", "red")
