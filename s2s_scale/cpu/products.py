"""Linear layers and embeddings whose gradients go straight to where they are kept.

Shapes: n positions, K inputs, N outputs, V tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from s2s_scale.cpu.gradients import can_add_to

_LARGE = 2**20
"""From so many values on, a weight's gradient in bf16 is faster from a transposed copy where there
are fewer outputs than inputs: for 480 positions, 2,048 to 512, 0.9 ms against 1.3, for 1,024 2.2
against 3.1; 512 to 2,048, where more is copied, 1.34 against 1.29 and 3.2 against 2.9 (one
thread)."""


def usual_count(count: int) -> int:
    """The least number of positions that products in a type below fp32 are made of.

    oneDNN compiles a product anew for each shape, which takes two to seven times as long as the
    product itself (one thread, AMX, 900 positions: 256 to 1,024 4.3 ms instead of 0.5). With a few
    round numbers shapes come back; at most a sixteenth is added where there are 512 or more.
    """
    step = 32
    while count > 32 * step:
        step *= 2
    return -(-count // step) * step


def filled_up(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """``rows`` [..., K] as [n, K] in ``dtype``, below fp32 with zeros up to the usual count."""
    flat = rows.detach().reshape(-1, rows.shape[-1])
    if dtype.itemsize >= 4:
        return flat.to(dtype)
    wanted = usual_count(len(flat))
    if wanted == len(flat):
        return flat.to(dtype)
    filled = flat.new_empty((wanted, flat.shape[1]), dtype=dtype)
    filled[: len(flat)] = flat
    filled[len(flat) :] = 0
    return filled


class Linear(torch.autograd.Function):
    """``F.linear(x, weight, bias)`` with products of ``low``'s type.

    ``low``: ``x`` [..., K] as ``filled_up`` gives it; ``weight_low``, ``bias_low``: ``weight``
    [N, K] and ``bias`` [N] in its type.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low: Tensor,
        weight_low: Tensor,
        bias_low: Tensor | None,
        in_place: bool,
    ) -> Tensor:
        ctx.save_for_backward(low, weight_low, weight, bias)
        ctx.kind, ctx.shape, ctx.in_place = x.dtype, x.shape, in_place
        y = F.linear(low, weight_low, bias_low)
        return y[: x.shape[:-1].numel()].view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_y: Tensor) -> tuple[Tensor | None, ...]:
        low, weight_low, weight, bias = ctx.saved_tensors
        flat = filled_up(by_y, low.dtype)
        by_x = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            by_x = (flat @ weight_low)[: ctx.shape[:-1].numel()].view(ctx.shape).to(ctx.kind)
        if ctx.needs_input_grad[1]:
            columns = flat.t()
            few = len(weight) < weight.shape[1]
            if few and weight.numel() >= _LARGE and flat.dtype != weight.dtype:
                columns = columns.contiguous()
            by_weight = _given(weight, columns, low, in_place=ctx.in_place)
        if bias is not None and ctx.needs_input_grad[2]:
            by_bias = flat.sum(0).to(bias.dtype)
        return by_x, by_weight, by_bias, None, None, None, None


def _given(weight: Tensor, left: Tensor, right: Tensor, *, in_place: bool) -> Tensor | None:
    """``left @ right`` in the weight's type, or None where it was added to its gradient."""
    if not (in_place and weight.grad is not None and can_add_to(weight)):
        return (left @ right).to(weight.dtype)
    if left.dtype == weight.dtype:
        weight.grad.addmm_(left, right)
    else:
        weight.grad.add_((left @ right).to(weight.dtype))
    return None


class Embedding(torch.autograd.Function):
    """``F.embedding(ids, weight)`` whose gradient touches only the rows that were looked up.

    torch's makes a tensor of V * D zeros for each call and adds all of it to the gradient.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(weight, ids)
        ctx.padding = padding
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_rows: Tensor) -> tuple[Tensor | None, None, None]:
        weight, ids = ctx.saved_tensors
        ids, by_rows = ids.reshape(-1), by_rows.reshape(-1, weight.shape[1]).to(weight.dtype)
        if ctx.padding is not None:
            real = ids.ne(ctx.padding).nonzero().squeeze(1)
            if len(real) < len(ids):
                ids, by_rows = ids.index_select(0, real), by_rows.index_select(0, real)
        if not can_add_to(weight):
            return torch.zeros_like(weight).index_add_(0, ids, by_rows), None, None
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad.index_add_(0, ids, by_rows)
        return None, None, None
