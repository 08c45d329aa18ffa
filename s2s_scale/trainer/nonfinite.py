"""Steps whose loss or gradient is not finite: skipped, reported with their rows, and limited."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from s2s_scale.backends import Backend
from s2s_scale.checkpoint import CHECKPOINT_NAME, checkpoints
from s2s_scale.errors import UserError

logger = logging.getLogger(__name__)

SHOWN_ROWS = 16


class NonFiniteLossError(UserError):
    """Training stopped because too many steps had a loss or gradient that was not finite.

    ``count`` says how many.
    """

    def __init__(self, problem: str, *, count: int) -> None:
        super().__init__(problem)
        self.count = count


@dataclass(frozen=True, eq=False)
class _Step:
    """An optimizer step; ``dropped``: a bool scalar on the device."""

    step: int
    rows: Sequence[int]
    learning_rate: float
    dropped: Tensor


class NonFiniteGuard:
    """Watches one optimizer step after the other; a bad one leaves the weights as they were."""

    def __init__(self, *, limit: int, output_dir: Path, device: torch.device | str = "cpu") -> None:
        self.limit = limit
        self.output_dir = output_dir
        self.steps: list[int] = []
        self._last_finite: int | None = None
        self._bad = torch.zeros((), dtype=torch.bool, device=device)
        self._unread: list[_Step] = []

    def observe(self, value: Tensor | float | None) -> None:
        """Note a micro-batch's loss or the step's gradient norm."""
        if value is not None:
            value = torch.as_tensor(value, device=self._bad.device)
            self._bad = self._bad | ~torch.isfinite(value.detach())

    def finish_step(
        self,
        optimizer: Optimizer,
        backend: Backend,
        *,
        step: int,
        rows: Sequence[int],
        learning_rate: float,
    ) -> None:
        """Before the update: have it dropped if anything observed was not finite, on any rank.

        Where reading a value from the device is costly, ``read`` finds out later which steps
        these were; else it is called here. Every rank must call it.

        Args:
            step: number of the optimizer step about to be made, from 1.
            rows: row ids of the training set in this step.

        Raises:
            NonFiniteLossError: this was the ``limit``-th such step.
        """
        dropped = backend.drop_update_where(optimizer, self._bad)
        self._bad = torch.zeros_like(self._bad)
        self._unread.append(_Step(step, rows, learning_rate, dropped))
        if not backend.static_shapes:
            self.read(optimizer, backend)

    def read(self, optimizer: Any, backend: Backend) -> None:
        """Report the steps since the last call whose update was dropped.

        Raises:
            NonFiniteLossError: they are ``limit`` steps by now.
        """
        unread, self._unread = self._unread, []
        bad = [entry for entry in unread if bool(entry.dropped)]
        backend.forget_steps(optimizer, len(bad))
        for entry in unread:
            if entry in bad:
                self._report(entry)
            else:
                self._last_finite = entry.step

    def _report(self, entry: _Step) -> None:
        if self._last_finite is None:  # the first step of this process: the one before went well
            self._last_finite = entry.step - 1
        self.steps.append(entry.step)
        rows = entry.rows
        shown = ", ".join(map(str, rows[:SHOWN_ROWS])) + (", …" if len(rows) > SHOWN_ROWS else "")
        found = (
            f"step {entry.step}: the loss or its gradient is not finite (learning rate "
            f"{entry.learning_rate:g}, training rows {shown or 'unknown'}); the update was skipped"
        )
        logger.warning(found)
        if len(self.steps) >= self.limit:
            raise NonFiniteLossError(
                f"{found}; stopped after {len(self.steps)} such steps "
                f"({', '.join(map(str, self.steps))}; limit: --max_nonfinite_steps {self.limit}); "
                f"{self._remedy(self._last_finite)}",
                count=len(self.steps),
            )

    def _remedy(self, last_finite: int) -> str:
        """Which checkpoint is good, and how to go on from it.

        The newest one may hold weights that the last update had broken already. A checkpoint is
        known to be good when a later step had a finite loss.
        """
        good = [
            folder
            for folder in checkpoints(self.output_dir)
            if (match := CHECKPOINT_NAME.fullmatch(folder.name)) and int(match[1]) < last_finite
        ]
        if not good:
            return (
                "no good checkpoint had been saved; look at the rows named, or start again with a "
                "lower --learning_rate or more --warmup_steps"
            )
        return (
            f"the last good checkpoint is {good[-1]} (the last finite loss was that of step "
            f"{last_finite}); look at the rows named and go on with --resume_from_checkpoint "
            f"{good[-1]}, or start from its weights, --model_name_or_path {good[-1]}, with a lower "
            "--learning_rate or more --warmup_steps"
        )
