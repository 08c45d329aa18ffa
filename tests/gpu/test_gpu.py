"""One GPU gives the figures of the CPU. Skipped, with the reason, where there is none."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from s2s_scale.doctor.parity import Case, Job, compare, read
from s2s_scale.settings.profiles import deepspeed_config_path, resolve
from tests.parity.matrix import reference, run_jobs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
PROFILES = ("gpu", "gpu-ddp", "gpu-zero2", "gpu-zero3", "gpu-zero3-offload")
JOB = Job(cases=(Case("t5", 0.0), Case("bart", 0.1), Case("marian", 0.1)))
BOUND = 1e-4


@pytest.fixture(scope="module")
def on_the_cpu(tmp_path_factory):
    return reference(JOB, tmp_path_factory.mktemp("cpu"))


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_in_fp32_has_the_trajectory_of_the_cpu(tmp_path, on_the_cpu, name):
    profile = resolve(name)
    if profile.backend == "deepspeed":
        pytest.importorskip("deepspeed", reason="deepspeed is not installed (extra: deepspeed)")
    config = profile.deepspeed_config
    path = str(deepspeed_config_path(config, profile)) if config else None
    job = dataclasses.replace(JOB, use_cpu=False, deepspeed=path)
    run_jobs({name: job}, tmp_path, backend=profile.backend, ranks=1)
    for case, found, expected in zip(
        JOB.cases, read(job, tmp_path / name), on_the_cpu, strict=True
    ):
        deviation = compare(found, expected)
        print(f"{name}, {case}: {deviation}")
        assert deviation.within(BOUND), (name, str(case), deviation)
