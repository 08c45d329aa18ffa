"""Speed of ``--batching packed`` beside ``tokens``: ``python -m benchmarks.packing [--xla]``.

Real tokens per second of our trainer on rows whose lengths have a long tail (those of
``benchmarks.train``), with the same number of real tokens in a step, label smoothing 0.1. On the
CPU with the shipped profile's settings; with ``--xla`` on one virtual XLA device (an environment
with torch-xla), with the compilations until the end. Every run is a process of its own and takes
turns with the others; the first steps, which meet new shapes, are not timed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.command_line import parser_for
from benchmarks.fresh import Spread, in_fresh_process, machine
from benchmarks.reporting import Report, show
from benchmarks.train_runs import SIZES, Case, model_of, rows_of
from tests.support.lengths import long_tailed

ROWS = 2_000
HEADS = ("batching", "tokens per row", "real tokens/s", "x tokens", "pads", "compilations")


@dataclass(frozen=True)
class Way:
    """A batching mode; ``row``: tokens per packed row, None for the default."""

    batching: str
    row: int | None = None


WAYS = (Way("tokens"), Way("packed"), Way("packed", 2_048))


@dataclass(frozen=True)
class Run:
    """What is timed: ``steps`` after ``warm_up``."""

    way: Way
    xla: bool
    size: str
    tokens_per_step: int
    steps: int
    warm_up: int
    seed: int


def measure(run: Run) -> dict[str, float]:
    """Train; ``rate`` (real tokens per second), ``pads`` (share) and ``compilations``."""
    from s2s_scale import Seq2SeqTrainer, Seq2SeqTrainingArguments
    from s2s_scale.backends import make_backend
    from s2s_scale.data.collators import Seq2SeqCollator
    from s2s_scale.settings.profiles import resolve

    profile = resolve("cpu-xla" if run.xla else "cpu")
    os.environ.update(profile.environment)
    os.environ["CPU_NUM_DEVICES"] = "1"
    backend = make_backend(profile.backend, profile.device, profile.mesh)
    backend.prepare_process()
    lengths = long_tailed(ROWS, seed=run.seed)
    case = Case("s2s-scale", False, run.size, "bart", "cpu", run.seed, 0.0, run.steps, lengths)
    model = model_of(case)
    with TemporaryDirectory() as folder:
        values = {
            **profile.arguments,
            "output_dir": folder,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "log_level": "error",
            "logging_strategy": "no",
            "label_smoothing_factor": 0.1,
            "max_steps": run.warm_up + run.steps,
            "batching": run.way.batching,
            "tokens_per_step": run.tokens_per_step,
            "tokens_per_row": run.way.row,
        }
        trainer = Seq2SeqTrainer(
            model=model,
            args=Seq2SeqTrainingArguments(**backend.training_overrides(values, trains=True)),
            train_dataset=rows_of(case),
            data_collator=Seq2SeqCollator(model.config.pad_token_id),
            backend=backend,
        )
        times = _times(trainer)
        trainer.train()
    return {**_figures(trainer, times, run), "compilations": backend.compilations()[0]}


def _times(trainer: Any) -> list[float]:
    """The time after each step."""
    from transformers import TrainerCallback

    times: list[float] = []

    class Timer(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    trainer.add_callback(Timer())
    return times


def _figures(trainer: Any, times: list[float], run: Run) -> dict[str, float]:
    sampler = trainer.parts.loaders.train_sampler
    sampler.set_epoch(0)
    real = padded = 0
    for step in range(run.warm_up, run.warm_up + run.steps):
        for batch in itertools.chain.from_iterable(sampler.divide(step)):
            padded += batch.padded_tokens(sampler.lengths)
            real += sum(int(side[batch.rows].sum()) for side in sampler.lengths)
    seconds = times[-1] - times[run.warm_up - 1]
    return {"rate": real / seconds, "pads": 1 - real / padded}


def options_of_command() -> argparse.Namespace:
    """What the command line asks for."""
    parser = parser_for("packing", __doc__)
    parser.add_argument("--xla", action="store_true", help="on a virtual XLA device")
    parser.add_argument("--size", default="small", choices=[*SIZES])
    parser.add_argument("--tokens_per_step", type=int, default=8_192)
    parser.add_argument("--pairs", type=int, default=5, help="how often the runs alternate (5)")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a run (2)")
    parser.add_argument("--results", type=Path, help="folder for the JSON and the table")
    parser.add_argument("--quick", action="store_true", help="once, a tiny model")
    options = parser.parse_args()
    if options.quick:
        options.size, options.pairs, options.tokens_per_step = "quick", 1, 4_096
    return options


def main() -> None:
    """Print the table."""
    os.environ["USE_TORCH_XLA"] = "0"
    options = options_of_command()
    # A step of ``tokens`` has a few of the 8 shapes; after 6 steps hardly one is new.
    warm_up = 6 if options.xla else 1
    runs: dict[Way, list[dict[str, float]]] = {way: [] for way in WAYS}
    for seed in range(options.pairs):
        for way, found in runs.items():
            size = (options.size, options.tokens_per_step, options.steps, warm_up, seed)
            found.append(in_fresh_process(measure, Run(way, options.xla, *size)))
    rows, entries = [], []
    base = [figures["rate"] for figures in runs[WAYS[0]]]
    for way, found in runs.items():
        rate = Spread.of([figures["rate"] for figures in found])
        ratio = Spread.of([f["rate"] / b for f, b in zip(found, base, strict=True)])
        pads = Spread.of([figures["pads"] for figures in found])
        compilations = found[0]["compilations"]
        cells = (rate.text(), ratio.text("{:.2f}"), f"{pads.median:.1%}", f"{compilations:.0f}")
        rows.append((way.batching, str(way.row or "default"), *cells))
        figures = {"rate": rate, "ratio": ratio, "pads": pads, "compilations": compilations}
        entries.append({"batching": way.batching, "tokens_per_row": way.row, **figures})
    device = "one virtual XLA device" if options.xla else "the CPU"
    title = (
        f"Packed rows beside padded ones on {device}: BART {options.size}, "
        f"{options.tokens_per_step:,} real tokens a step, median (range) of {options.pairs}"
    )
    report = Report(title, HEADS, rows, entries, machine())
    show(report, options.results and options.results / f"packing{'-xla' if options.xla else ''}")


if __name__ == "__main__":
    main()
