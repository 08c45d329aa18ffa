"""An optimizer's state made before the first step, for devices that run recorded graphs."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from s2s_scale.backends.graph_adamw import GraphAdamW


def state_tensors(optimizer: Any) -> list[Tensor]:
    """The state's tensors, each once."""
    values = chain.from_iterable(state.values() for state in optimizer.state.values())
    return list({id(value): value for value in values if isinstance(value, Tensor)}.values())


def make_state(optimizer: Any) -> None:
    """Have the optimizer make its state now, by a step of length 0, and count that step as none.

    Made in the first step, it would be a graph of its own, as large as a step's
    (torch.distributed.checkpoint does the same).
    """
    if optimizer.state:
        if isinstance(optimizer, GraphAdamW):  # a checkpoint's counts come in CPU tensors
            for group in optimizer.param_groups:
                optimizer.count_of([p for p in group["params"] if p in optimizer.state])
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    rates = [group["lr"] for group in optimizer.param_groups]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] *= 0
    optimizer.zero_grad(set_to_none=True)
