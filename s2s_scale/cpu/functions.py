"""Replaces functions of torch during a model's forward pass on a CPU, and keeps freed memory.

The code of the models is unchanged: it calls ``torch.nn.functional``, and torch lets a
``TorchFunctionMode`` handle the calls.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from s2s_scale.cpu.ops import (
    Embedding,
    Linear,
    StepMemory,
    activate,
    attention,
    dropout,
    pad_rows,
)

KEPT_SCORES = 512 * 512
"""Largest number of scores of a row and head that attention keeps for its backward pass."""

FEW_SCORES = 128 * 128
"""Up to this many scores, the matmuls of attention run in fp32 even under bf16: they are small, and
oneDNN would compile a bf16 matmul for each shape."""


class CpuFunctions(TorchFunctionMode):
    """Context for the forward pass of a training step on a CPU.

    Args:
        in_place: accumulate gradients of weights into ``.grad`` directly. Only for a single process
            without hooks on them, and without ``torch.autograd.grad``.
    """

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.memory = StepMemory(in_place=in_place)
        self._entered: list[AbstractContextManager[None]] = []
        self._last: tuple[Tensor, Tensor] | None = None
        self._answers: dict[Any, Callable[..., Any]] = {
            F.linear: self._linear,
            F.dropout: self._dropout,
            F.embedding: self._embedding,
            F.scaled_dot_product_attention: self._attention,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = self._answers.get(func)
        if answer is None or not torch.is_grad_enabled():
            return func(*args, **(kwargs or {}))
        return answer(*args, **(kwargs or {}))

    def __enter__(self) -> Any:
        self._entered.append(activate(self.memory))
        self._entered[-1].__enter__()
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        self._last = None
        super().__exit__(*args)
        self._entered.pop().__exit__(*args)

    def clear(self) -> None:
        """Discard the casts of weights; to be called when these have changed."""
        self.memory.casts.clear()

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.device.type != "cpu" or not (x.requires_grad or weight.requires_grad):
            return F.linear(x, weight, bias)
        dtype = autocast_dtype() or weight.dtype
        if not self.memory.in_place and x.dtype == weight.dtype == dtype:
            return F.linear(x, weight, bias)
        # Queries, keys and values share the cast of their input.
        if self._last is None or self._last[0] is not x or self._last[1].dtype != dtype:
            self._last = (x, pad_rows(x, dtype))
        low = self._last[1]
        weight_low = self.memory.casts.cast(weight, dtype)
        bias_low = None if bias is None else self.memory.casts.cast(bias, dtype)
        with torch.autocast("cpu", enabled=False):
            return Linear.apply(x, weight, bias, low, weight_low, bias_low, self.memory.in_place)

    def _dropout(
        self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or inplace or not 0 < p < 1 or input.device.type != "cpu":
            return F.dropout(input, p, training, inplace)
        return dropout(input, p)

    def _embedding(
        self, input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kw: Any
    ) -> Tensor:
        special = any(args) or any(kw.get(n) for n in ("max_norm", "scale_grad_by_freq", "sparse"))
        here = weight.device.type == "cpu" and weight.requires_grad
        if special or not here or not self.memory.in_place:
            return F.embedding(input, weight, padding_idx, *args, **kw)
        if padding_idx is not None and padding_idx < 0:
            padding_idx += len(weight)
        return Embedding.apply(weight, input, padding_idx)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        packed = self._packed_attention(attn_mask)
        if packed is not None and query.dim() == 4 and not (is_causal or enable_gqa):
            with torch.autocast("cpu", enabled=False):
                return packed(query, key, value, partial(attention, p=dropout_p, scale=scale))
        dtype = autocast_dtype()
        learnt = attn_mask is not None and attn_mask.requires_grad
        small = query.shape[-2] * key.shape[-2] <= KEPT_SCORES
        plain = query.device.type != "cpu" or query.dim() != 4 or enable_gqa or not small
        if plain or not (dtype is not None or dropout_p or learnt):
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask,
                dropout_p,
                is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        kind = query.dtype if dtype is None else dtype
        few = query.shape[-2] * key.shape[-2] <= FEW_SCORES and kind.itemsize < 4
        query, key, value = (
            part.to(torch.float32 if few else kind) for part in (query, key, value)
        )
        with torch.autocast("cpu", enabled=False):
            return attention(
                query, key, value, attn_mask, p=dropout_p, causal=is_causal, scale=scale
            ).to(kind)

    def _packed_attention(self, mask: Tensor | None) -> Any:
        """The ``PackedAttention`` that ``mask`` stands for, if it is one of a packed batch."""
        if mask is None:
            return None
        for known, packed in self.memory.packed_attention:
            same = (mask.data_ptr(), mask.shape) == (known.data_ptr(), known.shape)
            if same and mask.dtype == known.dtype:
                return packed
        return None


def autocast_dtype() -> torch.dtype | None:
    """The type that autocast runs matmuls in; None if it is off."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of <malloc.h>
_NEVER = 2**31 - 1
_STEP = 64 * 2**20


def keep_freed_memory() -> bool:
    """Make the process reuse freed memory instead of returning it; whether that succeeded.

    By default the C library maps each large block separately and unmaps it when it is freed, so
    that every use costs a page fault per 4 KiB: zeros of 65 MB took 30 ms, and 3 ms with this. The
    process keeps as much memory as it has ever needed. Works with glibc only.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    wanted = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, _STEP))
    done = [mallopt(option, value) for option, value in wanted]
    return done == [1] * len(wanted)


def give_freed_memory_back() -> None:
    """Return the process's free memory to the system, so that its size shows what is in use."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)
