"""Putting ZeRO's update off until its step has been looked at; used by ``deepspeed`` alone."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor


class HeldUpdate:
    """The update that DeepSpeed's engine makes at the end of the backward pass, put off.

    What the engine calls only computes the norm of the gradients, once; ``make`` does the rest when
    the trainer calls its optimizer, and ``drop`` clears the gradients in place of that. Every rank
    must call them.

    Args:
        zero: the optimizer of ZeRO 1, 2 or 3.
        wrapper: the trainer's optimizer around it, whose own ``step`` does nothing.
    """

    def __init__(self, zero: Any, wrapper: Any) -> None:
        self._zero = zero
        self._update, self._clear = zero.step, zero.zero_grad
        self._update_scale: Callable[[bool], None] = zero._update_scale
        self._waits = self._drops = self._overflow = False
        zero.step, zero.zero_grad = self._hold, self._keep
        zero._update_scale = self._decide
        # A method of the wrapper's own: torch's schedules bind it to the wrapper once more.
        wrapper.step = MethodType(lambda _, closure=None: self.make(), wrapper)

    def belongs_to(self, zero: Any) -> bool:
        """Whether it is this optimizer's update."""
        return self._zero is zero

    def make(self) -> None:
        """Make the update that waits, if one does."""
        if not self._waits:
            return
        self._waits = False
        self._update()
        self._clear()
        vars(self._zero).pop(_norm_method(self._zero), None)
        # Only a loss scaler's overflow keeps the schedule back, as under every other backend.
        self._zero.overflow = self._overflow and self._zero.dtype == torch.float16

    def drop(self) -> None:
        """Leave the update that waits out: weights, moments and their counters stay as they are."""
        self._drops = True
        try:
            self.make()
        finally:
            self._drops = False

    def _hold(self, closure: Any = None) -> None:
        """In place of ``step``, inside the backward pass."""
        zero, self._waits = self._zero, True
        zero.overflow, zero._global_grad_norm = False, None
        if not getattr(zero, "compute_grad_norm", True):
            return
        parts = _norms(zero)
        norm = _joined(parts)
        found = parts if _is_stage_3(zero) else norm
        setattr(zero, _norm_method(zero), lambda **_: found)  # the update asks for it again
        zero._global_grad_norm = norm / zero.loss_scale
        zero.overflow = zero.dtype == torch.float16 and not bool(torch.isfinite(norm))

    def _keep(self, set_to_none: bool = True) -> None:
        """In place of ``zero_grad``, which the engine calls right after ``step``."""
        if not self._waits:
            self._clear(set_to_none=set_to_none)

    def _decide(self, has_overflow: bool = False) -> None:
        """In place of ``_update_scale``, after which ZeRO clears the gradients of an overflow."""
        self._overflow = has_overflow
        self._update_scale(has_overflow)
        if self._drops:
            self._zero.overflow = True


def _is_stage_3(zero: Any) -> bool:
    return hasattr(zero, "fp32_partitioned_groups_flat")


def _norm_method(zero: Any) -> str:
    return "_get_norm_groups" if _is_stage_3(zero) else "scaled_global_norm"


def _norms(zero: Any) -> list[Tensor]:
    """The norm of each group's gradients over all ranks; below 0 where one is not finite."""
    if _is_stage_3(zero):
        return list(zero._get_norm_groups())
    if hasattr(zero, "_wait_for_offload_copies"):
        zero._wait_for_offload_copies()
    groups = [zero.params_in_partition[number] for number in range(len(zero.bit16_groups))]
    if zero.cpu_offload:
        return [zero.complete_grad_norm_calculation_for_cpu_offload(group) for group in groups]
    return [
        zero.get_grad_norm_direct(zero.averaged_gradients[number], group)
        for number, group in enumerate(groups)
    ]


def _joined(parts: list[Tensor]) -> Tensor:
    """The norm of all groups; infinite where one of them is not finite.

    DeepSpeed before 0.19 takes the -1 of such a group for a norm of 1, and makes the update.
    """
    values = torch.stack([torch.as_tensor(part, dtype=torch.float32) for part in parts])
    invalid = (~torch.isfinite(values) | (values < 0)).any()
    norm = torch.linalg.vector_norm(values)
    return torch.where(invalid, torch.full_like(norm, torch.inf), norm)
