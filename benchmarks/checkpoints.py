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
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.resident import MIB, growth_since, start_peak

SIDES = ("transformers", "s2s-scale", "s2s-scale, in background", "disk")
SIZES: dict[str, Any] = {"d_model": 512, "d_ff": 2048, "num_heads": 8, "d_kv": 64, "num_layers": 6}
VOCABULARY, QUICK_VOCABULARY = 32_128, 1_024


def measure(side: str, *, vocabulary: int, folder: str) -> dict[str, float]:
    """Figures of one save; in a process of its own."""
    from transformers import T5Config, T5ForConditionalGeneration

    from s2s_scale.models.tiny import ragged_rows

    config = T5Config(vocab_size=vocabulary, decoder_start_token_id=0, **SIZES)
    model = T5ForConditionalGeneration(config)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    if side == "disk":
        return {
            "weights": weights,
            "still": _copy(3 * weights, Path(folder)),
            "whole": 0,
            "peak": 0,
        }
    trainer = _trainer(side, model, ragged_rows(model, 8), Path(folder))
    trainer.train()
    start, started = start_peak(), time.perf_counter()
    trainer._save_checkpoint(trainer.model, trial=None)
    still = time.perf_counter() - started
    if side != SIDES[0]:
        trainer.settle_background_save(wait=True)
    whole = time.perf_counter() - started
    assert (Path(folder) / "checkpoint-1" / "model.safetensors").is_file()
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


def in_fresh_process(side: str, vocabulary: int) -> dict[str, float]:
    """What ``measure`` gives in a process of its own, in a folder of its own."""
    with TemporaryDirectory(prefix="s2s-scale-save-") as folder:
        words = ["--measure", side, "--vocabulary", str(vocabulary), "--folder", folder]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.checkpoints", *words],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"{side}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Print the table, or measure one save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoints", description=__doc__)
    parser.add_argument("--measure", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--repeats", type=int, default=5, help="alternations (5)")
    parser.add_argument("--quick", action="store_true", help="one alternation of a smaller model")
    options = parser.parse_args()
    if options.measure:
        figures = measure(options.measure, vocabulary=options.vocabulary, folder=options.folder)
        print(json.dumps(figures))
        return
    if options.quick:
        options.repeats, options.vocabulary = 1, QUICK_VOCABULARY
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(options.repeats):
        for side in SIDES:
            found[side].append(in_fresh_process(side, options.vocabulary))
    middle = {
        side: {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        for side, runs in found.items()
    }
    weights = middle[SIDES[0]]["weights"]
    size = f"{weights / MIB:,.0f} MiB of weights, {2 * weights / MIB:,.0f} MiB of moments"
    table = Table(title=f"T5, {size}; median of {options.repeats}")
    heads = ("training stands still, s", "ratio", "complete after, s", "peak grows by, MiB")
    for head in ("", *heads, "of the weights"):
        table.add_column(head, justify="right" if head else "left")
    for side, one in middle.items():
        table.add_row(side, *_cells(one, middle[SIDES[0]]["still"]))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _cells(one: dict[str, float], stock: float) -> list[str]:
    cells = [f"{one['still']:.2f}", f"{one['still'] / stock:.2f}"]
    if one["whole"]:
        cells += [
            f"{one['whole']:.2f}",
            f"{one['peak'] / MIB:,.0f}",
            f"{one['peak'] / one['weights']:.2f}",
        ]
    return cells


if __name__ == "__main__":
    main()
