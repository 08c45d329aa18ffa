"""Tiny models that end their rows by themselves, each after its own number of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from s2s_scale.models import decoder_inputs_from_labels
from s2s_scale.models.tiny import ragged_rows
from tests.support.families import tiny_model


def padded(rows: list[list[int]], value: int, *, width: int = 0) -> Tensor:
    """Rows of different lengths as one tensor, at least ``width`` wide."""
    width = max(width, *map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def sources(model: PreTrainedModel, count: int, *, seed: int, width: int = 0) -> dict[str, Tensor]:
    """input_ids and attention_mask of ragged random rows."""
    ids = [row["input_ids"] for row in ragged_rows(model, count, seed=seed, longest=14)]
    return {
        "input_ids": padded(ids, model.config.pad_token_id, width=width),
        "attention_mask": padded([[1] * len(row) for row in ids], 0, width=width),
    }


def ending_model(family: str, *, steps: int = 60, **options: Any) -> PreTrainedModel:
    """A tiny model that was trained on ragged targets: the same for the same arguments."""
    model = tiny_model(family, **options)
    pad = int(model.config.pad_token_id)
    rows = ragged_rows(model, 16, seed=3)
    ids = [row["input_ids"] for row in rows]
    labels = padded([row["labels"] for row in rows], -100)
    inputs = {
        "input_ids": padded(ids, pad),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
        "decoder_input_ids": decoder_inputs_from_labels(model, labels, pad),
        "use_cache": False,
    }
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        logits = model(**inputs).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False)


def text_lengths(tokens: Tensor, model: PreTrainedModel) -> list[int]:
    """Tokens of each row up to its first end token, or all of them."""
    ends = (tokens[:, 1:] == model.config.eos_token_id).int()
    unended = (ends.cumsum(1) == 0).sum(1)
    return [int(length) for length in unended]
