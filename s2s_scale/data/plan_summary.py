"""The batch plan in words: steps, rows, shapes and pads of an epoch, before anything is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from s2s_scale.data.batch_plan import Lengths
from s2s_scale.data.buckets import padded_to_longest, padded_to_powers

if TYPE_CHECKING:
    from s2s_scale.data.samplers import EpochSampler, MicroBatch

Shape = tuple[int, int, int]
"""Rows of one rank's micro-batch, source width, target width."""


@dataclass(frozen=True)
class StepSize:
    """What a step costs: rows, real tokens, and tokens after padding (source + target)."""

    rows: int
    micro_batches: int
    tokens: int
    padded_tokens: int
    longest: tuple[int, int]
    """Longest source and longest target in the step, in tokens."""


@dataclass
class ShapeUse:
    """How often a shape occurs on all ranks of an epoch, with real and padded tokens."""

    batches: int = 0
    tokens: int = 0
    padded_tokens: int = 0

    @property
    def real_share(self) -> float:
        """Real tokens over padded ones."""
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

    With ``most_steps`` only so many of its steps, spread over the epoch.
    """
    summary = PlanSummary()
    stride = 1 if most_steps is None else -(-sampler.plan.steps // most_steps)
    for step in range(0, sampler.plan.steps, max(1, stride)):
        batches = list(sampler.divided(step))
        summary.steps.append(_measure_step(sampler.plan.rows(step), batches, lengths))
        for batch in batches:
            if batch.rows is not None and batch.widths is not None:
                use = summary.shapes.setdefault((batch.rows, *batch.widths), ShapeUse())
                use.batches += len(batch.parts)
                use.tokens += sum(_real(part, lengths) for part in batch.parts)
                use.padded_tokens += sum(batch.padded_tokens(lengths))
    return summary


def _measure_step(rows: np.ndarray, batches: Sequence[MicroBatch], lengths: Lengths) -> StepSize:
    source, target = lengths
    return StepSize(
        rows=len(rows),
        micro_batches=len(batches),
        tokens=_real(rows, lengths),
        padded_tokens=sum(sum(batch.padded_tokens(lengths)) for batch in batches),
        longest=(int(source[rows].max()), int(target[rows].max())),
    )


def _real(rows: np.ndarray, lengths: Lengths) -> int:
    return sum(int(side[rows].sum()) for side in lengths)


def print_plan(sampler: EpochSampler, lengths: Lengths, *, first_steps: int, title: str) -> None:
    """Print the epoch's totals, its shapes and its first steps."""
    summary = summarise(sampler, lengths)
    total = summary.total
    pads = 1 - total.real_share
    console = Console()
    console.print(f"[bold]{title}[/bold]", highlight=False)
    micro_batches = Counter(step.micro_batches for step in summary.steps).most_common(1)
    console.print(
        f"{sum(step.rows for step in summary.steps)} rows in {len(summary.steps)} steps; "
        f"{sampler.world_size} rank(s) x {micro_batches[0][0] if micro_batches else 0} "
        f"micro-batches; share of pads {pads:.1%}",
        highlight=False,
    )
    if summary.shapes:
        _print_shapes(console, summary, lengths)
    _print_steps(console, sampler, summary.steps[:first_steps])


def shape_rows(summary: PlanSummary) -> list[tuple[str, ...]]:
    """Each shape, smallest widths first, and all together, as the cells of a table.

    Rows of one rank's micro-batch, source width, target width, tokens, batches, real tokens.
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


def _print_steps(console: Console, sampler: EpochSampler, steps: Sequence[StepSize]) -> None:
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
