"""Evaluation with generated text, ours beside transformers': ``python -m benchmarks.generate``.

Rows per second of ``evaluate`` with ``--predict_with_generate`` (loss included), greedy and with 4
beams: of transformers' ``Seq2SeqTrainer``, rows in the data's order, 32 a batch; of ours with the
same batch size; and of ours with ``--generation_engine ctranslate2``, where that is installed. All
of them have the same rows and the same weights, and take turns in one process; texts are compared
row by row.

The model copies its source (see ``benchmarks/copying_model.py``), so that outputs end where sources
do. Lengths are those of ``tests/support/lengths.py``: log-normal with mean 26 and sigma 0.62.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.command_line import parser_for
from benchmarks.fresh import Spread, in_fresh_process, machine
from benchmarks.reporting import COLOURS, Report, add_title, as_table, write
from s2s_scale.data.batch_plan import Lengths
from tests.support.lengths import long_tailed

STOCK, OURS, ENGINE = "transformers", "s2s-scale", "ctranslate2"
SIZES = {
    "quick": (64, 1, 256),
    "small": (256, 3, 8_192),
    "large": (512, 6, 32_128),
    "bart-large": (1024, 12, 50_265),
}
SEARCHES = {"greedy": 1, "4 beams": 4}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
ROWS_PER_BATCH = 32
LONGEST = 200
FIRST_WORD = 6
HEADS = ("search", "evaluate of", "rows/s", "x transformers", "rows that differ")


@dataclass(frozen=True)
class Case:
    """One search on one size of model: what every side evaluates."""

    size: str
    num_beams: int
    rows: int
    pairs: int
    device: str
    sides: tuple[str, ...]
    clock: str

    @property
    def lengths(self) -> Lengths:
        return long_tailed(self.rows, longest=LONGEST)


@dataclass(frozen=True)
class Measured:
    """What one side took for each turn, and how many rows' texts are not transformers'."""

    seconds: list[float]
    differ: int


def options_of_command(arguments: list[str] | None = None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = parser_for("generate", __doc__)
    parser.add_argument("--size", nargs="+", default=["small", "large"], choices=[*SIZES])
    parser.add_argument("--search", nargs="+", default=[*SEARCHES], choices=[*SEARCHES])
    parser.add_argument("--side", nargs="+", default=_sides(), choices=(STOCK, OURS, ENGINE))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--pairs", type=int, default=5, help="how often the sides alternate (5)")
    parser.add_argument("--rows", type=int, default=192, help="rows that are evaluated (192)")
    parser.add_argument(
        "--clock",
        default="wall",
        choices=[*CLOCKS],
        help="cpu: seconds of processor time, where other work runs on the machine (wall)",
    )
    parser.add_argument("--results", type=Path, help="folder for the JSON, the table and the PNG")
    parser.add_argument("--quick", action="store_true", help="one pair of a tiny model, in seconds")
    options = parser.parse_args(arguments)
    if options.quick:
        options.size, options.pairs, options.rows = ["quick"], 1, 48
    if STOCK not in options.side:
        options.side.insert(0, STOCK)
    return options


def _sides() -> list[str]:
    there = importlib.util.find_spec("ctranslate2") is not None
    return [STOCK, OURS, *([ENGINE] if there else [])]


def measure(case: Case) -> dict[str, Measured]:
    """Evaluate with every side in turn; the first turn of each is not timed."""
    os.environ["USE_TORCH_XLA"] = "0"
    from benchmarks.copying_model import copying_model

    width, layers, vocabulary = SIZES[case.size]
    model = copying_model(width=width, layers=layers, vocabulary=vocabulary)
    rows = rows_of(case, vocabulary)
    with TemporaryDirectory() as folder:
        evaluate = {side: evaluator(side, case, model, rows, Path(folder)) for side in case.sides}
        texts = {side: evaluate[side]() for side in case.sides}
        seconds: dict[str, list[float]] = {side: [] for side in case.sides}
        for _ in range(case.pairs):
            for side in case.sides:
                started = CLOCKS[case.clock]()
                evaluate[side]()
                seconds[side].append(CLOCKS[case.clock]() - started)
    return {
        side: Measured(seconds[side], _differing(texts[side], texts[STOCK])) for side in case.sides
    }


def rows_of(case: Case, vocabulary: int) -> Any:
    """Rows of random tokens; the target is the source."""
    import datasets

    random = np.random.RandomState(0)
    ids = [
        [0, *random.randint(FIRST_WORD, vocabulary, length - 2).tolist(), 2]
        for length in np.maximum(case.lengths[0], 3).tolist()
    ]
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})


def evaluator(
    side: str, case: Case, model: Any, rows: Any, folder: Path
) -> Callable[[], list[list[int]]]:
    """A function that evaluates once and returns each row's tokens."""
    import transformers

    from s2s_scale import Seq2SeqTrainer, Seq2SeqTrainingArguments
    from s2s_scale.config import DataArguments
    from s2s_scale.data.collators import Seq2SeqCollator

    found: list[list[int]] = []

    def keep(prediction: Any) -> dict[str, float]:
        found[:] = [_text(row) for row in prediction.predictions.tolist()]
        return {}

    settings: dict[str, Any] = {
        "output_dir": str(folder / side),
        "per_device_eval_batch_size": ROWS_PER_BATCH,
        "predict_with_generate": True,
        "report_to": [],
        "disable_tqdm": True,
        "log_level": "error",
        "use_cpu": case.device == "cpu",
    }
    if side == ENGINE:
        settings["generation_engine"] = ENGINE
    stock = side == STOCK
    trainer_class = transformers.Seq2SeqTrainer if stock else Seq2SeqTrainer
    arguments = transformers.Seq2SeqTrainingArguments if stock else Seq2SeqTrainingArguments
    own = {} if stock else {"data_args": DataArguments()}  # as the command line has it
    trainer = trainer_class(
        **own,
        model=model,
        args=arguments(**settings),
        eval_dataset=rows,
        data_collator=Seq2SeqCollator(model.config.pad_token_id),
        compute_metrics=keep,
    )

    def evaluate() -> list[list[int]]:
        trainer.evaluate(max_length=LONGEST + 8, num_beams=case.num_beams)
        return list(found)

    return evaluate


def _text(row: list[int]) -> list[int]:
    """A row's tokens after the start token, up to its end token."""
    rest = row[1:]
    return rest[: rest.index(2)] if 2 in rest else rest


def _differing(found: list[list[int]], wanted: list[list[int]]) -> int:
    return sum(one != other for one, other in zip(found, wanted, strict=True))


def entries_of(search: str, case: Case, found: dict[str, Measured]) -> list[dict[str, Any]]:
    """One entry for each side: medians and spreads of rows per second and of the ratios."""
    reference = found[STOCK].seconds
    entries = []
    for side, measured in found.items():
        ratios = [theirs / own for own, theirs in zip(measured.seconds, reference, strict=True)]
        entries.append(
            {
                "search": search,
                "side": side,
                "rows_per_second": Spread.of([case.rows / s for s in measured.seconds]),
                "times_transformers": Spread.of(ratios),
                "rows": case.rows,
                "rows_that_differ": measured.differ,
            }
        )
    return entries


def rows_of_table(entries: list[dict[str, Any]]) -> list[list[str]]:
    """The entries as the cells of ``HEADS``."""
    return [
        [
            entry["search"],
            entry["side"],
            entry["rows_per_second"].text("{:.1f}"),
            entry["times_transformers"].text("{:.2f}"),
            f"{entry['rows_that_differ']} of {entry['rows']}",
        ]
        for entry in entries
    ]


def bars(report: Report) -> Figure:
    """Rows per second of every side and search, with the range over the turns."""
    figure = Figure(figsize=(8, 0.5 * len(report.entries) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    places = list(range(len(report.entries)))[::-1]
    colours = dict(zip((STOCK, OURS, ENGINE), ("#8a8a8a", COLOURS[OURS], "#d9730d"), strict=True))
    for place, entry in zip(places, report.entries, strict=True):
        speed: Spread = entry["rows_per_second"]
        ends = [[speed.median - speed.least], [speed.most - speed.median]]
        axes.barh(place, speed.median, xerr=ends, color=colours[entry["side"]], capsize=3)
        axes.text(speed.most, place, f"  {speed.median:,.1f}", va="center")
    axes.set_yticks(places, [f"{entry['side']}, {entry['search']}" for entry in report.entries])
    axes.set_xlabel("rows per second, evaluation with generated text")
    axes.set_xmargin(0.15)
    axes.spines[["top", "right"]].set_visible(False)
    add_title(figure, report.title)
    return figure


def title(size: str, options: argparse.Namespace) -> str:
    width, layers, vocabulary = SIZES[size]
    return (
        f"BART that copies, d {width}, {layers}+{layers} layers, V {vocabulary:,}, fp32; "
        f"{options.rows} rows, {ROWS_PER_BATCH} a batch; {options.pairs} turns, by the "
        f"{options.clock} clock"
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables, and write them where asked to."""
    options = options_of_command(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(machine(options.device))
    for size in options.size:
        entries = []
        for search in options.search:
            case = Case(
                size=size,
                num_beams=SEARCHES[search],
                rows=options.rows,
                pairs=options.pairs,
                device=options.device,
                sides=tuple(options.side),
                clock=options.clock,
            )
            entries += entries_of(search, case, in_fresh_process(measure, case))
        report = Report(
            title=title(size, options),
            heads=HEADS,
            rows=rows_of_table(entries),
            entries=entries,
            machine=machine(options.device),
        )
        console.print(as_table(report))
        if options.results is not None:
            searches = "-".join(search.split()[-1] for search in options.search)
            stem = options.results / f"generate-{size}-{searches}-{options.device}"
            write(report, stem, picture=False)
            FigureCanvasAgg(bars(report)).print_png(str(stem.with_suffix(".png")))


if __name__ == "__main__":
    main()
