"""AdamW for devices that run recorded graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class GraphAdamW(torch.optim.AdamW):
    """torch's AdamW, with what changes from step to step as data of the graph.

    torch hands learning rate and bias corrections over as Python numbers. torch-xla keeps one
    datum for equal numbers, so that where two happen to be equal (a rate of 0 makes the decay 1)
    the whole step is another graph, which is compiled for itself.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            numbers: dict[float, Tensor] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter] or self._new_state(parameter)
                state["step"] += 1
                count = float(state["step"])
                if count not in numbers:
                    numbers[count] = _adam_numbers(group, count).to(parameter.device)
                _adam_update(parameter, state, group, numbers[count])

    def _new_state(self, parameter: Tensor) -> dict[str, Any]:
        self.state[parameter] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
        return self.state[parameter]


def _adam_numbers(group: Mapping[str, Any], count: float) -> Tensor:
    """Decay factor, step size and the root of the second bias correction, fp32 [3]."""
    (beta1, beta2), rate = group["betas"], group["lr"]
    step_size = rate / (1 - beta1**count)
    return torch.tensor([1 - rate * group["weight_decay"], step_size, (1 - beta2**count) ** 0.5])


def _adam_update(
    parameter: Tensor, state: Mapping[str, Any], group: Mapping[str, Any], numbers: Tensor
) -> None:
    """Decoupled weight decay (Loshchilov and Hutter 2019), in torch's order of operations."""
    beta1, beta2 = group["betas"]
    gradient = parameter.grad
    assert gradient is not None
    state["exp_avg"].lerp_(gradient, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    spread = (state["exp_avg_sq"].sqrt() / numbers[2]).add_(group["eps"])
    parameter.mul_(numbers[0]).sub_(numbers[1] * state["exp_avg"] / spread)
