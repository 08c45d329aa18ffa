"""Bad steps: loss or gradient not finite, or a spike. Skipped, reported with rows, limited."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from s2s_scale.backends import Backend
from s2s_scale.checkpoint import CHECKPOINT_NAME, checkpoints
from s2s_scale.errors import UserError
from s2s_scale.trainer.spikes import SpikeDetector

logger = logging.getLogger(__name__)

SHOWN_ROWS = 16
DEFAULT_MAX_SPIKES = 10
NOT_FINITE = "the loss or its gradient is not finite"


class NonFiniteLossError(UserError):
    """Training stopped because too many steps were bad: not finite, or spikes.

    ``count`` says how many of that kind.
    """

    def __init__(self, problem: str, *, count: int) -> None:
        super().__init__(problem)
        self.count = count


class RollBack(Exception):
    """Training is to go back to the checkpoint ``folder``, from before ``step``, which was bad."""

    def __init__(self, step: int, folder: Path) -> None:
        super().__init__(f"from step {step} back to {folder}")
        self.step = step
        self.folder = folder


@dataclass(frozen=True, eq=False)
class _Step:
    """An optimizer step; ``dropped`` and ``spike``: bool scalars on the device."""

    step: int
    rows: Sequence[int]
    learning_rate: float
    dropped: Tensor
    spike: Tensor


class NonFiniteGuard:
    """Watches one optimizer step after the other; a bad one leaves the weights as they were.

    ``steps`` and ``spikes`` are the bad ones by kind, ``rows`` the row ids of both, and
    ``left_out`` those that a roll back leaves out. A checkpoint keeps all of them.
    """

    def __init__(
        self,
        *,
        limit: int,
        output_dir: Path,
        device: torch.device | str = "cpu",
        spike_factor: float | None = None,
        max_spikes: int | None = None,
        rolls_back: bool = False,
    ) -> None:
        self.limit = limit
        self.max_spikes = DEFAULT_MAX_SPIKES if max_spikes is None else max_spikes
        self.rolls_back = rolls_back
        self.output_dir = output_dir
        self.steps: list[int] = []
        self.spikes: list[int] = []
        self.rows: dict[int, list[int]] = {}
        self.left_out: set[int] = set()
        self.find_checkpoint: Callable[[int], Path | None] = lambda step: None
        """Where to go back to from a bad step; None: not at all. Every rank calls it."""
        self.detector: SpikeDetector | None = None
        if spike_factor is not None:
            self.detector = SpikeDetector(spike_factor, device=device)
        self._none = torch.zeros((), dtype=torch.bool, device=device)
        self._loss = torch.zeros((), device=device)
        self._last_finite: int | None = None
        self._bad = torch.zeros((), dtype=torch.bool, device=device)
        self._unread: list[_Step] = []

    def observe(self, value: Tensor | float | None) -> None:
        """Note a micro-batch's loss or the step's gradient norm."""
        if value is not None:
            value = torch.as_tensor(value, device=self._bad.device)
            self._bad = self._bad | ~torch.isfinite(value.detach())

    def add_loss(self, loss: Tensor) -> None:
        """Add a micro-batch's share of the step's loss."""
        if self.detector is not None:
            self._loss = self._loss + loss.detach().to(self._loss)

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
        spike = self._none
        if self.detector is not None:
            # Each rank's shares are multiplied by the number over which gradients are averaged.
            loss = backend.collectives.all_reduce_sum(self._loss) / backend.averaged_ranks
            spike = self.detector.look(loss)
            self._loss = torch.zeros_like(self._loss)
        left_out = step in self.left_out
        bad = torch.ones_like(self._bad) if left_out else self._bad | spike
        dropped = backend.skip_update_where(optimizer, bad)
        self._bad = torch.zeros_like(self._bad)
        if left_out:
            self._left_out(step, optimizer, backend)
            return
        self._unread.append(_Step(step, rows, learning_rate, dropped, spike))
        if not backend.static_shapes:
            self.read(optimizer, backend)

    def read(self, optimizer: Any, backend: Backend) -> None:
        """Report the steps since the last call whose update was dropped.

        Raises:
            NonFiniteLossError: they are ``limit`` steps by now.
        """
        unread, self._unread = self._unread, []
        bad = [entry for entry in unread if bool(entry.dropped)]
        backend.revert_step_count(optimizer, len(bad))
        for entry in unread:
            if entry in bad:
                self._report(entry)
            else:
                self._last_finite = entry.step

    def _left_out(self, step: int, optimizer: Any, backend: Backend) -> None:
        logger.warning(f"step {step}: its rows are left out, since it was bad before")
        backend.revert_step_count(optimizer, 1)

    def _report(self, entry: _Step) -> None:
        """Note a bad step, warn of it, and stop or go back where that is wanted.

        Raises:
            NonFiniteLossError: these steps are as many as there may be.
            RollBack: training goes back to before the step.
        """
        if self._last_finite is None:  # the first step of this process: the one before went well
            self._last_finite = entry.step - 1
        spike = bool(entry.spike)
        steps = self.spikes if spike else self.steps
        steps.append(entry.step)
        rows = self.rows[entry.step] = list(entry.rows)
        shown = ", ".join(map(str, rows[:SHOWN_ROWS])) + (", …" if len(rows) > SHOWN_ROWS else "")
        factor = self.detector.factor if self.detector is not None else 0.0
        what = f"the loss is a spike, above {factor:g} times the median" if spike else NOT_FINITE
        found = (
            f"step {entry.step}: {what} (learning rate "
            f"{entry.learning_rate:g}, training rows {shown or 'unknown'}); the update was skipped"
        )
        logger.warning(found)
        limit = self.max_spikes if spike else self.limit
        if len(steps) >= limit:
            flag = "max_loss_spikes" if spike else "max_nonfinite_steps"
            raise NonFiniteLossError(
                f"{found}; stopped after {len(steps)} such steps "
                f"({', '.join(map(str, steps))}; limit: --{flag} {limit}); "
                f"{self._remedy(self._last_finite)}",
                count=len(steps),
            )
        folder = self.find_checkpoint(entry.step)
        if folder is not None:
            logger.warning(f"step {entry.step}: back to {folder}")
            raise RollBack(entry.step, folder)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, in values of JSON."""
        return {
            "nonfinite_steps": list(self.steps),
            "spike_steps": list(self.spikes),
            "rows": {str(step): rows for step, rows in self.rows.items()},
            "left_out": sorted(self.left_out),
            "losses": self.detector.state() if self.detector is not None else [],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state``; of an older checkpoint only some of it is there."""
        self.steps = list(state.get("nonfinite_steps", ()))
        self.spikes = list(state.get("spike_steps", ()))
        self.rows = {int(step): list(rows) for step, rows in state.get("rows", {}).items()}
        self.left_out = set(state.get("left_out", ()))
        if self.detector is not None:
            self.detector.load(state.get("losses", ()))

    def after_rollback(self, before: Mapping[str, Any], step: int) -> None:
        """Once a checkpoint is loaded: keep what was found ``before``, and leave ``step`` out."""
        losses = self.detector.state() if self.detector is not None else []
        self.load({**before, "losses": losses})
        self.left_out.add(step)
        self._unread.clear()
        self._last_finite = None

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
