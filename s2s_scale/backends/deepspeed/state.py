"""State of ZeRO's optimizers by parameter, whatever the stage; used by ``deepspeed`` alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from s2s_scale.backends.deepspeed.patches import link_state
from s2s_scale.errors import UserError


def zero_optimizer(optimizer: Any) -> Any:
    """ZeRO's optimizer, inside the trainer's wrapper and around the one that we made.

    None where the optimizer is a plain one: without ZeRO, in fp32.
    """
    while not hasattr(optimizer, "loss_scaler"):
        optimizer = getattr(optimizer, "optimizer", None)
        if optimizer is None:
            return None
    return optimizer


def flat_parts(zero: Any) -> Iterator[tuple[Tensor, list[nn.Parameter]]]:
    """This rank's flat fp32 pieces, as the optimizer knows them, with the parameters in each.

    Raises:
        UserError: it is none of ZeRO 1, 2 and 3.
    """
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3
        yield from zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
    elif hasattr(zero, "single_partition_of_fp32_groups"):
        yield from zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True)
    else:
        raise UserError(
            f"deepspeed: the state of DeepSpeed's {type(zero).__name__} cannot be read by "
            "parameter, so no checkpoint can be saved; expected ZeRO 1, 2 or 3; use one of them"
        )


def state_by_parameter(zero: Any) -> dict[int, dict[str, Any]]:
    """id of a parameter -> state of the flat piece that it is part of."""
    return {
        id(parameter): zero.optimizer.state.get(flat, {})
        for flat, parameters in flat_parts(zero)
        for parameter in parameters
    }


def make_room(zero: Any, moments: Mapping[int, Mapping[str, Any]]) -> None:
    """Give every flat piece the state that its parameters' saved ``moments`` (by id) ask for.

    ``moments``: name -> number, or None for a tensor of the parameter's size, which becomes zeros
    to be filled part by part. Numbers are set, one for the whole piece.

    Raises:
        UserError: parameters of one piece have taken different numbers of steps.
    """
    for flat, parameters in flat_parts(zero):
        saved = [moments[id(p)] for p in parameters if moments.get(id(p))]
        if not saved:
            continue
        state: dict[str, Any] = {}
        for name in dict.fromkeys(name for values in saved for name in values):
            values = [one[name] for one in saved if name in one]
            if values[0] is None:
                state[name] = torch.zeros_like(flat)
            else:
                state[name] = _common_number(zero.optimizer, name, values)
        zero.optimizer.state[flat] = state
    link_state(zero)


def _common_number(optimizer: Any, name: str, values: list[Any]) -> Any:
    numbers = {float(value) for value in values}
    if len(numbers) > 1:
        raise UserError(
            f"the checkpoint's parameters have different values of the optimizer's '{name}' "
            f"({', '.join(f'{n:g}' for n in sorted(numbers)[:4])}); ZeRO keeps one for all of "
            "them: go on under cpu, cpu-ddp, gpu, gpu-ddp or an OSS profile"
        )
    if name == "step" and type(optimizer).__module__.startswith("torch.optim"):
        return torch.tensor(numbers.pop(), dtype=torch.float32)
    return int(numbers.pop()) if name == "step" else values[0]


def is_whole(value: Any) -> bool:
    """Whether a moment is a tensor of its parameter's size, not a number."""
    return isinstance(value, Tensor) and value.dim() > 0


def read_scale(zero: Any) -> dict[str, float] | None:
    """Scale, steps since it changed, and patience of a dynamic loss scaler; else None."""
    scaler = zero.loss_scaler
    if not getattr(scaler, "dynamic", False):
        return None
    good = scaler.cur_iter - scaler.last_overflow_iter - 1
    return {
        "scale": float(scaler.cur_scale),
        "good_steps": int(good),
        "hysteresis": int(scaler.cur_hysteresis),
    }


def write_scale(zero: Any, values: Mapping[str, float]) -> None:
    """Put back what ``read_scale`` gave, or what a gradient scaler had."""
    scaler = zero.loss_scaler
    if getattr(scaler, "dynamic", False):
        scaler.cur_scale = float(values["scale"])
        scaler.last_overflow_iter = -1
        scaler.cur_iter = int(values["good_steps"])
        scaler.cur_hysteresis = int(values.get("hysteresis", scaler.cur_hysteresis))
