"""One rank of the tests of moves: a run whose rows are noted, interrupted where it is told to."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from s2s_scale import Seq2SeqTrainer, Seq2SeqTrainingArguments
from s2s_scale.backends import Backend
from s2s_scale.data.collators import SEGMENT_IDS, Seq2SeqCollator
from s2s_scale.models.tiny import ragged_rows, tiny_model
from tests.support.training import settings


class Interrupted(Exception):
    """Ends a run in the middle of an epoch, as a lost machine would."""


class Ledger(TrainerCallback):
    """Rows of every step that was completed, on this rank; ends the run where it is told to."""

    def __init__(self, rows: list[Any], stop_at: int | None) -> None:
        self.number = {
            (tuple(row["input_ids"]), tuple(row["labels"])): n for n, row in enumerate(rows)
        }
        assert len(self.number) == len(rows), "no row is there twice"
        self.stop_at = stop_at
        self.read: list[int] = []
        self.steps: dict[int, list[int]] = {}

    def see(self, batch: Any, pad: int) -> None:
        """Note the rows of a batch by their tokens; rows that only fill a shape are none."""
        if batch["input_ids"].device.type != "cpu":
            return  # reading it would be one more graph
        sides = (batch[name].tolist() for name in ("input_ids", "labels"))
        for number, (source, labels) in enumerate(zip(*sides, strict=True)):
            if SEGMENT_IDS[0] in batch:
                ids = [batch[name][number].tolist() for name in SEGMENT_IDS]
                self._see_packed(source, labels, *ids)
                continue
            key = tuple(t for t in source if t != pad), tuple(t for t in labels if t != -100)
            if key in self.number:
                self.read.append(self.number[key])

    def _see_packed(self, source: Any, labels: Any, sources: Any, targets: Any) -> None:
        """Note the rows that share a packed one: ``sources``, ``targets`` tell them apart."""
        for pair in sorted(set(sources) - {0}):
            key = (
                tuple(t for t, of in zip(source, sources, strict=True) if of == pair),
                tuple(t for t, of in zip(labels, targets, strict=True) if of == pair),
            )
            self.read.append(self.number[key])

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.read.clear()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.stop_at:
            raise Interrupted

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps[state.global_step] = list(self.read)
        self.read.clear()


class Watched(Seq2SeqTrainer):
    """Our trainer, whose batches are shown to a ledger when they are trained on."""

    ledger: Ledger

    def training_step(self, model: Any, inputs: Any, *args: Any, **more: Any) -> Any:
        self.ledger.see(inputs, self.config.pad_token_id)
        return super().training_step(model, inputs, *args, **more)


def work(backend: Backend, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One run; its losses by step, its ledger, and where its final weights are."""
    values = settings(Path(job.get("output") or folder), **job["arguments"])
    devices = backend.collectives.world_size * backend.rows_multiple
    if "tokens_per_step" not in values:
        values["per_device_train_batch_size"] = job["rows_per_step"] // devices
    args = Seq2SeqTrainingArguments(**backend.training_overrides(values, trains=True))
    model = tiny_model(job.get("family", "t5")).train()
    rows = ragged_rows(model, job["rows"])
    ledger = Ledger(rows, job.get("stop_at"))
    trainer = Watched(
        model=model,
        args=args,
        train_dataset=rows,
        data_collator=Seq2SeqCollator(model.config.pad_token_id),
        backend=backend,
        callbacks=[ledger],
    )
    trainer.ledger = ledger
    with contextlib.suppress(Interrupted):
        trainer.train(resume_from_checkpoint=job.get("resume"))
    weights = backend.full_weights(trainer.model)
    file = folder.parent / f"{folder.name}.pt"
    if backend.collectives.rank == 0:
        torch.save(weights, file)
    parts = backend.collectives.gather_objects(ledger.steps)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": {entry["step"]: entry["loss"] for entry in history},
        "grad_norms": {entry["step"]: entry["grad_norm"] for entry in history},
        "ledger": {s: sorted(row for part in parts for row in part[s]) for s in parts[0]},
        "weights": str(file),
    }
