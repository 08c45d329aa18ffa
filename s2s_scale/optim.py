"""Optimizer settings: parameter groups with and without weight decay, and learning-rate schedules.

Schedules are transformers' own functions, under the names of the legacy trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import (
    get_constant_schedule,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_hard_restarts_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
)

from s2s_scale.errors import UserError, unknown_name

arg_to_scheduler: dict[str, Callable[..., LambdaLR]] = {
    "linear": get_linear_schedule_with_warmup,
    "cosine": get_cosine_schedule_with_warmup,
    "cosine_w_restarts": get_cosine_with_hard_restarts_schedule_with_warmup,
    "polynomial": get_polynomial_decay_schedule_with_warmup,
    "constant": get_constant_schedule,
    "constant_w_warmup": get_constant_schedule_with_warmup,
}

OPTIONS = {
    "lr_num_cycles": ("num_cycles", ("cosine", "cosine_w_restarts")),
    "lr_power": ("power", ("polynomial",)),
    "lr_end": ("lr_end", ("polynomial",)),
}
"""Training argument: (keyword of the schedule, schedules that take it)."""


def build_schedule(
    name: str,
    optimizer: Optimizer,
    *,
    num_warmup_steps: int,
    num_training_steps: int,
    **options: Any,
) -> LambdaLR:
    """The learning-rate schedule ``name`` of ``optimizer``.

    Args:
        name: a key of ``arg_to_scheduler``.
        optimizer: the optimizer.
        num_warmup_steps: optimizer steps of linear warm-up.
        num_training_steps: optimizer steps in all.
        options: ``num_cycles`` (cosine: waves; cosine_w_restarts: restarts), ``power`` and
            ``lr_end`` (polynomial).

    Raises:
        UserError: the name is unknown.
    """
    if name not in arg_to_scheduler:
        raise unknown_name("learning-rate schedule", name, arg_to_scheduler)
    make = arg_to_scheduler[name]
    if name == "constant":
        return make(optimizer)
    if name == "constant_w_warmup":
        return make(optimizer, num_warmup_steps=num_warmup_steps)
    if name == "cosine_w_restarts" and "num_cycles" in options:
        options["num_cycles"] = int(options["num_cycles"])
    return make(
        optimizer,
        num_warmup_steps=num_warmup_steps,
        num_training_steps=num_training_steps,
        **options,
    )


TORCH_NORMS: tuple[type[nn.Module], ...] = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises activations: one of torch's, or of a class named ``…Norm``.

    The class decides, not the attribute's name, which differs between models: ``layer_norm`` in T5,
    ``self_attn_layer_norm`` in BART.
    """
    return isinstance(module, TORCH_NORMS) or type(module).__name__.endswith("Norm")


def decay_parameter_names(model: nn.Module) -> list[str]:
    """Names of the parameters with weight decay: all but those of norms and biases.

    T5's ``relative_attention_bias`` is an embedding table, but it is added to the attention scores
    and counts as a bias, as in transformers.
    """
    names = []
    for module_name, module in model.named_modules():
        if is_norm(module) or module_name.endswith("relative_attention_bias"):
            continue
        for name, _ in module.named_parameters(recurse=False):
            if name != "bias" and not name.endswith("_bias"):
                names.append(f"{module_name}.{name}" if module_name else name)
    return names


def parameter_groups(
    model: nn.Module, weight_decay: float, decaying: Iterable[str] | None = None
) -> list[dict[str, Any]]:
    """Two optimizer groups over the trainable parameters: with decay, and without.

    ``decaying``: names of the parameters with decay; by default ``decay_parameter_names``. Shared
    (tied) tensors appear once. A group with no parameter is left out.

    Raises:
        UserError: nothing is trainable.
    """
    decaying = set(decay_parameter_names(model) if decaying is None else decaying)
    groups: dict[float, list[torch.Tensor]] = {weight_decay: [], 0.0: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[weight_decay if name in decaying else 0.0].append(parameter)
    if not any(groups.values()):
        raise UserError(
            "the model has no parameter left to train: everything is frozen; drop "
            "--freeze_encoder or --freeze_embeds"
        )
    return [
        {"params": parameters, "weight_decay": decay}
        for decay, parameters in groups.items()
        if parameters
    ]


REMEDIES = {
    "optim": "expected an optimizer that is installed here; choose another --optim or install what "
    "it needs",
    "lr_scheduler_type": "give what it needs in --lr_scheduler_kwargs, or choose another "
    "--lr_scheduler",
}


@contextmanager
def refused_as_option(option: str, value: Any) -> Iterator[None]:
    """Turn what is raised for a choice of optimizer or schedule into a ``UserError``.

    ``option``: ``optim`` or ``lr_scheduler_type``, with the ``value`` that was chosen.
    """
    try:
        yield
    except UserError:
        raise
    except (ImportError, TypeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{option}={getattr(value, 'value', value)}: {reason}; {REMEDIES[option]}"
        ) from error
