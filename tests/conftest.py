"""Every test, and every command that a test starts, sees the same empty surroundings."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest


def pytest_configure(config):
    """No hub, no user's own cache or profiles; set before torch and transformers are imported."""
    config.own_folder = tempfile.mkdtemp(prefix="s2s-scale-tests-")
    os.environ.update(
        HF_HUB_OFFLINE="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        TOKENIZERS_PARALLELISM="false",
        USE_TORCH_XLA="0",  # as in every profile: transformers is not told of torch-xla
        OMP_NUM_THREADS="1",  # the same sums in this process and in those that tests start
        S2S_SCALE_CACHE=os.path.join(config.own_folder, "cache"),
        XDG_CONFIG_HOME=os.path.join(config.own_folder, "config"),
        COLUMNS="120",
    )
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    config.own_environment = dict(os.environ)


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


@pytest.fixture(autouse=True)
def same_environment(pytestconfig):
    """Each test starts from the same variables: commands export theirs into this process."""
    _restore(pytestconfig.own_environment)
    yield
    _restore(pytestconfig.own_environment)


def _restore(variables):
    for name in set(os.environ) - set(variables) - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update(variables)
