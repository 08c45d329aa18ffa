"""What makes training on a CPU fast: functions of our own in the place of some of torch's."""

from __future__ import annotations

from s2s_scale.cpu.functions import CpuFunctions, bf16_is_native, keep_freed_memory

__all__ = ["CpuFunctions", "bf16_is_native", "keep_freed_memory"]
