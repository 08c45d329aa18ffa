"""Training encoder-decoder models with the same numbers on whatever hardware one has."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from s2s_scale.arguments import Seq2SeqTrainingArguments
    from s2s_scale.loss.losses import label_smoothed_nll_loss
    from s2s_scale.optim import arg_to_scheduler
    from s2s_scale.trainer import Seq2SeqTrainer

# Loaded at first use: importing the package for its command line must not import torch.
_HOMES = {
    "Seq2SeqTrainer": "s2s_scale.trainer",
    "Seq2SeqTrainingArguments": "s2s_scale.arguments",
    "label_smoothed_nll_loss": "s2s_scale.loss.losses",
    "arg_to_scheduler": "s2s_scale.optim",
}

__all__ = [
    "Seq2SeqTrainer",
    "Seq2SeqTrainingArguments",
    "__version__",
    "arg_to_scheduler",
    "label_smoothed_nll_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 's2s_scale' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
