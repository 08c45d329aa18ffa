"""Sums over training steps and over an evaluation, kept on the device until they are read.

Reading a device value stalls the device, so nothing here calls ``.item()`` before a log is due.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from s2s_scale.loss.losses import TokenLoss

Total = Callable[[Tensor], Tensor]


class TrainingMeter:
    """Plain NLL and speed of the steps since the last log.

    The sums lie on ``device`` from the beginning, so that every step adds to them alike: where
    steps are compiled, a first one that differs would be compiled for itself.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started: float | None = None
        self._pads_of_run = [0, 0]
        self._clear()

    def _clear(self) -> None:
        self._nll = torch.zeros((), device=self._device)
        self._tokens = torch.zeros((), dtype=torch.int64, device=self._device)
        self._steps = 0
        self._paused = 0.0
        self._waited = 0.0
        self._pads = [0, 0]

    def count_pads(self, real: int, padded: int) -> None:
        """Add a micro-batch's real source and target tokens, and those with pads, on this rank."""
        for sums in (self._pads, self._pads_of_run):
            sums[0] += real
            sums[1] += padded

    @property
    def pad_share(self) -> float | None:
        """Share of pads in all micro-batches so far, on this rank; None before the first."""
        return _pad_share(self._pads_of_run)

    def start_step(self, step_tokens: Tensor) -> None:
        """Begin an optimizer step that holds ``step_tokens`` target tokens on all devices."""
        if self._started is None:
            self._started = time.perf_counter()
        self._steps += 1
        self._tokens = self._tokens + step_tokens

    def add(self, nll: Tensor) -> None:
        """Add a micro-batch's share of the step's mean NLL (nats per target token)."""
        self._nll = self._nll + nll.to(self._nll.dtype)

    def pause(self, seconds: float) -> None:
        """Do not count ``seconds`` (an evaluation, a save) as training time."""
        self._paused += seconds

    def wait(self, seconds: float) -> None:
        """Count ``seconds`` as time in which a step waited for its batches."""
        if self._started is not None:  # before the first step, loaders are started
            self._waited += seconds

    def read(self, total: Total) -> dict[str, float]:
        """``nll_loss`` (nats per token, mean over steps), ``tokens_per_second``, ``input_wait``
        (share of the time spent waiting for batches), ``pad_share`` (this rank's); then restart.

        ``total`` sums over ranks; every rank must call.
        """
        values: dict[str, float] = {}
        if self._steps:
            nll = float(total(self._nll)) / self._steps
            if math.isfinite(nll):  # a step that was skipped leaves no number to report
                values["nll_loss"] = nll
            seconds = time.perf_counter() - (self._started or 0.0) - self._paused
            if seconds > 0:
                values["tokens_per_second"] = float(self._tokens) / seconds
                values["input_wait"] = min(1.0, self._waited / seconds)
        if (pads := _pad_share(self._pads)) is not None:
            values["pad_share"] = pads
        self._clear()
        self._started = time.perf_counter()
        return values


def _pad_share(sums: list[int]) -> float | None:
    real, padded = sums
    return 1 - real / padded if padded else None


class EvaluationMeter:
    """Loss and NLL of an evaluation, each row's tokens weighing the same."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, part: TokenLoss) -> None:
        """Add one batch. Summed in fp64, so that the batch size does not show in the result."""
        self._sums = self._sums + torch.stack(
            [part.loss.detach().double(), part.nll.detach().double(), part.tokens.double()]
        )

    def read(self, total: Total) -> dict[str, float]:
        """``loss`` and ``nll_loss`` in nats per target token; empty if no token was counted.

        ``total`` sums over ranks; every rank must call it.
        """
        loss, nll, tokens = total(self._sums).tolist()
        if not tokens:
            return {}
        return {"loss": loss / tokens, "nll_loss": nll / tokens}
