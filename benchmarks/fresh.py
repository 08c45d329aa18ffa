"""Runs measurements in fresh processes, and describes the machine that they ran on."""

from __future__ import annotations

import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

MIB = 2**20
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""The second one: seconds of all threads together, for where others use the machine as well."""
PRELOADED = ["torch", "datasets", "transformers.trainer_seq2seq", "s2s_scale.trainer"]
"""Imported once, by a process that computes nothing; each measurement is a fork of it."""


def in_fresh_process(function: Callable[[Any], Any], argument: Any) -> Any:
    """``function(argument)`` in a process of its own, in which nothing has been computed before."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, argument).result()


def process_memory(name: str) -> int:
    """Bytes of a line such as VmHWM of this process, or MemAvailable of the machine."""
    path = "/proc/meminfo" if name.startswith("Mem") else "/proc/self/status"
    lines = Path(path).read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def start_peak() -> int:
    """Let this process's peak (VmHWM) start anew; bytes that are resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return process_memory("VmRSS")


def growth_since(start: int) -> int:
    """Bytes by which the peak has exceeded ``start``, which ``start_peak`` gave."""
    return process_memory("VmHWM") - start


class Spread(NamedTuple):
    """Median of some measurements, with the smallest and the largest."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def text(self, form: str = "{:,.0f}") -> str:
        return f"{form.format(self.median)} ({form.format(self.least)}-{form.format(self.most)})"


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures depend on: processor, cores, memory, versions; the GPU where one is used."""
    import torch

    found: dict[str, Any] = {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "memory GiB": round(process_memory("MemTotal") / 2**30, 1),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }
    for name in ("torch", "transformers", "accelerate", "s2s-scale"):
        try:
            found[name] = torch.__version__ if name == "torch" else version(name)
        except PackageNotFoundError:
            found[name] = "from a checkout"
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    """The processor's name, and which of the instructions for bf16 it has."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    pairs = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    flags = set(pairs.get("flags", "").split())
    extra = [name for name in ("avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return ", ".join([pairs.get("model name", platform.machine()), *extra])
