"""Runs parity jobs over backends and numbers of ranks, and tells how far each is off."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from s2s_scale.doctor.parity import Case, Deviation, Figures, Job, compare, read
from s2s_scale.models.tiny import FAMILY_NAMES
from s2s_scale.settings.profiles import resolve
from tests.support import worker

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
CASES = tuple(Case(family, smoothing) for family in FAMILY_NAMES for smoothing in (0.0, 0.1))
# Profile -> (backend, DeepSpeed configuration).
PROFILES = {
    "cpu-ddp": ("local", None),
    "cpu-oss": ("fairscale_oss", None),
    "cpu-fsdp": ("torch_fsdp", None),
    "cpu-zero1": ("deepspeed", "zero1"),
    "cpu-zero2": ("deepspeed", "zero2"),
    "cpu-zero3": ("deepspeed", "zero3"),
    "cpu-zero2-offload": ("deepspeed", "zero2_offload"),
    "cpu-zero3-offload": ("deepspeed", "zero3_offload"),
}
COLUMNS = (
    *((profile, 2) for profile in PROFILES),
    *((profile, ranks) for profile in ("cpu-ddp", "cpu-fsdp", "cpu-zero2") for ranks in (3, 4)),
)
# Profile -> the axis of its mesh. These need torch-xla, and count devices where others count ranks.
MESHES = {"cpu-xla": "data", "cpu-xla-fsdp": "fsdp"}
XLA_COLUMNS = (
    *(("cpu-xla", devices) for devices in (1, 4, 8)),
    *(("cpu-xla-fsdp", devices) for devices in (4, 8)),
)
BOUND = 1e-5


@dataclass(frozen=True)
class Column:
    """One profile at a number of ranks: its deviation in every case."""

    profile: str
    ranks: int
    deviations: dict[Case, Deviation]


def run_jobs(
    jobs: dict[str, Job], folder: Path, *, backend: str, ranks: int, devices: int = 1
) -> None:
    """Run jobs on so many ranks of this machine; the figures of each go to ``folder / its name``.

    One process per rank runs all of them: starting one costs more than a case does.
    """
    for name, job in jobs.items():
        (folder / name).mkdir(parents=True)
        job.write(folder / name / "job.json")
    stock = backend == "transformers"
    worker.run_jobs(
        "tests.support.parity:work",
        {
            name: {
                "backend": "local" if stock else backend,
                "device": "cpu" if job.use_cpu else "cuda",
                "stock": stock,
            }
            for name, job in jobs.items()
        },
        ranks=ranks,
        folder=folder,
        limit=900,
        environment={**resolve("cpu-xla").environment, "CPU_NUM_DEVICES": str(devices)},
    )


def reference(job: Job, folder: Path) -> list[Figures]:
    """The figures of the same global batches in one process."""
    run_jobs({"reference": job}, folder, backend="local", ranks=1)
    return read(job, folder / "reference")


def columns(
    job: Job,
    folder: Path,
    wanted: Iterable[tuple[str, int]] = COLUMNS,
    *,
    against: Job | None = None,
) -> Iterable[Column]:
    """Each profile at its number of ranks against one process with the same global batches.

    The one process runs the job ``against``, where one is given: the same cases set up differently.
    """
    expected = reference(against or job, folder)
    together: dict[tuple[str, int], dict[str, Job]] = {}
    for profile, ranks in wanted:
        backend, config = PROFILES[profile]
        path = str(CONFIGS / f"{config}.json") if config else None
        own = dataclasses.replace(job, deepspeed=path)
        together.setdefault((backend, ranks), {})[profile] = own
    for (backend, ranks), jobs in together.items():
        place = folder / f"{backend}-{ranks}"
        run_jobs(jobs, place, backend=backend, ranks=ranks)
        for profile, own in jobs.items():
            pairs = zip(job.cases, read(own, place / profile), expected, strict=True)
            yield Column(profile, ranks, {case: compare(one, two) for case, one, two in pairs})


def xla_columns(
    job: Job, folder: Path, wanted: Iterable[tuple[str, int]] = XLA_COLUMNS
) -> Iterable[Column]:
    """As ``columns``, on so many virtual XLA devices; batches have two shapes."""
    expected = reference(job, folder)
    own = dataclasses.replace(job, num_buckets=2)
    for profile, devices in wanted:
        place = folder / f"{profile}-{devices}"
        backend = f"xla:{MESHES[profile]}"
        run_jobs({profile: own}, place, backend=backend, ranks=1, devices=devices)
        pairs = zip(job.cases, read(own, place / profile), expected, strict=True)
        yield Column(profile, devices, {case: compare(one, two) for case, one, two in pairs})


def stock_factors(job: Job, folder: Path, *, ranks: int = 2) -> dict[Case, float]:
    """transformers' own first loss as a multiple of the true one, on the same rows."""
    true = read(job, folder / "reference")
    run_jobs({"transformers": job}, folder, backend="transformers", ranks=ranks)
    return {
        case: torch.load(folder / "transformers" / f"{number}.pt")["loss"][0] / true[number].loss[0]
        for number, case in enumerate(job.cases)
    }
