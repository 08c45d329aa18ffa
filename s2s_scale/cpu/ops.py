"""Linear layers and embeddings whose gradients go straight to where they are kept.

Shapes: n positions, K inputs, N outputs, V tokens, D width.

Dropout with random numbers of 16 bits.

torch draws one number of 53 bits for each value, several nanoseconds each. Here four values share a
number of 64 bits. A value is dropped with probability round(p * 65536) / 65536, and what is kept is
multiplied by the inverse of exactly what is kept on average, so expectations do not move.

Attention whose backward pass is fast for rows of the lengths of sentences.

Shapes: B rows, H heads, T queries, S keys, E a head's width.

torch's flash attention for CPUs computes scores a second time in its backward pass, block by block;
in bf16 that took eleven times as long as the forward pass. Rows of a few hundred tokens have small
tables of scores, which are cheaper to keep.

Casts of weights that a step's micro-batches share, and gradients added where they are kept.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

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


class SharedCasts:
    """Weights in another type, made once and used until the weight changes or ``clear``.

    torch's autocast keeps them for a forward pass alone.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, str], tuple[weakref.ref[Tensor], int, Tensor]] = {}

    def get(self, tensor: Tensor, name: str, make: Callable[[Tensor], Tensor]) -> Tensor:
        """``make(tensor)``, kept under ``name`` where ``tensor`` is a leaf."""
        if not tensor.is_leaf:
            return make(tensor)
        key = (id(tensor), name)
        found = self._kept.get(key)
        version = tensor._version
        if found is None or found[0]() is not tensor or found[1] != version:
            with torch.no_grad():
                found = (weakref.ref(tensor), version, make(tensor))
            self._kept[key] = found
        return found[2]

    def cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if tensor.dtype == dtype:
            return tensor
        return self.get(tensor, str(dtype), lambda whole: whole.detach().to(dtype))

    def clear(self) -> None:
        """Forget all; to be called whenever weights may have changed unseen."""
        self._kept.clear()


class StepMemory:
    """What the functions of one training run share: casts of weights, and how gradients are kept.

    ``in_place``: gradients of weights may be added to ``.grad`` as they are found.
    """

    def __init__(self, *, in_place: bool) -> None:
        self.in_place = in_place
        self.casts = SharedCasts()
        self.segmented: list[tuple[Tensor, Any]] = []
        """Masks of packed rows, each with the ``SegmentedAttention`` that answers for it."""


_active: list[StepMemory] = []


def active() -> StepMemory | None:
    """The memory of the forward pass that runs now, if our functions take part in it."""
    return _active[-1] if _active else None


@contextmanager
def activated(memory: StepMemory) -> Iterator[None]:
    _active.append(memory)
    try:
        yield
    finally:
        _active.pop()


def can_add_to(parameter: Tensor) -> bool:
    """Whether a gradient may be added to ``parameter.grad`` directly.

    Not where something waits for the gradient to arrive: a hook of DistributedDataParallel's kind.
    """
    waits = parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
    grad = parameter.grad
    fits = grad is None or (grad.layout == torch.strided and grad.dtype == parameter.dtype)
    return parameter.is_leaf and parameter.requires_grad and fits and not waits


def add_scaled(parameter: Tensor, gradient: Tensor, scale: Tensor) -> None:
    """Add ``gradient * scale``, a scalar, to ``parameter.grad``; ``gradient`` may be used up."""
    if parameter.grad is None:
        parameter.grad = gradient.mul_(scale)
    else:
        parameter.grad.add_(gradient, alpha=float(scale))


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


def pad_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
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

    ``low``: ``x`` [..., K] as ``pad_rows`` gives it; ``weight_low``, ``bias_low``: ``weight``
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
        flat = pad_rows(by_y, low.dtype)
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
