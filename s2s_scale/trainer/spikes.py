"""Steps whose loss jumps far above what it was: found before their update is made.

Everything stays on the device, in operations of fixed shapes: no value is read at a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from s2s_scale.config import DEFAULT_SPIKE_WINDOW


class SpikeDetector:
    """A step is a spike if its loss is above ``factor`` times the median of those before it.

    The median is of the last ``window`` losses that were finite and no spike, the lower one of two;
    until there are half as many there is no spike.
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
        """Whether the step with this loss (a scalar, of all ranks) is a spike: a bool scalar."""
        loss = loss.detach().to(self._losses)
        middle = (len(self._losses) - 1) // 2
        finite = torch.isfinite(loss)
        spike = finite & (loss > self.factor * self._losses.sort().values[middle])
        kept = torch.cat([self._losses[1:], loss.reshape(1)])
        self._losses = torch.where(finite & ~spike, kept, self._losses)
        return spike

    def state(self) -> list[float | None]:
        """The losses looked at, oldest first, for a checkpoint; None where there is none yet."""
        return [value if value < float("inf") else None for value in self._losses.tolist()]

    def load(self, losses: Sequence[float | None]) -> None:
        """Go on from a ``state``, of another window too."""
        values = [float("inf") if value is None else value for value in losses]
        window = len(self._losses)
        values = [*([float("inf")] * window), *values][-window:]
        self._losses = torch.tensor(values).to(self._losses)
