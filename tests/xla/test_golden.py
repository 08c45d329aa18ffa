"""Virtual XLA devices give the golden trajectories; ``python -m tests.golden --all`` does more."""

from __future__ import annotations

import pytest

from tests.golden.compare import KNOWN, resumed
from tests.golden.runs import CHECKPOINT_FAMILY, SAVED_AT, trained
from tests.golden.test_golden import check

pytest.importorskip("torch_xla", reason="torch-xla has an environment of its own: make test-xla")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "profile"), [("fsmt", "cpu-xla"), ("mbart", "cpu-xla-fsdp")])
def test_devices_give_the_golden_trajectory(tmp_path, family, profile):
    assert (family, profile) not in KNOWN
    [(_, _, run)] = trained([(family, profile)], tmp_path)
    check(run, family)


@pytest.mark.slow
def test_a_golden_checkpoint_goes_on_under_another_mesh(tmp_path):
    [(_, _, run)] = resumed([("cpu-xla-fsdp", "cpu-xla")], tmp_path)
    check(run, CHECKPOINT_FAMILY, after=SAVED_AT)
