"""What a save costs, beside transformers' own: ``python -m benchmarks.checkpoints``.

A T5 of random weights makes one step and is then saved with its AdamW state, each time in a fresh
process: by transformers' ``Seq2SeqTrainer``, by ours, and by ours with ``--save_in_background``.
Shown are the seconds for which training stands still, the seconds until the files are complete, and
by how much the peak of resident memory grows. Ours waits for the disk (fsync) and takes checksums;
transformers' does neither. ``disk`` is a plain copy of as many bytes with fsync, in the same place.
Runs alternate; medians are shown.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from benchmarks.fresh import MIB, Spread, growth_since, in_fresh_process, machine, start_peak
from benchmarks.reporting import Report, as_table, write

SIDES = ("transformers", "s2s-scale", "s2s-scale, in background", "disk")
SIZES: dict[str, Any] = {"d_model": 512, "d_ff": 2048, "num_heads": 8, "d_kv": 64, "num_layers": 6}
VOCABULARY, QUICK_VOCABULARY = 32_128, 1_024
HEADS = (
    "",
    "training stands still, s",
    "ratio",
    "complete after, s",
    "peak grows by, MiB",
    "of the weights",
)


def measure(case: tuple[str, int]) -> dict[str, float]:
    """Figures of one save by a side, of a model with so many words; in a process of its own."""
    with TemporaryDirectory(prefix="s2s-scale-save-") as folder:
        return _measure(*case, Path(folder))


def _measure(side: str, vocabulary: int, folder: Path) -> dict[str, float]:
    from transformers import T5Config, T5ForConditionalGeneration

    from s2s_scale.models.tiny import ragged_rows

    config = T5Config(vocab_size=vocabulary, decoder_start_token_id=0, **SIZES)
    model = T5ForConditionalGeneration(config)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    if side == "disk":
        seconds = _copy(3 * weights, folder)
        return {"weights": weights, "still": seconds, "whole": seconds, "peak": 0}
    trainer = _trainer(side, model, ragged_rows(model, 8), folder)
    trainer.train()
    start, started = start_peak(), time.perf_counter()
    trainer._save_checkpoint(trainer.model, trial=None)
    still = time.perf_counter() - started
    if side != SIDES[0]:
        trainer.parts.checkpointer.settle(wait=True)
    whole = time.perf_counter() - started
    assert (folder / "checkpoint-1" / "model.safetensors").is_file()
    return {"weights": weights, "still": still, "whole": whole, "peak": growth_since(start)}


def _trainer(side: str, model: Any, rows: Any, folder: Path) -> Any:
    from tests.support.training import our_trainer, stock_trainer

    values = {"max_steps": 1, "per_device_train_batch_size": 4, "optim": "adamw_torch"}
    if side == SIDES[0]:
        return stock_trainer(model, folder, rows, **values)
    return our_trainer(model, folder, rows, save_in_background=side == SIDES[2], **values)


def _copy(count: int, folder: Path) -> float:
    """Seconds to write so many bytes and see them on the disk."""
    block = os.urandom(MIB)
    started = time.perf_counter()
    with (folder / "copy").open("wb") as file:
        for _ in range(count // MIB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - started


def main() -> None:
    """Print the table, and put it into a folder if one is named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoints", description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--repeats", type=int, default=5, help="alternations (5)")
    parser.add_argument("--quick", action="store_true", help="one alternation of a smaller model")
    parser.add_argument("--output", type=Path, help="file without ending, for .json and .md")
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.vocabulary = 1, QUICK_VOCABULARY
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(options.repeats):
        for side in SIDES:
            found[side].append(in_fresh_process(measure, (side, options.vocabulary)))
    report = _report(found, options.repeats)
    Console(width=None if sys.stdout.isatty() else 140).print(as_table(report))
    if options.output:
        write(report, options.output, picture=False)


def _report(found: dict[str, list[dict[str, float]]], repeats: int) -> Report:
    entries = [
        {"side": side, **{name: Spread.of([run[name] for run in runs]) for name in runs[0]}}
        for side, runs in found.items()
    ]
    stock = entries[0]
    weights = stock["weights"].median
    rows = [
        [
            one["side"],
            one["still"].text("{:.2f}"),
            f"{one['still'].median / stock['still'].median:.2f}",
            one["whole"].text("{:.2f}"),
            f"{one['peak'].median / MIB:,.0f}",
            f"{one['peak'].median / weights:.2f}",
        ]
        for one in entries
    ]
    size = f"{weights / MIB:,.0f} MiB of weights and {2 * weights / MIB:,.0f} MiB of moments"
    title = f"Saving a T5 with {size}: median of {repeats} (least-most)"
    return Report(title, HEADS, rows, entries, machine())


if __name__ == "__main__":
    main()
