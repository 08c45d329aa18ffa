"""Fast training on a CPU: replacements for some of torch's functions, and memory that is reused."""

from __future__ import annotations

from s2s_scale.cpu.compat import bf16_is_native
from s2s_scale.cpu.functions import CpuFunctions, keep_freed_memory

__all__ = ["CpuFunctions", "bf16_is_native", "keep_freed_memory"]
