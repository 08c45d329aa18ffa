"""Autograd functions for training on a CPU: linear layers, embeddings, dropout and attention.

They share casts of weights among the micro-batches of a step, and accumulate gradients of weights
where these are kept.

Shapes: n positions, K inputs, N outputs, V tokens, D width; B rows, H heads, T queries, S keys, E
width of a head.
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

from s2s_scale.cpu.compat import has_gradient_hooks, softmax_backward, version_of

_LARGE = 2**20
"""Values from which on a weight's gradient in bf16 is computed from a transposed copy, if there are
fewer outputs than inputs. For 2,048 inputs and 512 outputs, 480 positions take 0.9 ms instead of
1.3, and 1,024 take 2.2 instead of 3.1. For 512 inputs and 2,048 outputs, where more is copied, it
would be 1.34 ms instead of 1.29, and 3.2 instead of 2.9 (one thread)."""
_LEVELS = 2**16


class SharedCasts:
    """Casts of weights, valid until a weight changes or ``clear`` is called.

    torch's autocast keeps casts for one forward pass only.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, str], tuple[weakref.ref[Tensor], int, Tensor]] = {}

    def get(self, tensor: Tensor, name: str, make: Callable[[Tensor], Tensor]) -> Tensor:
        """``make(tensor)``, cached under ``name`` if ``tensor`` is a leaf."""
        if not tensor.is_leaf:
            return make(tensor)
        key = (id(tensor), name)
        found = self._kept.get(key)
        version = version_of(tensor)
        if found is None or found[0]() is not tensor or found[1] != version:
            with torch.no_grad():
                found = (weakref.ref(tensor), version, make(tensor))
            self._kept[key] = found
        return found[2]

    def cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """``tensor`` as ``dtype``, cached if it is a leaf."""
        if tensor.dtype == dtype:
            return tensor
        return self.get(tensor, str(dtype), lambda whole: whole.detach().to(dtype))

    def clear(self) -> None:
        """Discard all casts; to be called whenever weights may have changed unnoticed by torch."""
        self._kept.clear()


class StepMemory:
    """State that the functions of one training run share.

    ``in_place``: gradients of weights may be accumulated into ``.grad`` directly. ``casts``: of
    weights. ``packed_attention``: the masks of the packed batch in progress, each with the
    ``PackedAttention`` that it stands for.
    """

    def __init__(self, *, in_place: bool) -> None:
        self.in_place = in_place
        self.casts = SharedCasts()
        self.packed_attention: list[tuple[Tensor, Any]] = []


_active: list[StepMemory] = []


def active() -> StepMemory | None:
    """The memory of the innermost ``activate`` context, if there is one."""
    return _active[-1] if _active else None


@contextmanager
def activate(memory: StepMemory) -> Iterator[None]:
    """Context in which ``active`` returns ``memory``."""
    _active.append(memory)
    try:
        yield
    finally:
        _active.pop()


def can_add_to(parameter: Tensor) -> bool:
    """Whether a gradient may be added to ``parameter.grad`` directly.

    It may not if a hook waits for the gradient, such as those of DistributedDataParallel.
    """
    grad = parameter.grad
    fits = grad is None or (grad.layout == torch.strided and grad.dtype == parameter.dtype)
    needed = parameter.is_leaf and parameter.requires_grad
    return needed and fits and not has_gradient_hooks(parameter)


def add_scaled(parameter: Tensor, gradient: Tensor, scale: Tensor) -> None:
    """Add ``gradient * scale``, a scalar, to ``parameter.grad``; overwrites ``gradient``."""
    if parameter.grad is None:
        parameter.grad = gradient.mul_(scale)
    else:
        parameter.grad.add_(gradient, alpha=float(scale))


def padded_count(count: int) -> int:
    """Number of positions that a matmul below fp32 is padded to.

    oneDNN compiles a matmul for each shape, which takes two to seven times as long as the matmul
    itself (one thread, AMX, 900 positions, 256 to 1,024: 4.3 ms instead of 0.5). With few different
    numbers, shapes recur. At most 1/16 is added to 512 or more positions.
    """
    step = 32
    while count > 32 * step:
        step *= 2
    return -(-count // step) * step


def pad_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """``rows`` [..., K] as [n, K] in ``dtype``; below fp32 zero rows complete a round n."""
    flat = rows.detach().reshape(-1, rows.shape[-1])
    if dtype.itemsize >= 4:
        return flat.to(dtype)
    wanted = padded_count(len(flat))
    if wanted == len(flat):
        return flat.to(dtype)
    filled = flat.new_empty((wanted, flat.shape[1]), dtype=dtype)
    filled[: len(flat)] = flat
    filled[len(flat) :] = 0
    return filled


class Linear(torch.autograd.Function):
    """``F.linear(x, weight, bias)`` with matmuls in the type of ``low``.

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
            by_weight = _weight_gradient(weight, columns, low, in_place=ctx.in_place)
        if bias is not None and ctx.needs_input_grad[2]:
            by_bias = flat.sum(0).to(bias.dtype)
        return by_x, by_weight, by_bias, None, None, None, None


def _weight_gradient(
    weight: Tensor, left: Tensor, right: Tensor, *, in_place: bool
) -> Tensor | None:
    """``left @ right`` in the weight's type; None if it was added to the weight's gradient."""
    if not (in_place and weight.grad is not None and can_add_to(weight)):
        return (left @ right).to(weight.dtype)
    if left.dtype == weight.dtype:
        weight.grad.addmm_(left, right)
    else:
        weight.grad.add_((left @ right).to(weight.dtype))
    return None


class Embedding(torch.autograd.Function):
    """``F.embedding(ids, weight)`` whose gradient touches only the rows that were looked up.

    torch's own allocates V * D zeros for each call and adds all of them to the gradient.
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


def dropped_levels(p: float) -> int:
    """How many of the 65,536 values of a random number mean that an element is dropped."""
    return round(p * _LEVELS)


def dropout_mask(like: Tensor, levels: int) -> Tensor:
    """1 for elements that are kept and 0 for those that are dropped, in the shape of ``like``.

    Drawn from torch's CPU generator. torch draws a random number of 53 bits for each element, which
    takes several nanoseconds; here four elements share a number of 64 bits.
    """
    count = like.numel()
    drawn = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    numbers = drawn.view(torch.int16)[:count].view(like.shape)
    kept = torch.empty(like.shape, dtype=like.dtype)
    return torch.ge(numbers, levels - _LEVELS // 2, out=kept)


class Dropout(torch.autograd.Function):
    """Dropout of elements whose random number, of 16 bits, is among the lowest ``levels``.

    What is kept is divided by the exact probability of being kept, so that the mean is unchanged.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: int) -> Tensor:
        kept = dropout_mask(x, levels)
        ctx.scale = _LEVELS / (_LEVELS - levels)
        ctx.save_for_backward(kept)
        # Scaled afterwards: in bf16 the scale itself would be off by up to 1/600.
        return (x * kept).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return (gradient * kept).mul_(ctx.scale), None


def dropout(x: Tensor, p: float) -> Tensor:
    """``torch.nn.functional.dropout(x, p)`` in training, for 0 < p < 1 on a CPU.

    The probability is rounded to a multiple of 1/65,536.
    """
    levels = dropped_levels(p)
    if not 0 < levels < _LEVELS:
        return torch.nn.functional.dropout(x, p, training=True)
    return Dropout.apply(x, levels)


class Attention(torch.autograd.Function):
    """Softmax attention [B, H, T, E]; scores in fp32, other matmuls in the type of ``query``.

    torch's flash attention for CPUs computes the scores again in its backward pass, block by block,
    which in bf16 takes eleven times as long as its forward pass. Rows of a few hundred tokens have
    few scores, and it is cheaper to keep them.
    """

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
        kept = dropout_mask(weights, levels) if levels else None
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
        by_scores = softmax_backward(by_weights, weights)
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

    ``mask``: bool (True: may be attended to) or added to the scores; it may require a gradient.
    """
    if causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return Attention.apply(query, key, value, mask, scale, dropped_levels(p))
