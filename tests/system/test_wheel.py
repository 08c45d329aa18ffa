"""The wheel, installed into an empty folder, carries the profiles and the DeepSpeed configs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: What a release is built from. The rest of a checkout may be a user's: data, models, runs.
SOURCE = (
    *("s2s_scale", "launchers", "ds_configs", "constraints", "tests"),
    *("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"),
)


def run(*command, cwd, **environment):
    """Run a command in ``cwd``; its output. Fails with the command's own words."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy, so that the checkout gets no build folder."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in SOURCE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / "source" / name)
    stale = folder / "source" / "build" / "lib" / "s2s_scale" / "_shipped" / "launchers"
    stale.mkdir(parents=True)
    (stale / "stale.yaml").touch()  # of an earlier build: must not be in the wheel
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", folder / "dist", ".", cwd=folder / "source")
    (built,) = (folder / "dist").glob("s2s_scale-*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """An empty folder with nothing but the wheel installed in it."""
    folder = tmp_path_factory.mktemp("site")
    install = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    run(*install, "--target", folder, wheel, cwd=folder)
    return folder


def from_elsewhere(site, tmp_path, *words):
    """Run Python in an empty folder, with the installed wheel before everything else."""
    return run(
        sys.executable, *words, cwd=tmp_path, PYTHONPATH=str(site), XDG_CONFIG_HOME=str(tmp_path)
    )


def test_wheel_holds_the_package_and_the_shipped_files_and_no_others(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "s2s_scale").rglob("*")
        if path.suffix in (".py", ".json") or path.name == "py.typed"
    }
    shipped = {
        f"s2s_scale/_shipped/{path.relative_to(ROOT).as_posix()}"
        for folder in ("launchers", "ds_configs")
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    }
    assert len(shipped) >= 8
    assert names == expected | shipped


def test_launcher_scripts_stay_executable(wheel):
    scripts = [
        entry for entry in zipfile.ZipFile(wheel).infolist() if entry.filename.endswith(".sh")
    ]
    assert scripts
    assert all(entry.external_attr >> 16 & 0o111 for entry in scripts)


def test_profiles_are_listed_from_an_empty_folder(site, tmp_path):
    listed = from_elsewhere(site, tmp_path, "-m", "s2s_scale", "profiles")
    names = {path.stem for path in (ROOT / "launchers" / "profiles").glob("*.yaml")}
    assert "cpu" in names
    for name in names:
        assert re.search(rf"\b{re.escape(name)}\b", listed), name
    shown = from_elsewhere(site, tmp_path, "-m", "s2s_scale", "profiles", "cpu")
    assert str(site / "s2s_scale" / "_shipped" / "launchers" / "profiles" / "cpu.yaml") in shown


def test_deepspeed_configs_are_found_from_an_empty_folder(site, tmp_path):
    code = (
        "import s2s_scale.settings.profiles as p; folder = p.shipped_folder('ds_configs'); "
        "print(folder); print(*sorted(path.stem for path in folder.glob('*.json')))"
    )
    folder, names = from_elsewhere(site, tmp_path, "-c", code).splitlines()
    assert folder == str(site / "s2s_scale" / "_shipped" / "ds_configs")
    assert names.split() == ["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]


def test_console_script_returns_the_exit_code(site, tmp_path):
    script = site / "bin" / "s2s-scale"
    environment = {"PYTHONPATH": str(site)}
    assert "profiles" in run(script, "--help", cwd=tmp_path, **environment)
    done = subprocess.run(
        [script, "trian"],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "did you mean 'train'" in done.stderr


def test_checkout_is_used_in_an_editable_install(tmp_path):
    code = "import s2s_scale.settings.profiles as p; print(p.shipped_folder('launchers'))"
    found = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT)).strip()
    assert Path(found) == ROOT / "launchers"
