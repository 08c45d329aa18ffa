"""What a run measures: loss and speed between logs, sums of an evaluation, compilations.

Reading a value from a device stalls it, so sums stay on the device until a log is due.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from s2s_scale.errors import UserError
from s2s_scale.loss.losses import TokenLoss

logger = logging.getLogger(__name__)

AllReduceSum = Callable[[Tensor], Tensor]

SETUP_COMPILATIONS = 12
"""What is compiled once whatever the batches: initial state, logs, sums of an evaluation."""
REPORTED = 10
GENERATION_GRAPHS = 3
"""Encoder with the first token, each further token, collecting the result."""


class TrainingMeter:
    """NLL, speed and share of pads over the steps since the last log.

    The sums live on ``device`` from the start: where steps are compiled, a first step that added
    to a sum elsewhere would be compiled for itself.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.reset()

    def reset(self) -> None:
        """Forget everything, as before the first step."""
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
        """Add a micro-batch's source and target tokens on this rank, without and with pads."""
        for sums in (self._pads, self._pads_of_run):
            sums[0] += real
            sums[1] += padded

    @property
    def pad_share(self) -> float | None:
        """Share of pads in all micro-batches so far, on this rank; None before the first."""
        return _pad_share(self._pads_of_run)

    def start_step(self, step_tokens: Tensor) -> None:
        """Begin an optimizer step that holds ``step_tokens`` target tokens on all ranks."""
        if self._started is None:
            self._started = time.perf_counter()
        self._steps += 1
        self._tokens = self._tokens + step_tokens

    def add(self, nll: Tensor) -> None:
        """Add a micro-batch's share of the step's mean NLL (nats per target token)."""
        self._nll = self._nll + nll.to(self._nll.dtype)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside (an evaluation, a save) does not count as training time."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - started

    def totals(self) -> dict[str, float]:
        """What the summary at the end of training says: ``train_pad_share``, once it is known."""
        return {} if self.pad_share is None else {"train_pad_share": self.pad_share}

    def wait(self, seconds: float) -> None:
        """Count ``seconds`` as time in which a step waited for its batches."""
        if self._started is not None:  # before the first step, data loaders are starting up
            self._waited += seconds

    def read(self, all_reduce_sum: AllReduceSum) -> dict[str, float]:
        """The values since the last call; then start anew. Every rank must call it.

        ``nll_loss`` in nats per token, the mean over steps; ``tokens_per_second`` of all ranks;
        ``input_wait``, the share of time spent waiting for batches; ``pad_share`` of this rank.
        """
        values: dict[str, float] = {}
        if self._steps:
            nll = float(all_reduce_sum(self._nll)) / self._steps
            if math.isfinite(nll):  # a skipped step leaves no number to report
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
    """Loss and NLL of an evaluation, in which every target token has the same weight."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, part: TokenLoss) -> None:
        """Add one batch. Summed in fp64, so that the batch size does not show in the result."""
        self._sums = self._sums + torch.stack(
            [part.loss.detach().double(), part.nll.detach().double(), part.tokens.double()]
        )

    def read(self, all_reduce_sum: AllReduceSum) -> dict[str, float]:
        """``loss`` and ``nll_loss`` in nats per target token; empty if no token was counted.

        Every rank must call it.
        """
        loss, nll, tokens = all_reduce_sum(self._sums).tolist()
        if not tokens:
            return {}
        return {"loss": loss / tokens, "nll_loss": nll / tokens}


class RecompilationError(UserError):
    """A graph was compiled after warm-up, and ``--strict_compilations`` is on."""


class CompilationWatch:
    """Counts compilations by the shape that caused them; a shape's later uses should cause none.

    Args:
        compiled: graphs that this process has compiled so far, and the seconds that took.
        limit: compilations allowed in all; None: one for each use of a shape (training,
            evaluation, the three of generation) and ``SETUP_COMPILATIONS``.
        strict: raise where otherwise a warning is logged.
    """

    def __init__(
        self, compiled: Callable[[], tuple[int, float]], *, limit: int | None, strict: bool
    ) -> None:
        self._compiled = compiled
        self._limit = limit
        self._strict = strict
        self._seen = compiled()[0]
        self._at_start = self._seen
        self._uses: Counter[tuple[str, tuple[int, ...]]] = Counter()
        self._expected = SETUP_COMPILATIONS
        self._reported = 0
        self._training_shape: tuple[int, ...] = ()

    def start_micro_batch(self, shape: tuple[int, ...]) -> None:
        """Note the shape of the training micro-batch about to run."""
        self._training_shape = shape

    def finish_micro_batch(self, *, step: int) -> None:
        """The micro-batch has run; see ``ran``. Nothing happens where no shape was noted."""
        if self._training_shape:
            self.ran("training", self._training_shape, step=step)

    def ran(self, use: str, shape: tuple[int, ...], *, step: int, graphs: int = 1) -> None:
        """Note that ``use`` has run on a batch of ``shape``, which takes ``graphs`` graphs.

        Raises:
            RecompilationError: with ``strict``, a compilation that is not explained by the first
                use of the shape, or one over the limit.
        """
        count = self._compiled()[0]
        new, self._seen = count - self._seen, count
        before = self._uses[use, shape]
        self._uses[use, shape] += 1
        if not before:
            self._expected += graphs
        allowed = self._expected if self._limit is None else self._limit
        if not new or (before <= 1 and count - self._at_start <= allowed):
            return
        found = (
            f"step {step}: {use} on rows x source x target = {' x '.join(map(str, shape))} was "
            f"compiled after that shape had been used {before} times; {count - self._at_start} "
            f"compilations so far, expected at most {allowed} (--max_compilations)"
        )
        if self._strict:
            raise RecompilationError(
                f"{found}; keep shapes few with --num_buckets and --batching tokens, or leave out "
                "--strict_compilations"
            )
        if self._reported < REPORTED:
            logger.warning(found)
        self._reported += 1

    def ran_evaluation(self, shape: tuple[int, ...], *, step: int, generates: bool) -> None:
        """An evaluation batch of ``shape`` has run; see ``ran``."""
        graphs = 1 + (GENERATION_GRAPHS if generates else 0)
        self.ran("evaluation", shape, step=step, graphs=graphs)

    def counts(self) -> dict[str, float]:
        """What a training log says of compilations; nothing where there were none."""
        count, seconds = self._compiled()
        return {"compilations": count, "compile_seconds": seconds} if count else {}

    def shapes(self, use: str) -> list[tuple[int, ...]]:
        """The shapes on which ``use`` has run."""
        return [shape for name, shape in self._uses if name == use]

    def skip(self) -> None:
        """Attribute what was compiled since the last call to no batch (a log, a checkpoint)."""
        count = self._compiled()[0]
        self._expected += count - self._seen
        self._seen = count


def batch_shape(batch: Mapping[str, Any]) -> tuple[int, ...]:
    """Rows, source and target length of a batch, as far as it has them."""
    sides = [batch[name].shape for name in ("input_ids", "labels") if name in batch]
    return (*sides[0][:1], *(side[1] for side in sides)) if sides else ()
