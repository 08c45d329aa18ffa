"""Loss and gradient norm of one step cut in two ways: ``python -m benchmarks.accumulation``.

The same 8 rows of ragged lengths make one optimizer step, as one batch of 8 and as two
micro-batches of 4. A trainer that computes what it says prints the same figures for both.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.command_line import parser_for
from tests.support.families import FAMILY_NAMES
from tests.support.training import fresh, history, our_trainer, ragged_rows, stock_trainer

CUTS = ((8, 1), (4, 2))


def first_step(
    make: Callable[..., Any], family: str, *, smoothing: float, cut: tuple[int, int]
) -> tuple[float, float]:
    """Loss and gradient norm of the first step."""
    model = fresh(family)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(
            model,
            Path(folder),
            ragged_rows(model, 8),
            label_smoothing_factor=smoothing,
            per_device_train_batch_size=cut[0],
            gradient_accumulation_steps=cut[1],
            train_sampling_strategy="sequential",
            max_steps=1,
        )
        trainer.train()
    return history(trainer, "loss")[0], history(trainer, "grad_norm")[0]


def main() -> None:
    """Print the table."""
    parser_for("accumulation", __doc__).parse_args()
    table = Table(title="loss (gradient norm) of the first step over the same 8 rows")
    for name in ("family", "smoothing", "transformers 8x1", "4x2", "s2s-scale 8x1", "4x2"):
        table.add_column(name, justify="left" if name == "family" else "right")
    for smoothing in (0.0, 0.1):
        for family in FAMILY_NAMES:
            cells = [
                "{:.4f} ({:.4f})".format(*first_step(make, family, smoothing=smoothing, cut=cut))
                for make in (stock_trainer, our_trainer)
                for cut in CUTS
            ]
            table.add_row(family, str(smoothing), *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
