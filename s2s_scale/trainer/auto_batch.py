"""The largest micro-batch that fits into device memory, found by trial (``--auto_batch``).

A trial is a forward and backward pass over a micro-batch of rows as long as the longest one, for
which attention takes the most memory per token. The memory that gradients and optimizer state
will need is reserved meanwhile.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2s_scale.cpu.functions import give_freed_memory_back
from s2s_scale.errors import UserError
from s2s_scale.utils import atomic_write

FILE = "auto_batch.json"
SAFE_SHARE = 0.85
"""Share of a machine's free memory that may be used on a CPU, where running out kills processes."""
STATE_COPIES = 3
"""Tensors of a weight's size that training holds besides it: a gradient and two moments."""


def find_budget(largest: int, longest: tuple[int, int], fits: Callable[[int], bool]) -> int:
    """The most padded tokens of a micro-batch: ``largest``, halved until it fits.

    Args:
        largest: a larger budget would not give larger micro-batches.
        longest: source and target tokens of the longest row.
        fits: whether a micro-batch of this many rows of that length can be trained on.

    Raises:
        UserError: not even one row fits.
    """
    row = sum(longest)
    rows = max(1, largest // row)
    while not fits(rows):
        if rows == 1:
            raise UserError(
                f"auto_batch: a row of {longest[0]} source and {longest[1]} target tokens, the "
                "longest, does not fit into the device's memory; lower --max_source_length or "
                "--max_target_length, take a smaller model, or --gradient_checkpointing"
            )
        rows //= 2
    return rows * row


class Trial:
    """Tells whether micro-batches fit, by a forward and backward pass whose gradients are dropped.

    Args:
        train: forward and backward pass over a batch.
        parameters: of the model, whose gradients are cleared after each pass.
        device: of the parameters.
        vocabulary: exclusive upper bound of token ids.
    """

    def __init__(
        self,
        train: Callable[[Mapping[str, Tensor]], Any],
        parameters: list[Tensor],
        *,
        device: torch.device,
        vocabulary: int,
    ) -> None:
        self._train, self._parameters = train, parameters
        self._device, self._vocabulary = device, vocabulary
        self._state_bytes = STATE_COPIES * sum(
            p.numel() * p.element_size() for p in parameters if p.requires_grad
        )
        self._bytes_per_row: float | None = None

    @property
    def key(self) -> dict[str, Any]:
        """What the result depends on besides the data: model size and kind of device."""
        count = sum(parameter.numel() for parameter in self._parameters)
        return {"parameters": count, "device": self._device.type}

    def fits(self, rows: int, longest: tuple[int, int]) -> bool:
        """Whether ``rows`` rows of that length can be trained on, with the optimizer's state."""
        if self._device.type == "cpu":
            return self._fits_on_cpu(rows, longest)
        held: Tensor | None = None
        try:
            size = max(0, self._state_bytes)
            held = torch.empty(size, dtype=torch.uint8, device=self._device)
            self._pass(rows, longest)
        except torch.OutOfMemoryError:
            return False
        finally:
            del held
            self._forget()
        return True

    def _fits_on_cpu(self, rows: int, longest: tuple[int, int]) -> bool:
        """Extrapolates from one row and two: running out of memory would kill the process."""
        if self._bytes_per_row is None:
            one, two = (self._growth(count, longest) for count in (1, 2))
            self._bytes_per_row = max(1.0, two - one, two / 2)
        need = rows * self._bytes_per_row + self._state_bytes
        if need > SAFE_SHARE * _available():
            return False
        before = _available()
        grown = self._growth(rows, longest)
        return grown + self._state_bytes <= SAFE_SHARE * before

    def _growth(self, rows: int, longest: tuple[int, int]) -> int:
        """Bytes by which a pass over that many rows raises the process's peak."""
        give_freed_memory_back()
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
        try:
            self._pass(rows, longest)
            return max(0, _status("VmHWM") - before)
        finally:
            self._forget()

    def _pass(self, rows: int, longest: tuple[int, int]) -> None:
        ids = [
            torch.randint(0, self._vocabulary, (rows, length), device=self._device)
            for length in longest
        ]
        batch = {
            "input_ids": ids[0],
            "attention_mask": torch.ones_like(ids[0]),
            "labels": ids[1],
        }
        self._train(batch)

    def _forget(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def _available() -> int:
    """Bytes of memory still available on this machine."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def kept_or_found(
    trial: Trial,
    *,
    folder: Path,
    longest: tuple[int, int],
    largest: int,
    gather_objects: Callable[[int], list[int]],
    main: bool,
    bf16: bool,
) -> int:
    """Padded tokens of the largest micro-batch that fits; the same on every rank.

    The result is stored in ``folder`` and reused from there. Every rank must call it.

    Args:
        longest: source and target tokens of the longest row.
        largest: a larger budget would not give larger micro-batches.
        main: whether this is rank 0, which writes the file.

    Raises:
        UserError: not even one row fits.
    """
    key = {"longest row": list(longest), "bf16": bf16, **trial.key}
    found = read_kept(folder, key)
    if found is None:
        found = find_budget(largest, longest, lambda rows: trial.fits(rows, longest))
    budget = min(gather_objects(found))
    if main:
        keep(folder, key, budget)
        print(f"note: micro-batches of at most {budget} padded tokens", file=sys.stderr)
    return budget


def read_kept(folder: Path, key: Mapping[str, Any]) -> int | None:
    """The budget stored in ``folder`` for the same ``key``, or None."""
    try:
        kept = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = isinstance(kept, dict) and kept.get("found_for") == dict(key)
    return int(kept["max_tokens_per_device"]) if same else None


def keep(folder: Path, key: Mapping[str, Any], budget: int) -> None:
    """Store the budget in ``folder``."""
    content = {"max_tokens_per_device": budget, "found_for": dict(key)}
    atomic_write(folder / FILE, json.dumps(content, indent=1) + "\n")
