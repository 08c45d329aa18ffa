"""The register of private parts: a newer version is a warning, a changed name an error."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from s2s_scale import cli, compat
from s2s_scale.compat import REGISTER, Reliance, check_register, relies_on
from s2s_scale.doctor import checks
from s2s_scale.doctor.checks import DoctorContext, private_parts
from s2s_scale.settings.profiles import resolve


@pytest.fixture
def library(monkeypatch):
    """A library called ``lib``, version 1.4, and a register of one entry that relies on it."""
    module = ModuleType("lib")
    module._part = lambda tensor, count=1: None
    monkeypatch.setitem(sys.modules, "lib", module)
    monkeypatch.setattr(compat, "package_version", lambda name: "1.4.2")
    monkeypatch.setattr(compat, "REGISTER", [])
    relies_on(
        "lib", checked=("1.2", "1.4"), reason="a test", uses={"lib._part": ("tensor", "count")}
    )(checks.disk)
    monkeypatch.setattr(checks, "NEEDED", {"lib": (1, 2)})
    monkeypatch.setattr(checks, "check_register", lambda **kw: check_register((), **kw))
    return module


def row():
    (found,) = private_parts(DoctorContext(resolve("cpu")))
    return found


def test_a_version_in_the_range_with_the_known_signature_is_fine(library):
    found = row()
    assert found.what == "doctor.checks.disk"
    assert found.found == "lib 1.4.2, checked with 1.2 to 1.4"
    assert found.ok and not found.warning and not found.remedy


@pytest.mark.parametrize("installed", ["1.5.0", "2.0", "1.1.9"])
def test_a_version_outside_the_range_is_a_warning_that_names_it(library, monkeypatch, installed):
    monkeypatch.setattr(compat, "package_version", lambda name: installed)
    found = row()
    assert found.warning and found.ok and found.remedy
    assert found.found == f"lib {installed}, checked with 1.2 to 1.4"


def test_a_changed_signature_is_an_error_whatever_the_version(library, monkeypatch):
    library._part = lambda tensor, *, number=1: None
    for installed in ("1.4.2", "1.5"):
        monkeypatch.setattr(compat, "package_version", lambda _, found=installed: found)
        found = row()
        assert not found.ok
        assert "lib._part takes (tensor, number), expected (tensor, count)" in found.remedy
        assert "pip install 'lib==1.4.*'" in found.remedy


def test_a_name_that_is_gone_is_an_error(library):
    del library._part
    assert "lib._part is gone" in row().remedy


def test_a_library_that_is_not_installed_has_no_row(library, monkeypatch):
    monkeypatch.setattr(compat, "package_version", lambda name: None)
    assert list(private_parts(DoctorContext(resolve("cpu")))) == []


def test_everything_that_is_relied_on_is_here_and_as_it_was_checked():
    verdicts = check_register()
    assert len(verdicts) == len(REGISTER) >= 10
    for verdict in verdicts:
        assert verdict.error is None and verdict.warning is None, verdict
        assert isinstance(verdict.reliance, Reliance) and verdict.reliance.uses


def test_the_doctor_lists_the_register(capsys, tmp_path):
    assert cli.main(["doctor", "--profile", "cpu", "--output_dir", str(tmp_path)]) == 0
    assert "backends.compat.dynamo_compilations" in capsys.readouterr().out
