"""One rank of parity jobs: python -m tests.support.parity_worker BACKEND FOLDER…

Each folder has a ``job.json`` and gets its figures.

BACKEND is one of ours, ``xla:AXIS`` for one on a mesh, or ``transformers``: its own trainer on the
same rows, losses only.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from s2s_scale.backends import make_backend
from s2s_scale.doctor.compat import forget_accelerate_settings
from s2s_scale.doctor.parity import ROWS, Job, _arguments, compute
from s2s_scale.models.tiny import ragged_rows, tiny_model
from tests.support.training import history, stock_trainer


def main(name: str, folders: list[Path]) -> None:
    """Run the job in each folder under the backend called ``name``."""
    jobs = {folder: Job.read(folder / "job.json") for folder in folders}
    device = "cpu" if all(job.use_cpu for job in jobs.values()) else "cuda"
    kind, _, axis = name.partition(":")
    mesh = {axis: -1} if axis else None
    backend = make_backend("local" if name == "transformers" else kind, device, mesh)
    backend.prepare_process()
    try:
        for folder, job in jobs.items():
            if name == "transformers":
                stock(
                    job,
                    folder,
                    rank=backend.collectives.rank,
                    world_size=backend.collectives.world_size,
                )
            else:
                compute(job, backend, folder)
    finally:
        backend.close()


def stock(job: Job, folder: Path, *, rank: int, world_size: int) -> None:
    """The same cases with transformers' trainer, on the first step's loss only."""
    for number, case in enumerate(job.cases):
        forget_accelerate_settings()
        model = tiny_model(case.family).train()
        with TemporaryDirectory() as scratch:
            values = _arguments(job, case, world_size, scratch) | {"max_steps": 1}
            for name in ("batching", "num_buckets", "linear_cross_entropy"):  # ours alone
                del values[name]
            smoothing = values.pop("label_smoothing")
            schedule = values.pop("lr_scheduler")
            trainer = stock_trainer(
                model,
                Path(values.pop("output_dir")),
                ragged_rows(model, ROWS),
                label_smoothing_factor=smoothing,
                lr_scheduler_type=schedule,
                **values,
            )
            trainer.train()
        if rank == 0:
            torch.save({"loss": history(trainer, "loss")}, folder / f"{number}.pt")


if __name__ == "__main__":
    main(sys.argv[1], [Path(folder) for folder in sys.argv[2:]])
