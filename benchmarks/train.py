"""Training speed, ours beside transformers': ``python -m benchmarks.train``.

Real tokens per second of our ``Seq2SeqTrainer`` with what the shipped ``cpu`` profile says (``gpu``
with ``--device cuda``), under ``--batching packed`` and ``--batching tokens`` with every other
setting as shipped, so that it is a setting which ``benchmarks.learning`` has followed; of
transformers' with its defaults (random batches of 32 rows), and of transformers' with its length
grouping; in fp32 and in bf16, label smoothing 0.1. All of them train the same random weights on the
same rows; a step of ours has as many real tokens as 32 rows have on average, so that all make as
many steps. Lengths are those of ``tests/support/lengths.py``: source
log-normal with mean 26 and sigma 0.62, target 1.15 times as long with a log-normal factor of sigma
0.2, for which random batches of 32 hold 68 % pads; or those of ``--data_dir``.

Every run is a process of its own and takes turns with the others; its first step is not timed. Real
tokens are source and target tokens without pads; a step's time includes everything that its trainer
does between two steps.
MFU is the model's floating-point operations for real tokens over those of the fastest matrix
products measured here at the start, in the same precision (fp32: by torch's default path).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.command_line import parser_for
from benchmarks.fresh import CLOCKS, MIB, Spread, in_fresh_process, machine
from benchmarks.peaks import measure_peaks
from benchmarks.reporting import Report, as_table, write
from benchmarks.train_runs import (
    DEFAULT,
    GROUPED,
    SIDES,
    SIZES,
    Case,
    lengths_of_files,
    measure,
)
from s2s_scale.data.batch_plan import Lengths
from tests.support.lengths import long_tailed, share_of_pads_at_random

ROWS = 6_400
PRECISIONS = ("fp32", "bf16")
HEADS = (
    "trainer",
    "precision",
    "real tokens/s",
    "x default fp32",
    "x grouping",
    "pads",
    "MFU",
    "peak MiB",
)
Runs = dict[tuple[str, str], list[dict[str, float]]]


def options_of_command(arguments: list[str] | None = None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = parser_for("train", __doc__)
    parser.add_argument("--size", nargs="+", default=["small", "large"], choices=[*SIZES])
    parser.add_argument("--family", default="bart", choices=("bart", "t5"))
    parser.add_argument("--precision", nargs="+", default=[*PRECISIONS], choices=PRECISIONS)
    parser.add_argument("--side", nargs="+", default=[*SIDES], choices=SIDES)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--pairs", type=int, default=5, help="how often the runs alternate (5)")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a run (4)")
    parser.add_argument(
        "--clock",
        default="wall",
        choices=CLOCKS,
        help="cpu: seconds of all threads together, where others use the machine as well",
    )
    parser.add_argument("--rows", type=int, default=ROWS, help=f"rows of the data set ({ROWS:,})")
    parser.add_argument("--data_dir", type=Path, help="folder with train.source and train.target")
    parser.add_argument("--tokenizer", help="of --data_dir's tokens; without it words are counted")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="for our side")
    parser.add_argument("--results", type=Path, help="folder for the JSON, the table and the PNG")
    parser.add_argument("--quick", action="store_true", help="one pair of a tiny model, in seconds")
    options = parser.parse_args(arguments)
    if options.quick:
        options.size, options.pairs, options.steps = ["quick"], 1, 1
    return options


def run_all(size: str, lengths: Lengths, options: argparse.Namespace) -> Runs:
    """Every way to train, in turn, as often as asked for."""
    found: Runs = {}
    for number in range(options.pairs):
        for precision in options.precision:
            for side in options.side:
                case = Case(
                    side=side,
                    bf16=precision == "bf16",
                    size=size,
                    family=options.family,
                    device=options.device,
                    seed=number + 1,
                    share=(number + 0.5) / options.pairs,
                    steps=options.steps,
                    lengths=lengths,
                    clock=options.clock,
                    settings=tuple(_setting(text) for text in options.set),
                )
                figures = in_fresh_process(measure, case)
                found.setdefault((side, precision), []).append(figures)
                rate = figures["real"] / figures["seconds"]
                note = (
                    f"{size} {number + 1}/{options.pairs} {precision} {side}: {rate:,.0f} tokens/s"
                )
                print(note, file=sys.stderr, flush=True)
    return found


def _setting(text: str) -> tuple[str, Any]:
    import yaml

    name, _, value = text.partition("=")
    return name, yaml.safe_load(value)


def summary(runs: Runs, peaks: dict[str, float]) -> list[dict[str, Any]]:
    """One entry for each way: medians and spreads of what was measured and of the ratios."""
    rates = {way: [run["real"] / run["seconds"] for run in of_way] for way, of_way in runs.items()}
    entries = []
    for (side, precision), of_way in runs.items():
        mfu = [run["flops"] / run["seconds"] / peaks[precision] for run in of_way]
        entry: dict[str, Any] = {
            "trainer": side,
            "precision": precision,
            "tokens_per_second": Spread.of(rates[side, precision]),
            "pads": 1 - sum(r["real"] for r in of_way) / sum(r["padded"] for r in of_way),
            "mfu": Spread.of(mfu),
            "peak_mib": Spread.of([run["peak"] / MIB for run in of_way]),
        }
        for name, other in (
            ("times_default_fp32", (DEFAULT, "fp32")),
            ("times_grouping", (GROUPED, precision)),
        ):
            if other in rates:
                pairs = zip(rates[side, precision], rates[other], strict=True)
                entry[name] = Spread.of([own / reference for own, reference in pairs])
        entries.append(entry)
    return entries


def rows_of_table(entries: list[dict[str, Any]]) -> list[list[str]]:
    """The entries as the cells of ``HEADS``."""
    return [
        [
            entry["trainer"],
            entry["precision"],
            entry["tokens_per_second"].text(),
            _ratio(entry.get("times_default_fp32")),
            _ratio(entry.get("times_grouping")),
            f"{entry['pads']:.1%}",
            f"{entry['mfu'].median:.0%}",
            f"{entry['peak_mib'].median:,.0f}",
        ]
        for entry in entries
    ]


def _ratio(spread: Spread | None) -> str:
    return "" if spread is None else spread.text("{:.2f}")


def title(size: str, lengths: Lengths, options: argparse.Namespace) -> str:
    shape = SIZES[size]
    layers = f"{shape.layers}+{shape.layers} layers"
    pads = share_of_pads_at_random(lengths)
    return (
        f"{options.family.upper()}, d {shape.width}, {layers}, V {shape.vocabulary:,}, smoothing "
        f"0.1; {options.pairs} turns of {options.steps} steps, {options.clock} time; "
        f"{len(lengths[0]):,} rows, random batches of 32 hold {pads:.0%} pads"
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables, and write them where asked to."""
    options = options_of_command(arguments)
    if options.data_dir is None:
        lengths = long_tailed(options.rows, longest=512)
    else:
        lengths = lengths_of_files(options.data_dir, options.tokenizer)
    peaks = in_fresh_process(measure_peaks, (options.device, options.clock))
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(machine(options.device))
    console.print({name: f"{rate / 1e9:,.0f} GFLOP/s" for name, rate in peaks.items()})
    for size in options.size:
        entries = summary(run_all(size, lengths, options), peaks)
        report = Report(
            title=title(size, lengths, options),
            heads=HEADS,
            rows=rows_of_table(entries),
            entries=entries,
            machine=machine(options.device)
            | {f"{name} products": f"{rate / 1e9:,.0f} GFLOP/s" for name, rate in peaks.items()},
        )
        console.print(as_table(report))
        if options.results is not None:
            write(report, options.results / f"train-{size}-{options.device}")


if __name__ == "__main__":
    main()
