"""The batch plan in words: steps, rows and pads of an epoch, before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from s2s_scale.data.batching import EpochPlan, Lengths, Rows, divide_step


@dataclass(frozen=True)
class StepSize:
    """What a step costs: rows, real tokens, and tokens after padding (source + target)."""

    rows: int
    micro_batches: int
    tokens: int
    padded_tokens: int
    longest: tuple[int, int]
    """Longest source and longest target in the step, in tokens."""


def measure_step(
    rows: Rows, lengths: Lengths, *, world_size: int, rows_per_device: int
) -> StepSize:
    """The size of the step that ``rows`` make on ``world_size`` ranks."""
    source, target = lengths
    micro_batches = divide_step(rows, world_size=world_size, rows_per_device=rows_per_device)
    padded = sum(
        len(part) * (int(source[part].max()) + int(target[part].max()))
        for parts in micro_batches
        for part in parts
        if len(part)
    )
    return StepSize(
        rows=len(rows),
        micro_batches=len(micro_batches),
        tokens=int(source[rows].sum() + target[rows].sum()),
        padded_tokens=padded,
        longest=(int(source[rows].max()), int(target[rows].max())),
    )


def print_plan(
    plan: EpochPlan,
    lengths: Lengths,
    *,
    world_size: int,
    rows_per_device: int,
    first_steps: int,
    title: str,
) -> None:
    """Print the epoch's totals and its first steps."""
    steps = [
        measure_step(rows, lengths, world_size=world_size, rows_per_device=rows_per_device)
        for rows in plan
    ]
    padded = sum(step.padded_tokens for step in steps)
    pads = 1 - sum(step.tokens for step in steps) / padded if padded else 0.0
    console = Console()
    console.print(f"[bold]{title}[/bold]", highlight=False)
    console.print(
        f"{sum(step.rows for step in steps)} rows in {plan.steps} steps; "
        f"{world_size} rank(s) x {rows_per_device} rows; share of pads {pads:.1%}",
        highlight=False,
    )
    table = Table()
    for name in ("step", "rows", "micro-batches", "tokens", "padded", "longest", "first rows"):
        table.add_column(name, justify="left" if name == "first rows" else "right")
    for number, (step, rows) in enumerate(zip(steps, plan, strict=True)):
        if number >= first_steps:
            break
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
