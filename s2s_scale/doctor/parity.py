"""``doctor --parity``: ten steps under the profile, on its own machines, against one process."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from s2s_scale.backends import make_backend
from s2s_scale.doctor.compare import Deviation, compare
from s2s_scale.doctor.figures import Case, Job, compute, read
from s2s_scale.errors import UserError, raise_problems
from s2s_scale.launch.description import Launch
from s2s_scale.launch.starting import start
from s2s_scale.profiles import LauncherProfile, deepspeed_config_path

JOB_FILE = "job.json"
STEPS = 10
BOUNDS = {"cpu": 1e-5, "cuda": 1e-4, "tpu": 1e-4}
ROWS_ON_A_MESH = 64
"""Divides by 2 micro-batches and up to 32 devices."""


def job_for(profile: LauncherProfile, *, families: tuple[str, ...], ranks: int) -> Job:
    """Ten steps of each family, with two rows per rank and micro-batch; more on a mesh."""
    path = profile.deepspeed_config
    rows = ROWS_ON_A_MESH if profile.mesh else ranks * 2 * 2
    return Job(
        cases=tuple(Case(family, 0.1) for family in families),
        steps=STEPS,
        rows_per_step=rows,
        num_buckets=2 if profile.mesh else None,
        deepspeed=str(deepspeed_config_path(path, profile)) if path else None,
        use_cpu=profile.device != "cuda",
    )


def run(launch: Launch, job: Job, folder: Path) -> dict[Case, Deviation]:
    """Compute the job under ``launch``, then in one process, and compare.

    Raises:
        UserError: one of the two failed; it has printed why.
    """
    job.write(folder / JOB_FILE)
    if start(launch, environ=os.environ).code:
        raise UserError("the run under the profile failed; what it printed is above")
    found = read(job, folder)
    with tempfile.TemporaryDirectory(prefix="s2s-scale-reference-") as alone:
        dataclasses.replace(job, deepspeed=None).write(Path(alone, JOB_FILE))
        command = [sys.executable, "-m", "s2s_scale.doctor.parity", alone]
        if subprocess.run(command, check=False).returncode:
            raise UserError("the reference in one process failed; what it printed is above")
        expected = read(job, Path(alone))
    pairs = zip(job.cases, found, expected, strict=True)
    return {case: compare(one, other) for case, one, other in pairs}


def work(profile: LauncherProfile | None, folder: Path) -> None:
    """One rank of the job in ``folder``; without a profile, the reference in one process."""
    job = Job.read(folder / JOB_FILE)
    device = "cpu" if job.use_cpu else "cuda"
    backend = (
        make_backend(profile.backend, profile.device, profile.mesh)
        if profile
        else make_backend("local", device)
    )
    raise_problems(list(backend.problems()))
    backend.prepare_process()
    try:
        compute(job, backend, folder)
    finally:
        backend.close()


if __name__ == "__main__":
    work(None, Path(sys.argv[1]))
