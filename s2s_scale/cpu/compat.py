"""Private parts of torch that the CPU functions rely on."""

from __future__ import annotations

import functools
import platform

import torch
from torch import Tensor

from s2s_scale.compat import relies_on

_TORCH = ("2.9", "2.13")


@relies_on(
    "torch",
    checked=_TORCH,
    reason="No public name tells whether the processor has bf16 instructions.",
    uses={
        "torch.cpu._is_avx512_bf16_supported": (),
        "torch.cpu._is_amx_tile_supported": (),
        "torch.ops.mkldnn._is_mkldnn_bf16_supported": None,
    },
)
@functools.cache
def bf16_is_native() -> bool:
    """Whether the CPU multiplies bf16 matrices with instructions of its own.

    Without them (AVX512-BF16, AMX, or Arm's BF16) bf16 is slower than fp32.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    if platform.machine() in ("aarch64", "arm64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


@relies_on(
    "torch",
    checked=_TORCH,
    reason="The public softmax differentiates only by way of autograd, which keeps its own copy.",
    uses={"torch._softmax_backward_data": None},
)
def softmax_backward(gradient: Tensor, weights: Tensor) -> Tensor:
    """Gradient by the inputs of a softmax over the last dimension, in fp32, from ``weights``."""
    return torch._softmax_backward_data(gradient, weights, -1, torch.float32)


@relies_on(
    "torch",
    checked=_TORCH,
    reason="The version counter is the only sign of a change in place.",
    uses={"torch.Tensor._version": None},
)
def version_of(tensor: Tensor) -> int:
    """Number of changes in place that torch has counted."""
    return tensor._version


@relies_on(
    "torch",
    checked=_TORCH,
    reason="No public name tells whether a parameter has hooks on its gradient.",
    uses={"torch.Tensor._backward_hooks": None, "torch.Tensor._post_accumulate_grad_hooks": None},
)
def has_gradient_hooks(parameter: Tensor) -> bool:
    """Whether hooks wait for the parameter's gradient, such as DistributedDataParallel's."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)
