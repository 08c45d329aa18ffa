"""The bar of ``make test``: lines and branches apart, and no pass when nothing was measured."""

from __future__ import annotations

import json

import pytest

from tests.support.coverage_gate import coverage, main


def report(tmp_path, lines, branches):
    totals = {
        "covered_lines": lines,
        "num_statements": 200,
        "covered_branches": branches,
        "num_branches": 50,
    }
    path = tmp_path / "coverage.json"
    path.write_text(json.dumps({"totals": totals}), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(("lines", "code"), [(180, 0), (179, 1)])
def test_lines_decide_and_branches_are_shown(tmp_path, capsys, lines, code):
    assert main([report(tmp_path, lines, 10), "--lines", "90"]) == code
    assert f"{lines / 2:.1f} % of lines (bar: 90 %), 20.0 % of branches" in capsys.readouterr().out


def test_nothing_measured_is_an_error():
    totals = {"covered_lines": 0, "num_statements": 0, "covered_branches": 0, "num_branches": 0}
    with pytest.raises(ValueError, match="nothing was measured"):
        coverage({"totals": totals})


def test_files_whose_library_is_missing_do_not_count():
    part = {
        "num_statements": 100,
        "covered_lines": 20,
        "num_branches": 10,
        "covered_branches": 0,
    }
    whole = {
        "num_statements": 300,
        "covered_lines": 200,
        "num_branches": 50,
        "covered_branches": 30,
    }
    report = {"totals": whole, "files": {"a.py": {"summary": part}}}
    assert coverage(report) == (pytest.approx(200 / 3), 60.0)
    assert coverage(report, ["a.py"]) == (90.0, 75.0)
