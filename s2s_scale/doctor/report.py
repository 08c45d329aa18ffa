"""The tables that ``s2s-scale doctor`` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from s2s_scale.doctor.checks import Finding
from s2s_scale.doctor.parity import Case, Deviation
from s2s_scale.utils import table_console


def print_findings(findings: Sequence[Finding], *, title: str) -> bool:
    """Print every finding; whether all are well."""
    table = Table("check", "", "found", "remedy", title=title, title_justify="left")
    for finding in findings:
        table.add_row(finding.what, _verdict(finding), finding.found, finding.remedy)
    table_console().print(table)
    return all(finding.ok for finding in findings)


def print_deviations(deviations: Mapping[Case, Deviation], *, bound: float, title: str) -> bool:
    """Print how far each case is from its reference; whether all are within ``bound``."""
    table = Table("model", "", "loss", "gradient norm", "weights", "worst step", title=title)
    for case, found in deviations.items():
        figures = (f"{value:.1e}" for value in (found.loss, found.grad_norm, found.weights))
        table.add_row(str(case), _shown(found.within(bound)), *figures, str(found.step))
    table_console().print(table)
    good = all(found.within(bound) for found in deviations.values())
    print(f"largest deviation allowed: {bound:g} (loss and norm relative, weights absolute)")
    return good


def _verdict(finding: Finding) -> Text:
    return Text("warning", "yellow") if finding.warning else _shown(finding.ok)


def _shown(good: bool) -> Text:
    return Text("ok", "green") if good else Text("problem", "red")
