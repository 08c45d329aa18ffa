"""A part of the parity matrix; ``python -m tests.parity`` runs all of it."""

from __future__ import annotations

import dataclasses

import pytest

from s2s_scale.doctor.parity import Case, Job
from tests.parity.matrix import BOUND, PROFILES, columns, stock_factors

# Families that differ in what they tie, how they start decoding and what they pad with.
JOB = Job(cases=(Case("t5", 0.0), Case("fsmt", 0.1), Case("mbart", 0.1)), steps=8)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_profiles_give_the_figures_of_one_process(tmp_path):
    wanted = [(profile, 2) for profile in PROFILES] + [("cpu-zero2", 3)]
    found = list(columns(JOB, tmp_path, wanted))
    assert len(found) == 9
    for column in found:
        for case, deviation in column.deviations.items():
            assert deviation.within(BOUND), (column.profile, column.ranks, str(case), deviation)
    factors = stock_factors(JOB, tmp_path)
    # 2 ranks x 2 micro-batches; its shuffle is another one, so the rows of the step differ.
    assert factors[JOB.cases[0]] == pytest.approx(4, rel=0.1)
    assert factors[JOB.cases[1]] == pytest.approx(1, rel=0.1)


@pytest.mark.slow
def test_loss_without_logits_gives_the_figures_of_logits_in_one_process(tmp_path):
    """Wherever the projection's weight lies: whole, or shared out over the ranks."""
    cases = tuple(Case(family, 0.1) for family in ("bart", "t5", "fsmt"))
    job = Job(cases=cases, steps=4, linear_cross_entropy="on")
    logits = dataclasses.replace(job, linear_cross_entropy="off")
    wanted = [
        (profile, 2) for profile in ("cpu-ddp", "cpu-oss", "cpu-fsdp", "cpu-zero2", "cpu-zero3")
    ]
    found = list(columns(job, tmp_path, wanted, against=logits))
    assert len(found) == 5
    for column in found:
        for case, deviation in column.deviations.items():
            assert deviation.within(BOUND), (column.profile, str(case), deviation)
