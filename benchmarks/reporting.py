"""Writes a benchmark's outcome: JSON with everything, a Markdown table, and a picture."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.fresh import Spread

COLOURS = {
    "s2s-scale": "#1f5fa8",
    "s2s-scale packed": "#1f5fa8",
    "s2s-scale tokens": "#7ba4d9",
    "length grouping": "#d9730d",
    "default": "#8a8a8a",
}


@dataclass(frozen=True)
class Report:
    """A table, and the figures behind it."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    entries: Sequence[dict[str, Any]]
    machine: dict[str, Any]


def as_table(report: Report) -> Table:
    table = Table(title=report.title, title_justify="left")
    for number, head in enumerate(report.heads):
        table.add_column(head, justify="right" if number > 1 else "left")
    for row in report.rows:
        table.add_row(*row)
    return table


def as_markdown(report: Report) -> str:
    lines = [report.heads, ["---"] * len(report.heads), *report.rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    machine = ", ".join(f"{name} {value}" for name, value in report.machine.items())
    return f"{report.title}.\n\n{table}\n\n{machine}\n"


def write(report: Report, stem: Path, *, picture: bool = True) -> None:
    """``stem``.json, .md and, where there are speeds, .png; folders are made."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    content = {"title": report.title, "machine": report.machine, "entries": report.entries}
    text = json.dumps(_plain(content), indent=1)
    stem.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(as_markdown(report), encoding="utf-8")
    if picture:
        FigureCanvasAgg(bars(report)).print_png(str(stem.with_suffix(".png")))


def show(report: Report, stem: Path | None, *, width: int = 140) -> None:
    """Print the table, ``width`` columns wide in a pipe; write it without a picture to ``stem``."""
    Console(width=None if sys.stdout.isatty() else width).print(as_table(report))
    if stem is not None:
        write(report, stem, picture=False)


def _plain(value: Any) -> Any:
    """The same with four significant digits, and spreads as mappings."""
    if isinstance(value, Spread):
        return {name: _plain(number) for name, number in value._asdict().items()}
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def bars(report: Report) -> Figure:
    """Real tokens per second of every way, with the range over the turns."""
    figure = Figure(figsize=(8, 0.5 * len(report.entries) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    places = list(range(len(report.entries)))[::-1]
    for place, entry in zip(places, report.entries, strict=True):
        speed: Spread = entry["tokens_per_second"]
        ends = [[speed.median - speed.least], [speed.most - speed.median]]
        axes.barh(place, speed.median, xerr=ends, color=COLOURS[entry["trainer"]], capsize=3)
        axes.text(speed.most, place, f"  {speed.median:,.0f}", va="center")
    names = [f"{_owner(entry['trainer'])}, {entry['precision']}" for entry in report.entries]
    axes.set_yticks(places, names)
    axes.set_xlabel("real tokens per second")
    axes.set_xmargin(0.15)
    axes.spines[["top", "right"]].set_visible(False)
    add_title(figure, report.title)
    return figure


def add_title(figure: Figure, text: str) -> None:
    """A title of a report, in lines that fit into a picture eight inches wide."""
    figure.suptitle(textwrap.fill(text, 100), fontsize=9)


def _owner(trainer: str) -> str:
    return trainer if trainer.startswith("s2s-scale") else f"transformers, {trainer}"
