"""Steps whose loss or gradient is not finite: skipped, reported with their rows, and limited."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

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


class NonFiniteGuard:
    """Watches one optimizer step after the other; a bad one leaves the weights as they were."""

    def __init__(self, *, limit: int, output_dir: Path) -> None:
        self.limit = limit
        self.output_dir = output_dir
        self.steps: list[int] = []
        self._last_finite: int | None = None
        self._bad: Tensor | None = None

    def observe(self, value: Tensor | float | None) -> None:
        """Note a micro-batch's loss or the step's gradient norm."""
        if value is None:
            return
        bad = ~torch.isfinite(torch.as_tensor(value).detach())
        self._bad = bad if self._bad is None else self._bad | bad

    def finish_step(
        self,
        optimizer: Optimizer,
        *,
        step: int,
        rows: Sequence[int],
        learning_rate: float,
        total: Callable[[Tensor], Tensor],
    ) -> None:
        """Before the update: drop the gradients if anything observed was not finite.

        Args:
            step: number of the optimizer step about to be made, from 1.
            rows: row ids of the training set in this step.
            total: sums over ranks, so that all of them skip the same steps.

        Raises:
            NonFiniteLossError: this was the ``limit``-th such step.
        """
        bad = self._bad is not None and bool(total(self._bad.float()))
        self._bad = None
        if not bad:
            self._last_finite = step
            return
        if self._last_finite is None:  # the first step of this process: the one before went well
            self._last_finite = step - 1
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
