"""Summary of a batch plan: steps, rows, shapes and pads of an epoch, before anything is trained."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from s2s_scale.data.batch_plan import Lengths
from s2s_scale.data.buckets import padded_to_longest, padded_to_powers
from s2s_scale.utils import table_console

if TYPE_CHECKING:
    from rich.console import Console

    from s2s_scale.data.samplers import EpochSampler

Shape = tuple[int, int, int]
"""Rows of one rank's micro-batch, source width, target width."""


@dataclass(frozen=True)
class StepSize:
    """Size of a step; tokens are those of source and target together, without and with pads."""

    rows: int
    micro_batches: int
    tokens: int
    padded_tokens: int
    longest: tuple[int, int]
    """Tokens of the longest source and of the longest target."""


@dataclass
class ShapeUse:
    """How often a shape occurs on all ranks of an epoch, with real and padded tokens."""

    batches: int = 0
    tokens: int = 0
    padded_tokens: int = 0

    @property
    def real_share(self) -> float:
        """Share of real tokens among all."""
        return self.tokens / self.padded_tokens if self.padded_tokens else 1.0


@dataclass
class PlanSummary:
    """An epoch's steps, and the shapes of its micro-batches where those are fixed."""

    steps: list[StepSize] = field(default_factory=list)
    shapes: dict[Shape, ShapeUse] = field(default_factory=dict)

    @property
    def total(self) -> ShapeUse:
        """All micro-batches together."""
        return ShapeUse(
            sum(step.micro_batches for step in self.steps),
            sum(step.tokens for step in self.steps),
            sum(step.padded_tokens for step in self.steps),
        )


def summarise(
    sampler: EpochSampler, lengths: Lengths, *, most_steps: int | None = None
) -> PlanSummary:
    """Measure the current epoch of a sampler on all its ranks.

    With ``most_steps`` only that many of its steps, evenly spread over the epoch.
    """
    summary = PlanSummary()
    stride = 1 if most_steps is None else -(-sampler.plan.steps // most_steps)
    for step in range(0, sampler.plan.steps, max(1, stride)):
        rows, padded_tokens, micro_batches = sampler.plan.rows(step), 0, 0
        for batches in sampler.divide(step):
            micro_batches += 1
            padded = [batch.padded_tokens(lengths) for batch in batches]
            padded_tokens += sum(padded)
            if batches[0].widths is not None:
                use = summary.shapes.setdefault(batches[0].shape(lengths), ShapeUse())
                use.batches += len(batches)
                use.tokens += sum(_real_tokens(batch.rows, lengths) for batch in batches)
                use.padded_tokens += sum(padded)
        source, target = (int(side[rows].max()) for side in lengths)
        summary.steps.append(
            StepSize(
                rows=len(rows),
                micro_batches=micro_batches,
                tokens=_real_tokens(rows, lengths),
                padded_tokens=padded_tokens,
                longest=(source, target),
            )
        )
    return summary


def _real_tokens(rows: np.ndarray, lengths: Lengths) -> int:
    return sum(int(side[rows].sum()) for side in lengths)


def print_plan(sampler: EpochSampler, lengths: Lengths, *, first_steps: int, title: str) -> None:
    """Print the size of the epoch, its shapes and its first steps."""
    summary = summarise(sampler, lengths)
    console = table_console()
    console.print(title, style="bold", highlight=False)
    micro_batches = Counter(step.micro_batches for step in summary.steps).most_common(1)
    console.print(
        f"{sum(step.rows for step in summary.steps)} rows in {len(summary.steps)} steps; "
        f"{sampler.world_size} rank(s) x {micro_batches[0][0] if micro_batches else 0} "
        f"micro-batches; share of pads {1 - summary.total.real_share:.1%}",
        highlight=False,
    )
    if summary.shapes:
        _print_shapes(console, summary, lengths)
    _print_steps(console, sampler, summary.steps[:first_steps])


def shape_rows(summary: PlanSummary) -> list[tuple[str, ...]]:
    """The cells of a table with a row for each shape, smallest widths first, and one for all.

    Rows of one rank's micro-batch, source width, target width, tokens, batches, share of real
    tokens.
    """
    rows = []
    for (size, source, target), use in sorted(summary.shapes.items(), key=lambda i: i[0][1:]):
        cells = (size, source, target, size * (source + target), use.batches)
        rows.append((*map(str, cells), f"{use.real_share:.1%}"))
    batches = sum(use.batches for use in summary.shapes.values())
    return [*rows, ("", "", "", "", str(batches), f"{summary.total.real_share:.1%}")]


def _print_shapes(console: Console, summary: PlanSummary, lengths: Lengths) -> None:
    table = Table()
    for name in ("rows", "source", "target", "tokens", "batches", "real tokens"):
        table.add_column(name, justify="right")
    for cells in shape_rows(summary):
        table.add_row(*cells)
    console.print(table)
    powers, count = padded_to_powers(lengths)
    console.print(
        f"{len(summary.shapes)} shapes; real tokens {summary.total.real_share:.1%} (every row "
        f"padded to the longest: {padded_to_longest(lengths):.1%}; to powers of two, {count} "
        f"shapes: {powers:.1%})",
        highlight=False,
    )


def _print_steps(console: Console, sampler: EpochSampler, steps: list[StepSize]) -> None:
    table = Table()
    for name in ("step", "rows", "micro-batches", "tokens", "padded", "longest", "first rows"):
        table.add_column(name, justify="left" if name == "first rows" else "right")
    for number, step in enumerate(steps):
        rows = sampler.plan.rows(number)
        table.add_row(
            str(number + 1),
            str(step.rows),
            str(step.micro_batches),
            str(step.tokens),
            str(step.padded_tokens),
            f"{step.longest[0]}+{step.longest[1]}",
            " ".join(map(str, np.asarray(rows[:6]))) + (" …" if len(rows) > 6 else ""),
        )
    console.print(table)
