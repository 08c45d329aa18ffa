"""Steps whose loss or gradient is not finite: skipped, reported with their rows, and limited."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from s2s_scale.checkpoint import last_checkpoint_text
from s2s_scale.errors import UserError

logger = logging.getLogger(__name__)

SHOWN_ROWS = 16


class NonFiniteLossError(UserError):
    """Training stopped because too many steps had a loss or gradient that was not finite."""


class NonFiniteGuard:
    """Watches one optimizer step after the other; a bad one leaves the weights as they were."""

    def __init__(self, *, limit: int, output_dir: Path) -> None:
        self.limit = limit
        self.output_dir = output_dir
        self.steps: list[int] = []
        self._bad: Tensor | None = None

    def observe(self, value: Tensor | float | None) -> None:
        """Note a micro-batch's loss or the step's gradient norm."""
        if value is None:
            return
        bad = ~torch.isfinite(torch.as_tensor(value).detach())
        self._bad = bad if self._bad is None else self._bad | bad

    def finish_step(
        self, optimizer: Optimizer, *, step: int, rows: Sequence[int], learning_rate: float
    ) -> None:
        """Before the update: drop the gradients if anything observed was not finite.

        Args:
            step: number of the optimizer step about to be made, from 1.
            rows: row ids of the training set in this step.

        Raises:
            NonFiniteLossError: this was the ``limit``-th such step.
        """
        bad = self._bad is not None and bool(self._bad)
        self._bad = None
        if not bad:
            return
        # Without gradients the optimizer skips every parameter: weights and moments stay finite.
        optimizer.zero_grad(set_to_none=True)
        self.steps.append(step)
        shown = ", ".join(map(str, rows[:SHOWN_ROWS])) + (", …" if len(rows) > SHOWN_ROWS else "")
        found = (
            f"step {step}: the loss or its gradient is not finite (learning rate "
            f"{learning_rate:g}, training rows {shown or 'unknown'}); the update was skipped"
        )
        logger.warning(found)
        if len(self.steps) >= self.limit:
            raise NonFiniteLossError(
                f"{found}; stopped after {len(self.steps)} such steps "
                f"({', '.join(map(str, self.steps))}; limit: --max_nonfinite_steps {self.limit}); "
                f"{last_checkpoint_text(self.output_dir)}; lower --learning_rate, raise "
                "--warmup_steps, or look at the rows named"
            )
