"""Learning-rate schedules by name, made by transformers' own functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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

from s2s_scale.errors import unknown_name

arg_to_scheduler: dict[str, Callable[..., LambdaLR]] = {
    "linear": get_linear_schedule_with_warmup,
    "cosine": get_cosine_schedule_with_warmup,
    "cosine_w_restarts": get_cosine_with_hard_restarts_schedule_with_warmup,
    "polynomial": get_polynomial_decay_schedule_with_warmup,
    "constant": get_constant_schedule,
    "constant_w_warmup": get_constant_schedule_with_warmup,
}

MODERN_NAMES = {
    "linear": "linear",
    "cosine": "cosine",
    "cosine_w_restarts": "cosine_with_restarts",
    "polynomial": "polynomial",
    "constant": "constant",
    "constant_w_warmup": "constant_with_warmup",
}
"""Our name -> transformers' ``lr_scheduler_type``."""

OPTIONS = {
    "lr_num_cycles": ("num_cycles", ("cosine", "cosine_w_restarts")),
    "lr_power": ("power", ("polynomial",)),
    "lr_end": ("lr_end", ("polynomial",)),
}
"""Training argument -> (keyword of the schedule, schedules that take it)."""


def build_schedule(
    name: str,
    optimizer: Optimizer,
    *,
    num_warmup_steps: int,
    num_training_steps: int,
    **options: Any,
) -> LambdaLR:
    """The schedule ``name`` over ``optimizer``, counted in optimizer steps.

    ``options`` are ``num_cycles`` (cosine: waves; cosine_w_restarts: number of restarts),
    ``power`` and ``lr_end`` (polynomial).

    Raises:
        UserError: the name is none of ``arg_to_scheduler``.
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
