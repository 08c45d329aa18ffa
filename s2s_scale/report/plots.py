"""Plots of a run: an SVG for each panel of the page, and one PNG with all panels.

Uses only matplotlib ``Figure`` objects: pyplot, its global figure list and the backend selected in
a user's notebook are not touched.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

History = Sequence[Mapping[str, Any]]

TRAIN, EVALUATION = "#1f5fa8", "#d9730d"  # distinguishable by colour-blind readers
INK, FAINT = "#222222", "#dddddd"
MOST_POINTS = 2_000  # per line, which keeps the page small
LONGEST_TITLE = 100  # characters
MARKED_POINTS = 40  # up to this many points get markers


class Series(NamedTuple):
    """One line of a panel: key of the log entries, label in the legend, colour."""

    key: str
    label: str
    colour: str


class Panel(NamedTuple):
    title: str
    series: tuple[Series, ...]
    thousands: bool = False  # axis labels such as 12,000


PANELS = (
    Panel(
        "Loss (label smoothing included)",
        (Series("loss", "training", TRAIN), Series("eval_loss", "validation", EVALUATION)),
    ),
    Panel(
        "Negative log-likelihood per target token",
        (Series("nll_loss", "training", TRAIN), Series("eval_nll_loss", "validation", EVALUATION)),
    ),
    Panel(
        "BLEU and chrF on validation",
        (Series("eval_bleu", "BLEU", TRAIN), Series("eval_chrf", "chrF", EVALUATION)),
    ),
    Panel("Learning rate", (Series("learning_rate", "learning rate", TRAIN),)),
    Panel(
        "Speed (target tokens per second)",
        (Series("tokens_per_second", "tokens per second", TRAIN),),
        thousands=True,
    ),
    Panel("Gradient norm", (Series("grad_norm", "gradient norm", TRAIN),)),
)


def points(history: History, key: str) -> tuple[list[float], list[float]]:
    """Steps and values of ``key``, ordered by step; NaN if a value is not a finite number.

    A step that was logged again after a restart counts once, with its later value.
    """
    by_step: dict[float, float] = {}
    for entry in history:
        if key in entry and _number(entry.get("step")) is not None:
            value = _number(entry[key])
            by_step[float(entry["step"])] = math.nan if value is None else value
    steps = sorted(by_step)
    return steps, [by_step[step] for step in steps]


def drawn_panels(history: History) -> list[Panel]:
    """The panels that have at least one finite point."""
    return [
        panel
        for panel in PANELS
        if any(
            any(math.isfinite(value) for value in points(history, series.key)[1])
            for series in panel.series
        )
    ]


def last_step(history: History) -> float:
    """The highest step of any entry; 0 if there is none."""
    steps = (_number(entry.get("step")) for entry in history)
    return max((step for step in steps if step is not None), default=0.0)


def panel_svg(history: History, panel: Panel) -> bytes:
    """One panel, 6 by 3.3 inches, as an SVG document."""
    figure = Figure(figsize=(6, 3.3), layout="constrained")
    FigureCanvasSVG(figure)
    _draw(figure.subplots(), history, panel)
    return _saved(figure, format="svg", metadata={"Date": None})


def all_panels_png(history: History, *, title: str) -> bytes:
    """All panels that have points, two per row, as one PNG; a line of text if there are none."""
    panels = drawn_panels(history)
    rows = max(1, math.ceil(len(panels) / 2))
    figure = Figure(figsize=(12, 3.3 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    line = " ".join(title.split())
    line = line if len(line) <= LONGEST_TITLE else line[: LONGEST_TITLE - 1] + "…"
    line = line.replace("$", r"\$")  # matplotlib would start a formula
    figure.suptitle(line, fontsize=14, color=INK, x=0.01, ha="left")
    if not panels:
        figure.text(0.5, 0.5, "Nothing was logged in this run.", ha="center", color=INK)
        return _saved(figure, format="png", dpi=110)
    axes = figure.subplots(rows, min(2, len(panels)), squeeze=False).flatten()
    for axis, panel in zip(axes, panels, strict=False):
        _draw(axis, history, panel)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    return _saved(figure, format="png", dpi=110)


def _draw(axis: Axes, history: History, panel: Panel) -> None:
    drawn = 0
    for series in panel.series:
        steps, values = points(history, series.key)
        stride = math.ceil(len(steps) / MOST_POINTS) or 1
        steps, values = (column[::-1][::stride][::-1] for column in (steps, values))  # last kept
        if not any(math.isfinite(value) for value in values):
            continue
        marker = "o" if len(steps) <= MARKED_POINTS else ""
        axis.plot(
            steps, values, color=series.colour, label=series.label, lw=1.6, marker=marker, ms=3.5
        )
        drawn += 1
    axis.set_title(panel.title, fontsize=11, loc="left", color=INK)
    axis.set_xlabel("optimizer step", fontsize=9, color=INK)
    axis.grid(color=FAINT, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#999999")
    axis.tick_params(labelsize=9, color="#999999", labelcolor=INK)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if panel.thousands:
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.set_ylim(bottom=0, top=1.08 * max(axis.get_ylim()[1], 1))
    axis.set_xlim(0, 1.02 * max(1.0, last_step(history)))  # the same in every panel
    if drawn > 1:
        axis.legend(fontsize=9, frameon=False)


def _number(value: object) -> float | None:
    """``value`` as a finite float, else None (NaN, infinities, text, None)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def _saved(figure: Figure, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, facecolor="white", **options)
    return buffer.getvalue()
