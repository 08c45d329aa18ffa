"""Which parameters decay: groups for AdamW and Adafactor, decided by module type."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

TORCH_NORMS: tuple[type[nn.Module], ...] = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises activations: torch's own, or a model's class named ``…Norm``.

    The class decides, not the attribute's name: T5 calls it ``layer_norm``, BART
    ``self_attn_layer_norm``, and a name pattern that catches one misses the next.
    """
    return isinstance(module, TORCH_NORMS) or type(module).__name__.endswith("Norm")


def decay_parameter_names(model: nn.Module) -> list[str]:
    """Names of the parameters that weight decay shrinks: all but biases and norms.

    T5's ``relative_attention_bias`` is stored as an embedding table but is added to the attention
    scores, so it counts as a bias, as in transformers.
    """
    names = []
    for module_name, module in model.named_modules():
        if is_norm(module) or module_name.endswith("relative_attention_bias"):
            continue
        for name, _ in module.named_parameters(recurse=False):
            if name != "bias" and not name.endswith("_bias"):
                names.append(f"{module_name}.{name}" if module_name else name)
    return names


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimizer groups over the trainable parameters: with decay, and without.

    Shared (tied) tensors appear once. A group with no parameter is left out.
    """
    decaying = set(decay_parameter_names(model))
    groups: dict[float, list[torch.Tensor]] = {weight_decay: [], 0.0: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[weight_decay if name in decaying else 0.0].append(parameter)
    return [
        {"params": parameters, "weight_decay": decay}
        for decay, parameters in groups.items()
        if parameters
    ]
