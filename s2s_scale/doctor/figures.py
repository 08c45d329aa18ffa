"""What a parity run computes: losses, gradient norms and weights of tiny models under a backend.

Every case of a job trains from the same weights on the same rows, whatever the backend and the
number of ranks, so that two jobs can be compared figure by figure.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import PrinterCallback

from s2s_scale.arguments import Seq2SeqTrainingArguments
from s2s_scale.backends import Backend
from s2s_scale.data.collators import Seq2SeqCollator
from s2s_scale.models.tiny import ragged_rows, tiny_model
from s2s_scale.trainer import Seq2SeqTrainer

ROWS = 100
"""Rows of the training set: no multiple of a step's rows, so that the last step is short."""


@dataclass(frozen=True)
class Case:
    """One training run of a parity job."""

    family: str
    smoothing: float

    def __str__(self) -> str:
        return f"{self.family}, smoothing {self.smoothing:g}"


@dataclass(frozen=True)
class Job:
    """What every rank does. ``rows_per_step`` is global: all ranks, all micro-batches."""

    cases: tuple[Case, ...]
    steps: int = 20
    rows_per_step: int = 24
    accumulation: int = 2
    num_buckets: int | None = None
    optim: str = "adamw_torch"
    deepspeed: str | None = None
    use_cpu: bool = True
    linear_cross_entropy: str = "auto"

    def write(self, path: Path) -> Path:
        """Put the job where ranks can read it."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: Path) -> Job:
        """The job that ``write`` has put there."""
        values = json.loads(path.read_text(encoding="utf-8"))
        cases = tuple(Case(**case) for case in values.pop("cases"))
        return cls(cases=cases, **values)


@dataclass
class Figures:
    """What one case gave: one value per step, and every weight at the end."""

    loss: list[float]
    grad_norm: list[float]
    weights: dict[str, Tensor] = field(default_factory=dict)


def compute(job: Job, backend: Backend, folder: Path) -> None:
    """Run every case, and let rank 0 put its figures into ``folder``. Every rank must call it."""
    for number, case in enumerate(job.cases):
        # accelerate keeps its settings for the whole process; each case has settings of its own.
        AcceleratorState._reset_state()
        figures = _run(job, case, backend)
        if backend.data_rank == 0:
            values = {"loss": figures.loss, "grad_norm": figures.grad_norm}
            torch.save({**values, "weights": figures.weights}, folder / f"{number}.pt")


def read(job: Job, folder: Path) -> list[Figures]:
    """The figures of every case, as ``compute`` has left them in ``folder``."""
    return [
        Figures(**torch.load(folder / f"{number}.pt", weights_only=True))
        for number in range(len(job.cases))
    ]


def _run(job: Job, case: Case, backend: Backend) -> Figures:
    with TemporaryDirectory() as scratch:
        devices = backend.data_world_size * backend.rows_multiple
        arguments = _arguments(job, case, devices, scratch)
        args = Seq2SeqTrainingArguments(**backend.training_overrides(arguments, trains=True))
        model = tiny_model(case.family).train()
        trainer = Seq2SeqTrainer(
            model=model,
            args=args,
            train_dataset=ragged_rows(model, ROWS),
            data_collator=Seq2SeqCollator(model.config.pad_token_id),
            backend=backend,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return Figures(
        loss=[float(entry["loss"]) for entry in logs],
        grad_norm=[float(entry["grad_norm"]) for entry in logs],
        weights=backend.full_weights(model),
    )


def _arguments(job: Job, case: Case, world_size: int, folder: str) -> dict[str, Any]:
    rows, rest = divmod(job.rows_per_step, world_size * job.accumulation)
    assert rest == 0, f"{job.rows_per_step} rows for {world_size} ranks x {job.accumulation}"
    return {
        "output_dir": folder,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": job.accumulation,
        "batching": "fixed",
        "num_buckets": job.num_buckets,
        "max_steps": job.steps,
        "learning_rate": 1e-2,
        # The exact gradient of a key's bias is 0 (softmax does not see it): with Adam's usual 1e-8,
        # rounding errors of 1e-9 alone would move it by 1e-5, in other directions on other ranks.
        "adam_epsilon": 1e-6,
        "warmup_steps": max(1, job.steps // 4),
        "lr_scheduler": "linear",
        "max_grad_norm": 0.5,
        "weight_decay": 0.01,
        "label_smoothing": case.smoothing,
        "linear_cross_entropy": job.linear_cross_entropy,
        "optim": job.optim,
        "use_cpu": job.use_cpu,
        "seed": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "log_level": "error",
    } | ({"deepspeed": job.deepspeed} if job.deepspeed else {})
