"""One rank of the tests of what each rank holds: our trainer, watched at every step."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from s2s_scale import Seq2SeqTrainer, Seq2SeqTrainingArguments
from s2s_scale.backends import Backend
from s2s_scale.data.collators import Seq2SeqCollator
from s2s_scale.trainer import bad_steps
from s2s_scale.trainer.bad_steps import SpikeDetector
from tests.support.families import tiny_model
from tests.support.training import Spoilt, Unpacked, history, ragged_rows, settings
from tests.support.worker import run_jobs


def work(backend: Backend, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train, and collect what the ranks held after each step."""
    values = settings(folder, **job["arguments"])
    args = Seq2SeqTrainingArguments(**backend.training_overrides(values, trains=True))
    model = tiny_model(job.get("family", "t5"), d_model=32, layers=3, vocab_size=64).train()
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    numbers = [math.prod(shape) for shape in shapes]
    watcher = Watcher(backend, replicas=job.get("replicas", True))
    if job.get("fp16_anywhere"):
        allow_fp16()
    if job.get("spike_window"):
        short = functools.partial(SpikeDetector, window=job["spike_window"])
        bad_steps.SpikeDetector = short  # type: ignore[misc,assignment]
    kind = Unpacked if job.get("unpacked") else Spoilt
    trainer = kind(
        model=model,
        args=args,
        train_dataset=ragged_rows(model, 31),
        data_collator=Seq2SeqCollator(model.config.pad_token_id),
        backend=backend,
        callbacks=[watcher],
    )
    trainer.spoilt = job.get("spoilt", {})
    assert trainer.is_deepspeed_enabled == (job["backend"] == "deepspeed"), "left by another run"
    trainer.train(resume_from_checkpoint=job.get("resume"))
    whole = backend.full_weights(model)
    return {
        "bad_steps": trainer.parts.bad_steps.table(),
        "logits": first_logits(trainer) if job.get("logits") else [],
        "loss": history(trainer, "loss"),
        "grad_norm": history(trainer, "grad_norm"),
        "learning_rate": history(trainer, "learning_rate"),
        "overflow_steps": history(trainer, "overflow_steps"),
        "weights": [value for weight in whole.values() for value in weight.flatten().tolist()],
        "replicas_equal": watcher.equal,
        "held": backend.collectives.gather_objects(watcher.held),
        "gradients": backend.collectives.gather_objects(watcher.gradients),
        "parameters": backend.collectives.gather_objects(held_parameters(model)),
        "whole_parameters": sum(numbers),
        "largest_share": max(numbers) / sum(numbers),
    }


def run_all(
    folder: Path, runs: dict[str, dict[str, Any]], *, ranks: int
) -> dict[str, dict[str, Any]]:
    """Do these runs on so many ranks of this machine; name -> result.

    A run has ``backend`` and ``arguments`` (training arguments), and maybe ``family``, ``resume``
    (a checkpoint), ``replicas`` (False: the ranks' weights are not compared), ``fp16_anywhere``,
    ``unpacked`` (the packed plan's steps without packing), ``logits`` (of a batch, at the end),
    ``spoilt`` (see ``Spoilt``) and ``spike_window`` (how many losses a spike is compared with).
    Its output folder is ``folder / name``.
    """
    work = "tests.support.shares:work"
    return run_jobs(work, runs, ranks=ranks, folder=folder, limit=300)[0]


def first_logits(trainer: Seq2SeqTrainer) -> list[float]:
    """Logits at this rank's targets of its first micro-batch, pair after pair."""
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        _, outputs = trainer.compute_loss(trainer.model_wrapped, batch, return_outputs=True)
    found: list[float] = outputs.logits[batch["labels"] != -100].flatten().tolist()
    return found


class Watcher(TrainerCallback):
    """At each step: are the ranks' weights the same to the bit; how much is held here."""

    def __init__(self, backend: Backend, *, replicas: bool) -> None:
        self.backend = backend
        self.replicas = replicas
        self.equal: list[bool] = []
        self.held = 0
        self.gradients = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        optimizer = objects["optimizer"].optimizer
        if not hasattr(optimizer, "averaged_gradients"):
            return
        step = optimizer.step

        def counted() -> None:
            flat = [t for part in optimizer.averaged_gradients.values() if part for t in part]
            own = [p.grad for p in objects["model"].parameters() if p.grad is not None]
            self.gradients = sum(t.numel() for t in [*flat, *own] if t is not None)
            step()

        optimizer.step = counted

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        if not hasattr(objects["optimizer"].optimizer, "averaged_gradients"):
            gradients = [p.grad for p in objects["model"].parameters() if p.grad is not None]
            self.gradients = sum(held_here(gradient).numel() for gradient in gradients)

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        if self.replicas:
            weights = torch.cat([p.detach().flatten() for p in objects["model"].parameters()])
            copies = self.backend.collectives.gather_objects(weights.numpy().tobytes())
            self.equal.append(len(set(copies)) == 1)
        optimizer = objects["optimizer"]
        while hasattr(optimizer, "optim") or hasattr(optimizer, "optimizer"):
            optimizer = getattr(optimizer, "optim", None) or optimizer.optimizer
        self.held = sum(
            held_here(value).numel()
            for values in optimizer.state.values()
            for value in values.values()
            if isinstance(value, torch.Tensor) and value.dim() > 0
        )


def held_parameters(model: torch.nn.Module) -> int:
    """Numbers of parameters that this rank keeps between steps."""
    return sum(held_here(parameter).numel() for parameter in model.parameters())


def held_here(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that ZeRO 3 or FSDP2 has sharded; any other tensor itself."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return getattr(tensor, "ds_tensor", tensor)


def allow_fp16() -> None:
    """Let DeepSpeed compute in fp16 on a CPU: slow, but the loss scaler is the GPU's."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    CPU_Accelerator.is_fp16_supported = lambda self: True
    CPU_Accelerator.supported_dtypes = lambda self: [torch.float32, torch.bfloat16, torch.half]
