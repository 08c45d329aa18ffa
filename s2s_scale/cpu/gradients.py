"""Casts of weights that a step's micro-batches share, and gradients added where they are kept."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


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
