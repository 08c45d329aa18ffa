"""A part of the parity matrix on virtual XLA devices; ``python -m tests.parity --xla`` runs all."""

from __future__ import annotations

import pytest

from s2s_scale.doctor.parity import Case, Job
from tests.parity.matrix import BOUND, xla_columns

pytest.importorskip("torch_xla", reason="torch-xla has an environment of its own: make test-xla")

# Two families that differ in what they tie, how they start decoding and what they pad with.
JOB = Job(cases=(Case("t5", 0.0), Case("fsmt", 0.1)), steps=8, rows_per_step=32)
WANTED = (("cpu-xla", 4), ("cpu-xla-fsdp", 8))


@pytest.mark.slow
def test_devices_give_the_figures_of_one_process(tmp_path):
    found = list(xla_columns(JOB, tmp_path, WANTED))
    assert [(column.profile, column.ranks) for column in found] == list(WANTED)
    for column in found:
        assert len(column.deviations) == len(JOB.cases)
        for case, deviation in column.deviations.items():
            assert deviation.within(BOUND), (column.profile, str(case), deviation)
