"""One rank of a parity job, under a backend or, on the same rows, with transformers' trainer."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from s2s_scale.backends import Backend
from s2s_scale.doctor.compat import forget_accelerate_settings
from s2s_scale.doctor.parity import ROWS, Job, _arguments, compute
from s2s_scale.models.tiny import ragged_rows, tiny_model
from tests.support.training import history, stock_trainer


def work(backend: Backend, job: dict[str, Any], folder: Path) -> None:
    """Run the job in ``folder``, and let rank 0 write its figures there."""
    parity = Job.read(folder / "job.json")
    if job.get("stock"):
        stock(parity, backend, folder)
    else:
        compute(parity, backend, folder)


def stock(job: Job, backend: Backend, folder: Path) -> None:
    """The same cases with transformers' trainer, on the first step's loss only."""
    for number, case in enumerate(job.cases):
        forget_accelerate_settings()
        model = tiny_model(case.family).train()
        with TemporaryDirectory() as scratch:
            values = _arguments(job, case, backend.collectives.world_size, scratch) | {
                "max_steps": 1
            }
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
        if backend.collectives.rank == 0:
            torch.save({"loss": history(trainer, "loss")}, folder / f"{number}.pt")
