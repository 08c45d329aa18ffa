"""Dropout with random numbers of 16 bits.

torch draws one number of 53 bits for each value, several nanoseconds each. Here four values share a
number of 64 bits. A value is dropped with probability round(p * 65536) / 65536, and what is kept is
multiplied by the inverse of exactly what is kept on average, so expectations do not move.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LEVELS = 2**16


def dropped_levels(p: float) -> int:
    """How many of the 65,536 values of a random number drop what it belongs to."""
    return round(p * _LEVELS)


def kept_at_random(like: Tensor, levels: int) -> Tensor:
    """1 where a value is kept and 0 where not, in the shape and type of ``like``.

    Drawn from torch's generator of the CPU, so a seed repeats it.
    """
    count = like.numel()
    drawn = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    numbers = drawn.view(torch.int16)[:count].view(like.shape)
    kept = torch.empty(like.shape, dtype=like.dtype)
    return torch.ge(numbers, levels - _LEVELS // 2, out=kept)


class Dropout(torch.autograd.Function):
    """``x`` with some values at 0 and the others scaled up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: int) -> Tensor:
        kept = kept_at_random(x, levels)
        ctx.scale = _LEVELS / (_LEVELS - levels)
        ctx.save_for_backward(kept)
        # Scaled after the product: as bf16 the scale itself would be off by a six-hundredth.
        return (x * kept).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return (gradient * kept).mul_(ctx.scale), None


def dropout(x: Tensor, p: float) -> Tensor:
    """``torch.nn.functional.dropout(x, p)`` in training, for 0 < p < 1 on a CPU."""
    levels = dropped_levels(p)
    if not 0 < levels < _LEVELS:
        return torch.nn.functional.dropout(x, p, training=True)
    return Dropout.apply(x, levels)
