"""Runs of our trainer on virtual XLA devices, or on the CPU: what tests/xla looks at.

A job has ``backend`` ("xla:data", "xla:fsdp" or "local"), ``family``, ``longest`` row, ``rows``,
``arguments`` for training, ``resume`` (a checkpoint's folder), ``evaluate`` (train, then evaluate),
``unpacked`` (the packed plan's steps without packing), ``weights`` (tell all of them) and
``spoilt`` (see ``Spoilt``).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from s2s_scale import Seq2SeqTrainer, Seq2SeqTrainingArguments
from s2s_scale.backends import Backend
from s2s_scale.data.collators import Seq2SeqCollator
from s2s_scale.settings.profiles import resolve
from tests.support import worker
from tests.support.training import Spoilt, Unpacked, history, ragged_rows, settings


def run_job(job: dict[str, Any], folder: Path, *, devices: int = 4) -> Any:
    """Run one job in a process of its own, on so many virtual devices; what it wrote."""
    return run_jobs({"job": job}, folder, devices=devices)["job"]


def run_jobs(
    jobs: dict[str, dict[str, Any]], folder: Path, *, devices: int = 4, limit: float = 400
) -> dict[str, Any]:
    """Run jobs of one backend in one process, one after the other; what they wrote, by name."""
    work, environment = "tests.support.xla_training:work", virtual_devices(devices)
    return worker.run_jobs(work, jobs, folder=folder, limit=limit, environment=environment)[0]


def virtual_devices(count: int) -> dict[str, str]:
    """The variables of profile cpu-xla, for so many devices."""
    return {**resolve("cpu-xla").environment, "CPU_NUM_DEVICES": str(count)}


class Counter(TrainerCallback):
    """Compilations before the first step and after each, and seconds until each step's end."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.before = 0
        self.counts: list[int] = []
        self.seconds: list[float] = []
        self.started = time.perf_counter()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not self.counts:
            self.before = self.backend.compilations()[0]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.counts.append(self.backend.compilations()[0])
        self.seconds.append(time.perf_counter() - self.started)


def work(backend: Backend, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train, and tell what it took and gave."""
    from tests.support.families import tiny_model

    values = settings(folder / "run", **job["arguments"])
    args = Seq2SeqTrainingArguments(**backend.training_overrides(values, trains=True))
    model = tiny_model(job.get("family", "t5"), d_model=32).train()
    rows = ragged_rows(model, job.get("rows", 200), longest=job.get("longest", 10))
    counter = Counter(backend)
    kind: Any = Unpacked if job.get("unpacked") else Spoilt
    trainer = kind(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=rows[:21],
        data_collator=Seq2SeqCollator(model.config.pad_token_id),
        backend=backend,
        callbacks=[counter],
    )
    trainer.spoilt = job.get("spoilt", {})
    trainer.train(resume_from_checkpoint=job.get("resume"))
    trainer.save_model()
    metrics = trainer.evaluate() if job.get("evaluate") else {}
    return {
        "loss": history(trainer, "loss"),
        "grad_norm": history(trainer, "grad_norm"),
        "before": counter.before,
        "counts": counter.counts,
        "seconds": counter.seconds,
        "compilations": backend.compilations()[0],
        "shapes": len(trainer.parts.compilations.shapes("training")),
        "evaluation_shapes": len(trainer.parts.compilations.shapes("evaluation")),
        "nonfinite": trainer.parts.bad_steps.nonfinite,
        "weights": weights_of(trainer, backend) if job.get("weights") else [],
        "metrics": {name: value for name, value in metrics.items() if name.endswith("loss")},
        **(_of_devices(trainer) if job["backend"].startswith("xla") else {}),
    }


def weights_of(trainer: Seq2SeqTrainer, backend: Backend) -> list[float]:
    """All weights, one after the other."""
    whole = backend.full_weights(trainer._plain_model()).values()
    return [value for weight in whole for value in weight.flatten().tolist()]


def _of_devices(trainer: Seq2SeqTrainer) -> dict[str, Any]:
    import torch_xla.debug.metrics as metrics

    names = [name for name in metrics.counter_names() if name.startswith("PersistentCache")]
    return {
        "held": held_per_device(trainer),
        "cache": {name: metrics.counter_value(name) for name in names},
    }


def held_per_device(trainer: Seq2SeqTrainer) -> dict[str, Any]:
    """Bytes of weights and of moments: all, on the first device, and of what cannot be divided."""
    import torch_xla
    from torch_xla.distributed.spmd import wrap_if_sharded

    optimizer = trainer.optimizer.optimizer
    tensors = {
        "weights": list(trainer.model.parameters()),
        "moments": [
            value
            for state in optimizer.state.values()
            for name, value in state.items()
            if name != "step" and value.device.type == "xla"
        ],
    }
    devices = torch_xla.runtime.global_runtime_device_count()
    found: dict[str, Any] = {"specs": []}
    for name, held in tensors.items():
        whole = first = stuck = 0
        for tensor in held:
            size = tensor.numel() * tensor.element_size()
            spec = torch_xla._XLAC._get_xla_sharding_spec(tensor)
            divided = "devices=" in spec
            whole += size
            first += (
                wrap_if_sharded(tensor).local_shards[0].data.numel() * tensor.element_size()
                if divided
                else size
            )
            stuck += 0 if any(length % devices == 0 for length in tensor.shape) else size
            found["specs"].append(spec)
        found[name] = {"whole": whole, "first": first, "stuck": stuck}
    return found
