"""How much memory this process holds, as Linux tells it."""

from __future__ import annotations

from pathlib import Path

MIB = 2**20


def memory(name: str) -> int:
    """Bytes of a line such as VmHWM of this process, or MemAvailable of the machine."""
    path = "/proc/meminfo" if name.startswith("Mem") else "/proc/self/status"
    lines = Path(path).read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def start_peak() -> int:
    """Let the peak (VmHWM) start anew; bytes that are resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def growth_since(start: int) -> int:
    """Bytes by which the peak has exceeded ``start``, which ``start_peak`` gave."""
    return memory("VmHWM") - start
