"""One rank of the OSS tests: our trainer over ShardedOptimizer, watched after every step.

Usage: python -m tests.support.oss_worker JOB.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from s2s_scale import Seq2SeqTrainer, Seq2SeqTrainingArguments
from s2s_scale.backends import Backend, make_backend
from s2s_scale.data.collate import Seq2SeqCollator
from tests.support.families import tiny_model
from tests.support.training import history, ragged_rows, settings


def main(path: Path) -> None:
    """Train with the job's backend; rank 0 writes ``result.json`` beside the job."""
    job: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    backend = make_backend(job["backend"])
    backend.prepare_process()
    try:
        result = run(job, path.parent, backend)
        if backend.data_rank == 0:
            (path.parent / "result.json").write_text(json.dumps(result), encoding="utf-8")
    finally:
        backend.close()


def run(job: dict[str, Any], folder: Path, backend: Backend) -> dict[str, Any]:
    """Train, and collect what the ranks held after each step."""
    model = tiny_model("t5", d_model=32, layers=3, vocab_size=64).train()
    args = Seq2SeqTrainingArguments(**settings(folder / "run", **job["arguments"]))
    watcher = Watcher(backend)
    trainer = Seq2SeqTrainer(
        model=model,
        args=args,
        train_dataset=ragged_rows(model, 31),
        data_collator=Seq2SeqCollator(model.config.pad_token_id),
        backend=backend,
        callbacks=[watcher],
    )
    trainer.train(resume_from_checkpoint=job.get("resume"))
    numbers = [parameter.numel() for parameter in model.parameters()]
    return {
        "loss": history(trainer, "loss"),
        "grad_norm": history(trainer, "grad_norm"),
        "weights": torch.cat([p.detach().double().flatten() for p in model.parameters()]).tolist(),
        "replicas_equal": watcher.equal,
        "held": backend.gather_objects(watcher.held),
        "largest_share": max(numbers) / sum(numbers),
    }


class Watcher(TrainerCallback):
    """After each step: are the ranks' weights the same to the bit; how much state is held here."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.equal: list[bool] = []
        self.held = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        weights = torch.cat([p.detach().flatten() for p in objects["model"].parameters()])
        replicas = self.backend.gather_objects(weights.numpy().tobytes())
        self.equal.append(len(set(replicas)) == 1)
        optimizer = objects["optimizer"]
        while hasattr(optimizer, "optim") or hasattr(optimizer, "optimizer"):
            optimizer = getattr(optimizer, "optim", None) or optimizer.optimizer
        self.held = sum(
            value.numel()
            for values in optimizer.state.values()
            for value in values.values()
            if isinstance(value, torch.Tensor) and value.dim() > 0
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
