"""Attention whose backward pass is fast for rows of the lengths of sentences.

Shapes: B rows, H heads, T queries, S keys, E a head's width.

torch's flash attention for CPUs computes scores a second time in its backward pass, block by block;
in bf16 that took eleven times as long as the forward pass. Rows of a few hundred tokens have small
tables of scores, which are cheaper to keep.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from s2s_scale.cpu.dropout import _LEVELS, dropped_levels, kept_at_random


class Attention(torch.autograd.Function):
    """Softmax attention [B, H, T, E]; scores in fp32, other products in the type of ``query``."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        levels: int,
    ) -> Tensor:
        scores = query.to(torch.float32) @ key.to(torch.float32).transpose(2, 3)
        scores.mul_(scale)
        if mask is not None and mask.dtype == torch.bool:
            scores.masked_fill_(mask.logical_not(), torch.finfo(scores.dtype).min)
        elif mask is not None:
            scores.add_(mask)
        weights = torch.softmax(scores, -1)
        kept = kept_at_random(weights, levels) if levels else None
        ctx.scale, ctx.gain = scale, _LEVELS / (_LEVELS - levels)
        used = (weights if kept is None else (weights * kept).mul_(ctx.gain)).to(value.dtype)
        ctx.shape = None if mask is None else mask.shape
        ctx.save_for_backward(query, key, value, weights, kept, used)
        return used @ value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights, kept, used = ctx.saved_tensors
        by_value = used.transpose(2, 3) @ by_out
        by_weights = (by_out @ value.transpose(2, 3)).to(torch.float32)
        if kept is not None:
            by_weights.mul_(kept).mul_(ctx.gain)
        by_scores = torch._softmax_backward_data(by_weights, weights, -1, torch.float32)
        by_mask = by_scores.sum_to_size(ctx.shape) if ctx.needs_input_grad[3] else None
        scaled = (by_scores * ctx.scale).to(query.dtype)
        return scaled @ key, scaled.transpose(2, 3) @ query, by_value, by_mask, None, None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    p: float = 0.0,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` of the same arguments, on a CPU.

    ``mask``: bool (True: may be looked at) or added to the scores; may ask for a gradient.
    """
    if causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return Attention.apply(query, key, value, mask, scale, dropped_levels(p))
