"""Under which keys transformers saves a model's weights, and from which tensors they come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion


@dataclass(frozen=True)
class WeightKeys:
    """What a model's weight file holds.

    Attributes:
        of_parameter: name in ``model.named_parameters()`` -> key in the file. Parameters that
            transformers computes anew (such as sinusoidal positions) have none.
        buffers: keys of buffers that are saved.
        converts: whether transformers saves other tensors than the model holds; the keys are then
            those before its conversion.
    """

    of_parameter: dict[str, str] = field(default_factory=dict)
    buffers: tuple[str, ...] = ()
    converts: bool = False


def weight_keys(model: nn.Module) -> WeightKeys:
    """The keys of ``model``, the same whether its weights are whole here or shared out."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    left_out = tied | set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    of_parameter = {}
    for name, parameter in model.named_parameters():
        kept = [alias for alias in aliases[id(parameter)] if alias not in left_out]
        if kept:
            of_parameter[name] = kept[0]
    names = {alias for same in aliases.values() for alias in same}
    buffers = tuple(key for key in model.state_dict() if key not in names | left_out)
    keys = [*of_parameter.values(), *buffers]
    return WeightKeys(
        of_parameter, buffers, converts=set(reverted(model, _empty(keys))) != set(keys)
    )


def reverted(model: nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``weights`` as transformers saves them: what it converted at loading is converted back."""
    if not hasattr(model, "config"):
        return weights
    revert: Callable[[Any, Any], dict[str, torch.Tensor]] = revert_weight_conversion
    return revert(model, weights)


def _empty(keys: list[str]) -> dict[str, torch.Tensor]:
    return {key: torch.empty(2, 2, device="meta") for key in keys}
