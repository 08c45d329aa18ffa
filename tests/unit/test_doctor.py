"""``s2s-scale doctor``: what each check finds, and how figures are compared."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from s2s_scale import cli
from s2s_scale.doctor import checks
from s2s_scale.doctor.checks import DoctorContext, Finding, run_checks
from s2s_scale.doctor.parity import Case, Figures, Job, compare
from s2s_scale.doctor.report import print_findings
from s2s_scale.settings.profiles import missing_packages, resolve
from s2s_scale.utils import processes_holding


def findings(check, profile="cpu", **more):
    return {found.what: found for found in check(DoctorContext(resolve(profile), **more))}


def test_this_machine_is_fit_for_the_cpu_profiles(tmp_path):
    # torch-xla needs a torch of its own: each environment has the packages of some of them.
    wanted = map(resolve, ("cpu", "cpu-oss", "cpu-zero2-offload", "cpu-xla"))
    usable = [profile for profile in wanted if not missing_packages(profile)]
    assert len(usable) >= 2
    for profile in usable:
        found = run_checks(DoctorContext(profile, output_dir=tmp_path))
        problems = [entry for entry in found if not entry.ok]
        assert not problems
        assert len(found) >= 8


def test_the_command_prints_a_table_and_an_exit_code(capsys, tmp_path):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed (extra: deepspeed)")
    assert cli.main(["doctor", "--profile", "cpu-zero2", "--output_dir", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for what in ("deepspeed", "CPU cores", "shared memory", "network", "disk", "g++"):
        assert what in text


def test_extras_in_a_remedy_are_not_taken_for_markup(capsys):
    finding = Finding("torch-xla", "not installed", "pip install 's2s-scale[tpu]'")
    assert not print_findings([finding], title="[x]")
    assert "'s2s-scale[tpu]'" in (said := capsys.readouterr().out)
    assert "[x]" in said


def test_a_profile_for_a_device_that_is_not_here(capsys, monkeypatch):
    monkeypatch.setattr(checks, "cuda_is_here", lambda: False)
    assert cli.main(["doctor", "--profile", "gpu-zero3"]) == 2
    text = capsys.readouterr().out
    assert "problem" in text and "no usable device" in text


def test_versions_that_are_too_old_or_missing(monkeypatch):
    monkeypatch.setattr(checks, "package_version", lambda name: "1.0.0")
    found = findings(checks.versions)
    assert found["torch"].remedy == "pip install 'torch>=2.9'"
    monkeypatch.setattr(checks, "missing_packages", lambda profile: [("fairscale", "oss")])
    found = findings(checks.versions, "cpu-oss")
    assert found["fairscale"].found == "not installed"
    assert "pip install fairscale" in found["fairscale"].remedy


def test_no_compiler(monkeypatch):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed (extra: deepspeed)")
    monkeypatch.setattr(checks.shutil, "which", lambda tool, path=None: None)
    found = findings(checks.op_builds, "cpu-zero2")
    assert {name for name, entry in found.items() if not entry.ok} == {
        "g++ (DeepSpeed compiles)",
        "ninja (DeepSpeed compiles)",
    }
    assert findings(checks.op_builds, "cpu") == {}


def test_tpu_chips_and_who_holds_them(monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "tpu_chips", list)
    (found,) = findings(checks.devices, "tpu-vm").values()
    assert not found.ok and "--profile cpu-xla" in found.remedy
    chip = tmp_path / "accel0"
    chip.write_text("")
    monkeypatch.setattr(checks, "tpu_chips", lambda: [chip])
    assert all(entry.ok for entry in findings(checks.devices, "tpu-vm").values())
    with chip.open() as held:
        assert processes_holding([chip]) == [], "this process itself does not count"
        process = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[held.fileno()]
        )
        try:
            found = findings(checks.devices, "tpu-vm")["TPU in use by"]
            assert found.found.startswith(f"process {process.pid} (")
            assert found.remedy == f"stop it first: kill {process.pid}"
        finally:
            process.communicate(b"")


def test_torch_and_torch_xla_fit_each_other(monkeypatch):
    versions = {"torch": "2.9.1+cu128", "torch_xla": "2.8.0", "libtpu": "0.0.21"}
    monkeypatch.setattr(checks, "package_version", versions.get)
    monkeypatch.setattr(checks, "find_spec", lambda name: True)
    monkeypatch.setattr(checks, "_xla_devices", lambda profile: checks.Finding("XLA devices", "8"))
    found = findings(checks.xla_parts, "tpu-vm")
    assert "must have the same version" in found["torch and torch-xla"].remedy
    versions["torch_xla"] = "2.9.0"
    assert all(entry.ok for entry in findings(checks.xla_parts, "tpu-vm").values())
    assert findings(checks.xla_parts, "cpu") == {}


def test_little_room(monkeypatch, tmp_path):
    class Usage:
        free = 2**20

    monkeypatch.setattr(checks.shutil, "disk_usage", lambda folder: Usage)
    (found,) = findings(checks.shared_memory).values()
    assert "--shm-size" in found.remedy
    (found,) = findings(checks.disk, output_dir=tmp_path / "not" / "there").values()
    assert "another --output_dir" in found.remedy and str(tmp_path) in found.found


def test_an_address_that_other_hosts_cannot_reach(monkeypatch, tmp_path):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(checks.socket, "gethostbyname", lambda name: "127.0.1.1")
    (found,) = findings(checks.network, hostfile=tmp_path / "hosts").values()
    assert "GLOO_SOCKET_IFNAME" in found.remedy
    (found,) = findings(checks.network).values()
    assert found.ok
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nothere0")
    (found,) = findings(checks.network).values()
    assert not found.ok


def test_a_host_file_with_mistakes(tmp_path):
    (tmp_path / "hosts").write_text("a slots=0\n", encoding="utf-8")
    (found,) = findings(checks.hosts, hostfile=tmp_path / "hosts").values()
    assert "hosts:1" in found.found and not found.ok


def figures(loss=(2.0, 1.0), norm=(1.0, 1.0), weight=0.5):
    return Figures(list(loss), list(norm), {"w": torch.tensor([weight, 1.0])})


def test_deviations():
    found = compare(figures(loss=(2.0, 1.1), weight=0.25), figures())
    assert found.loss == pytest.approx(0.1) and found.step == 2
    assert (found.grad_norm, found.weights) == (0, 0.25)
    assert not found.within(1e-5)
    assert compare(figures(), figures()).within(0)


@pytest.mark.parametrize(
    "other",
    [
        figures(loss=(2.0, math.nan)),
        figures(loss=(2.0,)),
        figures(weight=math.nan),
        Figures([2.0, 1.0], [1.0, 1.0], {}),
    ],
)
def test_figures_that_are_missing_or_nan_never_pass(other):
    assert not compare(other, figures()).within(1e6)


def test_a_job_survives_its_file(tmp_path):
    job = Job(cases=(Case("t5", 0.1),), steps=3, deepspeed="x.json")
    assert Job.read(job.write(Path(tmp_path, "job.json"))) == job
