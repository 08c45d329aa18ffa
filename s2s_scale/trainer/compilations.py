"""Watches how often graphs are compiled: after a shape's first use, it should not happen again."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from s2s_scale.backends import Backend
from s2s_scale.errors import UserError

logger = logging.getLogger(__name__)

SETUP_COMPILATIONS = 12
"""What is compiled once whatever the batches: initial state, logs, sums of an evaluation."""
REPORTED = 10


class RecompilationError(UserError):
    """A graph was compiled after warm-up, and ``--strict_compilations`` is on."""


class CompilationWatch:
    """Counts compilations by the shape whose use caused them.

    Args:
        limit: compilations allowed in all; None: one for each use of a shape (training,
            evaluation, the three of generation) and ``SETUP_COMPILATIONS``.
        strict: raise where otherwise a warning is logged.
    """

    def __init__(self, backend: Backend, *, limit: int | None, strict: bool) -> None:
        self.backend = backend
        self.limit = limit
        self.strict = strict
        self._seen = backend.compilations()[0]
        self._at_start = self._seen
        self._uses: Counter[tuple[str, tuple[int, ...]]] = Counter()
        self._expected = SETUP_COMPILATIONS
        self._reported = 0

    def ran(self, use: str, shape: tuple[int, ...], *, step: int, graphs: int = 1) -> None:
        """Note that ``use`` has run on a batch of ``shape``, which needs ``graphs`` graphs.

        Raises:
            RecompilationError: with ``strict``, a compilation that the shape's first use does not
                explain, or one over the limit.
        """
        count = self.backend.compilations()[0]
        new, self._seen = count - self._seen, count
        before = self._uses[use, shape]
        self._uses[use, shape] += 1
        if not before:
            self._expected += graphs
        allowed = self._expected if self.limit is None else self.limit
        over = count - self._at_start > allowed
        if new and (before > 1 or over):
            self._report(use, shape, step=step, before=before, count=count, allowed=allowed)

    def shapes(self, use: str) -> list[tuple[int, ...]]:
        """The shapes on which ``use`` has run."""
        return [shape for name, shape in self._uses if name == use]

    def skip(self) -> None:
        """What was compiled since the last call belongs to no batch (a log, a checkpoint)."""
        count = self.backend.compilations()[0]
        self._expected += count - self._seen
        self._seen = count

    def _report(
        self, use: str, shape: tuple[int, ...], *, step: int, before: int, count: int, allowed: int
    ) -> None:
        sizes = " x ".join(map(str, shape))
        found = (
            f"step {step}: {use} on rows x source x target = {sizes} was compiled after that shape "
            f"had been used {before} times; {count - self._at_start} compilations so far, expected "
            f"at most {allowed} (--max_compilations)"
        )
        if self.strict:
            raise RecompilationError(
                f"{found}; keep shapes few with --num_buckets and --batching tokens, or leave out "
                "--strict_compilations"
            )
        if self._reported < REPORTED:
            logger.warning(found)
        self._reported += 1


def batch_shape(batch: Mapping[str, Any]) -> tuple[int, ...]:
    """Rows, source and target length of a batch, as far as it has them."""
    sides = [batch[name].shape for name in ("input_ids", "labels") if name in batch]
    return (*sides[0][:1], *(side[1] for side in sides)) if sides else ()
