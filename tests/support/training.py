"""Rows and trainers for tests that train tiny models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from s2s_scale import Seq2SeqTrainer, Seq2SeqTrainingArguments
from s2s_scale.data.collators import Seq2SeqCollator
from s2s_scale.models import decoder_inputs_from_labels
from s2s_scale.models.tiny import ragged_rows
from tests.support.adam import ADAM_EPSILON, LEARNING_RATE
from tests.support.families import tiny_model

__all__ = [
    "Spoilt",
    "Unpacked",
    "fresh",
    "history",
    "our_trainer",
    "ragged_rows",
    "settings",
    "stock_trainer",
]


def settings(folder: Path, **values: Any) -> dict[str, Any]:
    """Training arguments for a quiet, deterministic run on the CPU that logs each step.

    With Adam its weights can be compared by ``tests.support.adam.assert_same_weights``.
    """
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": LEARNING_RATE,
        "adam_epsilon": ADAM_EPSILON,
        "log_level": "error",
        **values,
    }


class Unpacked(Seq2SeqTrainer):
    """Our trainer with the packed plan's steps, but each pair in a row of its own."""

    def get_train_dataloader(self) -> Any:
        collate = Seq2SeqCollator(self.config.pad_token_id)
        nothing = {"input_ids": [self.config.eos_token_id], "labels": [-100]}
        loader = super().get_train_dataloader()
        loader.collate_fn = lambda pairs: collate(list(pairs) or [nothing])
        return loader


class Spoilt(Seq2SeqTrainer):
    """At some steps (``spoilt``: step -> how) the loss is another one.

    nan: it is no number on the last rank alone. inf: it is infinite there, its gradients are what
    they were. spike: a hundred times what it is, on all ranks.
    """

    spoilt: Mapping[str, str] = {}

    # Not ``compute_loss``: the trainer takes other ways where a subclass has one of its own.
    def _compute_loss(self, *args: Any, **more: Any) -> Any:
        loss, logits = super()._compute_loss(*args, **more)
        return self._spoilt(loss), logits

    def _spoilt(self, loss: Any) -> Any:
        how = self.spoilt.get(str(self.state.global_step + 1)) if self.is_in_train else None
        if how == "spike":
            return loss * 100.0
        if how is None or self.backend.collectives.rank < self.backend.collectives.world_size - 1:
            return loss
        return loss * math.nan if how == "nan" else loss + math.inf


def our_trainer(
    model: PreTrainedModel, folder: Path, rows: Any, *, data_args: Any = None, **values: Any
) -> Seq2SeqTrainer:
    """Our trainer over ``rows``; keywords that are no training argument go to the trainer."""
    own = {"eval_dataset", "compute_metrics", "callbacks", "text_evaluation_for", "tokenizer"}
    trainer_only = {name: values.pop(name) for name in list(values) if name in own}
    return Seq2SeqTrainer(
        model=model,
        data_args=data_args,
        args=Seq2SeqTrainingArguments(**settings(folder, **values)),
        train_dataset=rows,
        data_collator=Seq2SeqCollator(model.config.pad_token_id),
        **trainer_only,
    )


def stock_trainer(
    model: PreTrainedModel, folder: Path, rows: Any, **values: Any
) -> transformers.Seq2SeqTrainer:
    """transformers' own trainer on the same rows.

    Its batches carry decoder inputs: it fails without them under label smoothing, and FSMT would
    feed its decoder the source.
    """
    collate = Seq2SeqCollator(model.config.pad_token_id)

    def with_decoder_inputs(batch: list[Any]) -> dict[str, torch.Tensor]:
        tensors = collate(batch)
        tensors["decoder_input_ids"] = decoder_inputs_from_labels(
            model, tensors["labels"], model.config.pad_token_id
        )
        return tensors

    return transformers.Seq2SeqTrainer(
        model=model,
        args=transformers.Seq2SeqTrainingArguments(**settings(folder, **values)),
        train_dataset=rows,
        data_collator=with_decoder_inputs,
    )


def history(trainer: transformers.Trainer, name: str) -> list[float]:
    """The values of ``name`` over the training logs."""
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry and name in entry]


def fresh(family: str, **options: Any) -> PreTrainedModel:
    """A tiny model in training mode."""
    return tiny_model(family, **options).train()
