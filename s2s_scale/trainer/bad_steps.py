"""Bad steps, whose loss or gradient is not finite or whose loss is a spike.

Their update is skipped; they are reported with the rows they were made of, and limited in number.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from s2s_scale.backends import Backend
from s2s_scale.checkpoint import CHECKPOINT_NAME, checkpoints
from s2s_scale.config import DEFAULT_SPIKE_WINDOW
from s2s_scale.errors import UserError

logger = logging.getLogger(__name__)

SHOWN_ROWS = 16
DEFAULT_MAX_SPIKES = 10
NOT_FINITE = "the loss or its gradient is not finite"


class NonFiniteLossError(UserError):
    """Training stopped because too many steps were bad: not finite, or loss spikes.

    ``count``: bad steps of that kind.
    """

    def __init__(self, problem: str, *, count: int) -> None:
        super().__init__(problem)
        self.count = count


class SpikeDetector:
    """Finds steps whose loss is above ``factor`` times the median of the losses before it.

    The median is the lower one of the last ``window`` losses that were finite and no spikes; there
    is no spike before half as many are known. All is done on the device in operations of fixed
    shapes: no value is read.
    """

    def __init__(
        self,
        factor: float,
        *,
        window: int = DEFAULT_SPIKE_WINDOW,
        device: torch.device | str = "cpu",
    ) -> None:
        self.factor = factor
        self._losses = torch.full((window,), torch.inf, device=device)

    def look(self, loss: Tensor) -> Tensor:
        """Whether the step with this loss (a scalar, summed over ranks) is a spike: a bool scalar.

        A loss that is not a spike is added to the window.
        """
        loss = loss.detach().to(self._losses)
        middle = (len(self._losses) - 1) // 2
        finite = torch.isfinite(loss)
        spike = finite & (loss > self.factor * self._losses.sort().values[middle])
        kept = torch.cat([self._losses[1:], loss.reshape(1)])
        self._losses = torch.where(finite & ~spike, kept, self._losses)
        return spike

    def state(self) -> list[float | None]:
        """The remembered losses, oldest first, for a checkpoint; None where there is none yet."""
        return [value if value < float("inf") else None for value in self._losses.tolist()]

    def load(self, losses: Sequence[float | None]) -> None:
        """Continue from a ``state``, which may be that of another window."""
        values = [float("inf") if value is None else value for value in losses]
        window = len(self._losses)
        values = [*([float("inf")] * window), *values][-window:]
        self._losses = torch.tensor(values).to(self._losses)


@dataclass(frozen=True, eq=False)
class _Step:
    """An optimizer step; ``dropped`` and ``spike``: bool scalars on the device."""

    step: int
    rows: Sequence[int]
    learning_rate: float
    dropped: Tensor
    spike: Tensor


class BadSteps:
    """Watches each optimizer step; a bad one leaves the weights as they were.

    Args:
        backend: skips the update of a bad step on all ranks.
        limit: ``--max_nonfinite_steps``; max_spikes: ``--max_loss_spikes``.
        output_dir: where to look for a good checkpoint to name when training stops.
        spike_factor: ``--loss_spike_factor``; None: spikes are not looked for.

    Raises:
        UserError: the backend cannot skip the update of a spike.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        limit: int,
        output_dir: Path,
        device: torch.device | str = "cpu",
        spike_factor: float | None = None,
        max_spikes: int | None = None,
    ) -> None:
        if spike_factor is not None and not backend.can_skip_update:
            raise UserError(
                "loss_spike_factor: cannot take effect here, where a step's update is made before "
                "its loss can be looked at; leave it out, or take another profile or another "
                "--deepspeed configuration"
            )
        self._backend = backend
        self._limit = limit
        self._max_spikes = DEFAULT_MAX_SPIKES if max_spikes is None else max_spikes
        self._output_dir = output_dir
        self.nonfinite: list[int] = []
        """Steps that were not finite."""
        self.spikes: list[int] = []
        """Steps whose loss was a spike."""
        self._rows: dict[int, list[int]] = {}
        self._overflow_steps = 0
        self._detector: SpikeDetector | None = None
        if spike_factor is not None:
            self._detector = SpikeDetector(spike_factor, device=device)
        self._none = torch.zeros((), dtype=torch.bool, device=device)
        self._loss = torch.zeros((), device=device)
        self._last_finite: int | None = None
        self._bad = torch.zeros((), dtype=torch.bool, device=device)
        self._unread: list[_Step] = []

    def observe(self, value: Tensor | float | None) -> None:
        """Note a value, such as the step's gradient norm, that makes the step bad if not finite."""
        if value is not None:
            value = torch.as_tensor(value, device=self._bad.device)
            self._bad = self._bad | ~torch.isfinite(value.detach())

    def add_loss(self, loss: Tensor) -> None:
        """Observe a micro-batch's share of the step's loss, and add it."""
        self.observe(loss)
        if self._detector is not None:
            self._loss = self._loss + loss.detach().to(self._loss)

    def count_overflow(self) -> None:
        """Count a step that an fp16 loss scaler has skipped."""
        self._overflow_steps += 1

    def finish_step(
        self, optimizer: Optimizer, *, step: int, rows: Sequence[int], learning_rate: float
    ) -> None:
        """Before the update: skip it if anything observed was not finite, on any rank, or a spike.

        Where reading a value from the device is costly, ``read`` finds out later which steps
        these were; else it is called here. Every rank must call it.

        Args:
            step: number of the optimizer step about to be made, from 1.
            rows: row ids of the training set in this step.

        Raises:
            NonFiniteLossError: there were as many such steps as there may be.
        """
        spike = self._none
        if self._detector is not None:
            # Each rank's shares are multiplied by the number over which gradients are averaged.
            loss = self._backend.collectives.all_reduce_sum(self._loss)
            spike = self._detector.look(loss / self._backend.averaged_ranks)
            self._loss = torch.zeros_like(self._loss)
        dropped = self._backend.skip_update_where(optimizer, self._bad | spike)
        self._bad = torch.zeros_like(self._bad)
        self._unread.append(_Step(step, rows, learning_rate, dropped, spike))
        if not self._backend.static_shapes:
            self.read(optimizer)

    def read(self, optimizer: Any) -> None:
        """Report the steps since the last call whose update was skipped.

        Raises:
            NonFiniteLossError: there were as many such steps as there may be.
        """
        unread, self._unread = self._unread, []
        bad = [entry for entry in unread if bool(entry.dropped)]
        self._backend.revert_step_count(optimizer, len(bad))
        for entry in unread:
            if entry in bad:
                self._report(entry)
            else:
                self._last_finite = entry.step

    def _report(self, entry: _Step) -> None:
        """Note a bad step, warn of it, and stop where the limit is reached."""
        if self._last_finite is None:  # the first step of this process: the one before went well
            self._last_finite = entry.step - 1
        spike = bool(entry.spike)
        steps = self.spikes if spike else self.nonfinite
        steps.append(entry.step)
        rows = self._rows[entry.step] = list(entry.rows)
        shown = ", ".join(map(str, rows[:SHOWN_ROWS])) + (", …" if len(rows) > SHOWN_ROWS else "")
        what = NOT_FINITE
        if spike and self._detector is not None:
            what = f"the loss is a spike, above {self._detector.factor:g} times the median"
        found = (
            f"step {entry.step}: {what} (learning rate "
            f"{entry.learning_rate:g}, training rows {shown or 'unknown'}); the update was skipped"
        )
        logger.warning(found)
        limit = self._max_spikes if spike else self._limit
        if len(steps) >= limit:
            flag = "max_loss_spikes" if spike else "max_nonfinite_steps"
            raise NonFiniteLossError(
                f"{found}; stopped after {len(steps)} such steps "
                f"({', '.join(map(str, steps))}; limit: --{flag} {limit}); "
                f"{self._remedy(self._last_finite)}",
                count=len(steps),
            )

    def _remedy(self, last_finite: int) -> str:
        """Which checkpoint is good, and how to continue from it.

        The newest one may hold weights that the last update had broken already. A checkpoint is
        known to be good when a later step had a finite loss.
        """
        good = [
            folder
            for folder in checkpoints(self._output_dir)
            if (match := CHECKPOINT_NAME.fullmatch(folder.name)) and int(match[1]) < last_finite
        ]
        if not good:
            return (
                "no good checkpoint had been saved; look at the rows named, or start again with a "
                "lower --learning_rate or more --warmup_steps"
            )
        return (
            f"the last good checkpoint is {good[-1]} (the last finite loss was that of step "
            f"{last_finite}); look at the rows named and resume with --resume_from_checkpoint "
            f"{good[-1]}, or start from its weights, --model_name_or_path {good[-1]}, with a lower "
            "--learning_rate or more --warmup_steps"
        )

    def counts(self, *, fp16: bool) -> dict[str, float]:
        """What a training log says of bad steps so far; nothing where there were none."""
        found = {"nonfinite_steps": len(self.nonfinite), "loss_spikes": len(self.spikes)}
        shown: dict[str, float] = {name: count for name, count in found.items() if count}
        return shown | ({"overflow_steps": self._overflow_steps} if fp16 else {})

    def totals(self, *, fp16: bool) -> dict[str, float]:
        """What the summary at the end of training says of bad steps."""
        found: dict[str, float] = {"train_nonfinite_steps": len(self.nonfinite)}
        if self._detector is not None:
            found["train_loss_spikes"] = len(self.spikes)
        return found | ({"train_overflow_steps": self._overflow_steps} if fp16 else {})

    def table(self) -> list[tuple[str, ...]]:
        """Step, what was found, what was done, and row ids of each bad step, for the report."""
        kinds = [(step, "not finite") for step in self.nonfinite]
        kinds += [(step, "loss spike") for step in self.spikes]
        return [
            (str(step), kind, "skipped", ", ".join(map(str, self._rows.get(step, ()))) or "unknown")
            for step, kind in sorted(kinds)
        ]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, in values that JSON holds."""
        return {
            "nonfinite_steps": list(self.nonfinite),
            "spike_steps": list(self.spikes),
            "rows": {str(step): rows for step, rows in self._rows.items()},
            "losses": self._detector.state() if self._detector is not None else [],
            "overflow_steps": self._overflow_steps,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state``; one of an older checkpoint holds only some of it."""
        self.nonfinite = list(state.get("nonfinite_steps", ()))
        self.spikes = list(state.get("spike_steps", ()))
        self._rows = {int(step): list(rows) for step, rows in state.get("rows", {}).items()}
        self._overflow_steps = int(state.get("overflow_steps", 0))
        if self._detector is not None:
            self._detector.load(state.get("losses", ()))
