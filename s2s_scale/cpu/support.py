"""What this machine's processor can do."""

from __future__ import annotations

import functools
import platform

import torch


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
