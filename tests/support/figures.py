"""What one rank does in tests of the numbers: train and evaluate, and tell every figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from s2s_scale import Seq2SeqTrainer, Seq2SeqTrainingArguments
from s2s_scale.backends import Backend
from s2s_scale.data.collators import Seq2SeqCollator
from tests.support.training import fresh, history, ragged_rows, settings


def work(backend: Backend, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train, evaluate with and without generated text, and collect every figure."""
    import datasets

    values = settings(folder / "run", **job["arguments"])
    args = Seq2SeqTrainingArguments(**backend.training_overrides(values, trains=True))
    model = fresh(job["family"])
    trainer = Seq2SeqTrainer(
        model=model,
        args=args,
        train_dataset=ragged_rows(model, job["rows"]),
        data_collator=Seq2SeqCollator(model.config.pad_token_id),
        backend=backend,
    )
    trainer.train(resume_from_checkpoint=job.get("resume"))
    evaluation = datasets.Dataset.from_list(ragged_rows(model, job["evaluation_rows"], seed=7))
    metrics = trainer.evaluate(evaluation)
    predictions = trainer.predict(evaluation, max_length=9)
    whole = backend.full_weights(model)
    weights = torch.cat([w.double().flatten() for w in whole.values()] or [torch.empty(0)])
    return {
        "loss": history(trainer, "loss"),
        "nll_loss": history(trainer, "nll_loss"),
        "grad_norm": history(trainer, "grad_norm"),
        "weights": weights.tolist(),
        "eval_loss": metrics["eval_loss"],
        "predictions": predictions.predictions.tolist(),
        # With what a row is filled up, pads or -100, depends on the batch that it was in.
        "labels": [
            [token for token in row if token not in (-100, model.config.pad_token_id)]
            for row in predictions.label_ids.tolist()
        ],
        "world_size": backend.collectives.world_size,
    }
