"""Runs parity jobs over backends and numbers of ranks, and tells how far each is off."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from s2s_scale.doctor.compare import Deviation, compare
from s2s_scale.doctor.figures import Case, Job, read
from s2s_scale.models.tiny import FAMILY_NAMES
from tests.support.ranks import run_ranks

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
CASES = tuple(Case(family, smoothing) for family in FAMILY_NAMES for smoothing in (0.0, 0.1))
# Profile -> (backend, DeepSpeed configuration).
PROFILES = {
    "cpu-ddp": ("local", None),
    "cpu-oss": ("fairscale_oss", None),
    "cpu-zero1": ("deepspeed", "zero1"),
    "cpu-zero2": ("deepspeed", "zero2"),
    "cpu-zero3": ("deepspeed", "zero3"),
}
COLUMNS = (
    *((profile, 2) for profile in PROFILES),
    *((profile, ranks) for profile in ("cpu-ddp", "cpu-zero2") for ranks in (3, 4)),
)
BOUND = 1e-5


@dataclass(frozen=True)
class Column:
    """One profile at a number of ranks: its deviation in every case."""

    profile: str
    ranks: int
    deviations: dict[Case, Deviation]


def run_job(job: Job, folder: Path, *, backend: str, ranks: int) -> Path:
    """Run a job on so many ranks of this machine; the folder that holds the figures."""
    folder.mkdir(parents=True)
    words = [backend, str(job.write(folder / "job.json")), str(folder)]
    worker = ["-m", "tests.support.parity_worker", *words]
    for rank, result in enumerate(run_ranks(worker, ranks=ranks, folder=folder, limit=900)):
        assert result.code == 0, f"{backend}, rank {rank}:\n{result.output}"
    return folder


def reference(job: Job, folder: Path) -> Path:
    """The same global batches in one process."""
    return run_job(job, folder / "reference", backend="local", ranks=1)


def columns(
    job: Job, folder: Path, wanted: Iterable[tuple[str, int]] = COLUMNS
) -> Iterable[Column]:
    """Each profile at its number of ranks against one process with the same global batches."""
    expected = read(job, reference(job, folder))
    for profile, ranks in wanted:
        backend, config = PROFILES[profile]
        path = str(CONFIGS / f"{config}.json") if config else None
        own = dataclasses.replace(job, deepspeed=path)
        found = read(own, run_job(own, folder / f"{profile}-{ranks}", backend=backend, ranks=ranks))
        pairs = zip(job.cases, found, expected, strict=True)
        yield Column(profile, ranks, {case: compare(one, two) for case, one, two in pairs})


def stock_factors(job: Job, folder: Path, *, ranks: int = 2) -> dict[Case, float]:
    """transformers' own first loss as a multiple of the true one, on the same rows."""
    true = read(job, folder / "reference")
    run_job(job, folder / "transformers", backend="transformers", ranks=ranks)
    return {
        case: torch.load(folder / "transformers" / f"{number}.pt")["loss"][0] / true[number].loss[0]
        for number, case in enumerate(job.cases)
    }
