"""``doctor --parity``: ten steps under the profile, on its own machines, against one process.

What a parity run computes: losses, gradient norms and weights of tiny models under a backend.

Every case of a job trains from the same weights on the same rows, whatever the backend and the
number of ranks, so that two jobs can be compared figure by figure.

How far two sets of figures are apart.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback

from s2s_scale.arguments import Seq2SeqTrainingArguments
from s2s_scale.backends import Backend, make_backend
from s2s_scale.data.collators import Seq2SeqCollator
from s2s_scale.doctor.compat import forget_accelerate_settings
from s2s_scale.errors import UserError, raise_problems
from s2s_scale.launch.spec import Launch
from s2s_scale.models.tiny import ragged_rows, tiny_model
from s2s_scale.resilience.supervisor import start
from s2s_scale.settings.profiles import LauncherProfile, deepspeed_config_path
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
        forget_accelerate_settings()
        figures = _run(job, case, backend)
        if backend.collectives.rank == 0:
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
        devices = backend.collectives.world_size * backend.rows_multiple
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


@dataclass(frozen=True)
class Deviation:
    """The largest differences of a run from its reference; NaN where they cannot be compared.

    ``loss`` and ``grad_norm`` are relative, ``weights`` absolute; ``step`` (from 1) is where the
    loss differs most.
    """

    loss: float
    grad_norm: float
    weights: float
    step: int

    def within(self, bound: float) -> bool:
        """Whether loss, gradient norm and weights are all closer than ``bound``."""
        return all(value <= bound for value in (self.loss, self.grad_norm, self.weights))


def compare(found: Figures, reference: Figures) -> Deviation:
    """The largest deviations of ``found``; figures that are missing count as infinite."""
    losses = _relative(found.loss, reference.loss)
    norms = _relative(found.grad_norm, reference.grad_norm)
    worst = max(range(len(losses)), key=lambda step: losses[step]) if losses else 0
    return Deviation(
        loss=max(losses, default=math.inf),
        grad_norm=max(norms, default=math.inf),
        weights=_weights(found, reference),
        step=worst + 1,
    )


def _relative(found: list[float], reference: list[float]) -> list[float]:
    if not reference or len(found) != len(reference):
        return [math.inf]
    return [
        _finite(abs(one - other) / max(abs(other), 1e-12))
        for one, other in zip(found, reference, strict=True)
    ]


def _weights(found: Figures, reference: Figures) -> float:
    if not reference.weights or found.weights.keys() != reference.weights.keys():
        return math.inf
    return max(
        _finite(float((found.weights[name].double() - weight.double()).abs().max()))
        for name, weight in reference.weights.items()
    )


def _finite(value: float) -> float:
    """NaN compares as false with everything: make it the largest deviation there is."""
    return math.inf if math.isnan(value) else value


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
