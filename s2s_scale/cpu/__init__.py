"""What makes training on a CPU fast: functions of our own in the place of some of torch's."""

from __future__ import annotations

from s2s_scale.cpu.functions import CpuFunctions
from s2s_scale.cpu.memory import keep_freed_memory
from s2s_scale.cpu.support import bf16_is_native

__all__ = ["CpuFunctions", "bf16_is_native", "keep_freed_memory"]
