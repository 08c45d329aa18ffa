"""``doctor --parity``: ten training steps under a profile, compared with one process.

A job trains tiny models and records losses, gradient norms and final weights. Each of its cases
starts from the same weights and sees the same rows whatever the backend and the number of ranks, so
that two runs of a job can be compared figure by figure.
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

JOB_FILE = "job.json"
STEPS = 10
BOUNDS = {"cpu": 1e-5, "cuda": 1e-4, "tpu": 1e-4}
ROWS = 100
"""Rows of the training set: not a multiple of a step's rows, so that the last step is short."""
ROWS_ON_A_MESH = 64
"""Rows per step on a mesh; divisible by 2 micro-batches and up to 32 devices."""


@dataclass(frozen=True)
class Case:
    """One training run of a parity job."""

    family: str
    smoothing: float

    def __str__(self) -> str:
        return f"{self.family}, smoothing {self.smoothing:g}"


@dataclass(frozen=True)
class Job:
    """What every rank runs. ``rows_per_step`` is global: over all ranks and micro-batches."""

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
        """Write the job to a file for the ranks to read."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: Path) -> Job:
        """The job that ``write`` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        cases = tuple(Case(**case) for case in values.pop("cases"))
        return cls(cases=cases, **values)


@dataclass
class Figures:
    """Results of one case: one value per step, and the final weights."""

    loss: list[float]
    grad_norm: list[float]
    weights: dict[str, Tensor] = field(default_factory=dict)


def compute(job: Job, backend: Backend, folder: Path) -> None:
    """Run every case; rank 0 writes the figures to ``folder``. Every rank must call it."""
    for number, case in enumerate(job.cases):
        forget_accelerate_settings()
        with tempfile.TemporaryDirectory() as scratch:
            devices = backend.collectives.world_size * backend.rows_multiple
            arguments = _arguments(job, case, devices, scratch)
            # Before the model: DeepSpeed's settings decide how it is built.
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
        figures: dict[str, Any] = {
            name: [float(entry[name]) for entry in logs] for name in ("loss", "grad_norm")
        }
        figures["weights"] = backend.full_weights(model)
        if backend.collectives.rank == 0:
            torch.save(figures, folder / f"{number}.pt")


def read(job: Job, folder: Path) -> list[Figures]:
    """The figures of every case, as ``compute`` wrote them to ``folder``."""
    return [
        Figures(**torch.load(folder / f"{number}.pt", weights_only=True))
        for number in range(len(job.cases))
    ]


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
        # The exact gradient of a key's bias is 0 (softmax is invariant to it): with Adam's usual
        # 1e-8, rounding errors of 1e-9 alone would move it by 1e-5, differently on each rank.
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
    """The largest differences between a run and its reference; infinite if not comparable.

    ``loss`` and ``grad_norm`` are relative, ``weights`` absolute; ``step`` (from 1) is the one at
    which the loss differs most.
    """

    loss: float
    grad_norm: float
    weights: float
    step: int

    def within(self, bound: float) -> bool:
        """Whether loss, gradient norm and weights all differ by at most ``bound``."""
        return all(value <= bound for value in (self.loss, self.grad_norm, self.weights))


def compare(found: Figures, reference: Figures) -> Deviation:
    """The largest deviations of ``found``; missing figures and NaN count as infinite."""

    def relative(ours: list[float], theirs: list[float]) -> list[float]:
        if not theirs or len(ours) != len(theirs):
            return [math.inf]
        pairs = zip(ours, theirs, strict=True)
        return [_finite(abs(one - other) / max(abs(other), 1e-12)) for one, other in pairs]

    losses = relative(found.loss, reference.loss)
    weights = math.inf
    if reference.weights and found.weights.keys() == reference.weights.keys():
        weights = max(
            _finite(float((found.weights[name].double() - weight.double()).abs().max()))
            for name, weight in reference.weights.items()
        )
    return Deviation(
        loss=max(losses),
        grad_norm=max(relative(found.grad_norm, reference.grad_norm)),
        weights=weights,
        step=losses.index(max(losses)) + 1,
    )


def _finite(value: float) -> float:
    """Infinity for NaN, which no comparison would find."""
    return math.inf if math.isnan(value) else value


def job_for(profile: LauncherProfile, *, families: tuple[str, ...], ranks: int) -> Job:
    """Ten steps of each family, with two rows per rank and micro-batch; more rows on a mesh."""
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
    """Run the job under ``launch`` and in one process, and compare the results.

    Raises:
        UserError: one of the two failed; its output shows why.
    """
    job.write(folder / JOB_FILE)
    if start(launch, environ=os.environ).code:
        raise UserError("the run under the profile failed; see its output above")
    found = read(job, folder)
    with tempfile.TemporaryDirectory(prefix="s2s-scale-reference-") as alone:
        dataclasses.replace(job, deepspeed=None).write(Path(alone, JOB_FILE))
        command = [sys.executable, "-m", "s2s_scale.doctor.parity", alone]
        if subprocess.run(command, check=False).returncode:
            raise UserError("the reference run in one process failed; see its output above")
        expected = read(job, Path(alone))
    pairs = zip(job.cases, found, expected, strict=True)
    return {case: compare(one, other) for case, one, other in pairs}


def work(profile: LauncherProfile | None, folder: Path) -> None:
    """Run one rank of the job in ``folder``, or, without a profile, the reference."""
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
