"""AdamW for devices that run recorded graphs, and optimizer state made before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor


class GraphAdamW(torch.optim.AdamW):
    """torch's AdamW, where everything that changes from step to step is an input of the graph.

    torch passes learning rate and bias corrections as Python numbers. torch-xla makes one input of
    equal numbers, so that where two happen to be equal (a rate of 0 makes the decay 1) the whole
    step is a different graph, which is compiled once more. Steps are counted on the device, once
    for all parameters of a group, so that a step which is undone there is not counted either.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            count = self.count_of(parameters)
            count += 1
            numbers = _numbers(group, count)
            for parameter in parameters:
                _update(parameter, self.state[parameter], group, numbers)

    def count_of(self, parameters: list[Tensor]) -> Tensor:
        """The parameters' number of steps, an fp64 scalar on their device that all of them share.

        Makes the state of those that have none.
        """
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float64),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        shared: Tensor = self.state[parameters[0]]["step"].to(parameters[0].device, torch.float64)
        for parameter in parameters:
            self.state[parameter]["step"] = shared
        return shared


def _numbers(group: Mapping[str, Any], count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decay factor, step size and the root of the second bias correction, fp32 scalars.

    Computed in fp64, as torch does in Python: 1 - 0.999 has five digits in fp32.
    """
    (beta1, beta2), rate = group["betas"], group["lr"]
    data = torch.tensor([rate, 1 - rate * group["weight_decay"]], dtype=torch.float64)
    rates = data.to(count.device)
    step_size = rates[0] / (1 - beta1**count)
    root = (1 - beta2**count).sqrt()
    return rates[1].float(), step_size.float(), root.float()


def _update(
    parameter: Tensor,
    state: Mapping[str, Any],
    group: Mapping[str, Any],
    numbers: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Decoupled weight decay (Loshchilov and Hutter 2019), in torch's order of operations."""
    (beta1, beta2), (decay, step_size, root) = group["betas"], numbers
    gradient = parameter.grad
    assert gradient is not None
    state["exp_avg"].lerp_(gradient, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    spread = (state["exp_avg_sq"].sqrt() / root).add_(group["eps"])
    parameter.mul_(decay).sub_(step_size * state["exp_avg"] / spread)


def state_tensors(optimizer: Any) -> list[Tensor]:
    """The state's tensors, each once."""
    values = chain.from_iterable(state.values() for state in optimizer.state.values())
    return list({id(value): value for value in values if isinstance(value, Tensor)}.values())


def make_state(optimizer: Any) -> None:
    """Make the optimizer's state now, by a step of length 0 that is not counted.

    Made in the first step, it would be a graph of its own, as large as a step's;
    torch.distributed.checkpoint does the same.
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
