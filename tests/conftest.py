"""Every test, and every command that a test starts, sees the same empty surroundings."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.surroundings import ROOT, surroundings


def pytest_configure(config):
    """No hub, no user's own cache or profiles; set before torch and transformers are imported."""
    config.own_folder = Path(tempfile.mkdtemp(prefix="s2s-scale-tests-"))
    for name in ("home", "elsewhere"):
        (config.own_folder / name).mkdir()
    config.callers_environment = dict(os.environ)
    caches = ROOT / ".pytest_cache" / "d"
    config.own_environment = surroundings(os.environ, own=config.own_folder, caches=caches)
    _restore(config.own_environment)
    if getattr(config.option, "numprocesses", None) and not (caches / "torch_extensions").exists():
        _build_extensions()


def _build_extensions():
    """Compile what DeepSpeed compiles at its first use, once per checkout.

    Before any test starts, because it takes a minute and more, and tests limit the time of ranks.
    """
    if not find_spec("deepspeed"):
        return
    program = (
        "from s2s_scale.backends import make_backend\n"
        "backend = make_backend('deepspeed', 'cpu')\n"
        "backend.prepare_process()\n"
        "from deepspeed.ops.op_builder import CPUAdamBuilder\n"
        "CPUAdamBuilder().load(verbose=False)\n"
        "backend.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=1200, check=False
    )
    if done.returncode:
        raise pytest.UsageError(f"DeepSpeed's extensions cannot be built:\n{done.stderr[-3000:]}")


def pytest_unconfigure(config):
    shutil.rmtree(config.own_folder, ignore_errors=True)


#: Where tests take longest, first: two workers then end at about the same time.
SLOWEST_FIRST = ("multinode", "faults", "parity", "multiprocess", "system")


def pytest_collection_modifyitems(items):
    """Long files first; the order inside a file stays."""

    def place(item):
        folder = item.path.parent.name
        return SLOWEST_FIRST.index(folder) if folder in SLOWEST_FIRST else len(SLOWEST_FIRST)

    items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def outside_the_checkout(pytestconfig):
    """Fixtures that several tests share are made in a folder that holds nothing of a user's."""
    before = Path.cwd()
    os.chdir(pytestconfig.own_folder / "elsewhere")
    yield
    os.chdir(before)


@pytest.fixture(autouse=True)
def same_surroundings(pytestconfig, outside_the_checkout):
    """Each test starts in an empty folder of its own, and from the same variables.

    Commands export theirs into this process, and write where they are called.
    """
    _restore(pytestconfig.own_environment)
    folder = tempfile.mkdtemp(dir=pytestconfig.own_folder, prefix="empty-")
    os.chdir(folder)
    yield
    os.chdir(pytestconfig.own_folder / "elsewhere")
    shutil.rmtree(folder, ignore_errors=True)
    _restore(pytestconfig.own_environment)


def _restore(variables):
    for name in set(os.environ) - set(variables) - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update(variables)
