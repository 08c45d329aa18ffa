"""``report.html`` and ``report.png``: a run on one self-contained page."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s2s_scale.report.plots import all_panels_png, drawn_panels, last_step, panel_svg
from s2s_scale.utils import atomic_write

SHAPE_HEADS = ("rows", "source", "target", "tokens", "batches", "real tokens")
SPLITS = ("train", "val", "test")
LONGEST_TEXT = 2_000  # characters of a sample that the page shows
DEFAULT_ORIGIN = "default"

# The most important metrics first: name, label, digits, unit.
_HEADLINES = (
    ("bleu", "BLEU", 1, ""),
    ("chrf", "chrF", 1, ""),
    ("rougeL", "ROUGE-L", 1, ""),
    ("exact_match", "exact match", 1, " %"),
    ("nll_loss", "NLL per token", 3, ""),
    ("loss", "loss", 3, ""),
)
_MOST_HEADLINES = 4

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 2rem 1.5rem 4rem; background: #fff; color: #222;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1.2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .7rem; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; }
.card { border: 1px solid #ddd; border-radius: 8px; padding: .7rem 1.1rem; min-width: 8.5rem; }
.card b { display: block; font-size: 1.6rem; font-weight: 600; line-height: 1.3; color: #1f5fa8; }
.card span { color: #666; font-size: .85rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr));
  gap: 1rem; }
.plots img { width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0;
  border-bottom: 1px solid #e5e5e5; overflow-wrap: anywhere; }
th { font-weight: 600; color: #555; font-size: .85rem; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.name { white-space: nowrap; }
.samples { table-layout: fixed; }
.samples th:first-child { width: 4rem; }
.samples td { white-space: pre-wrap; }
.differs { color: #a33a00; }
.note, .origin { color: #666; font-size: .85rem; }
code { font: .87rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
summary { cursor: pointer; color: #1f5fa8; margin: .6rem 0; }
@media print { body { max-width: none; padding: 0; font-size: 10.5pt; }
  .plots { grid-template-columns: 1fr 1fr; } .card, tr, .plots img { break-inside: avoid; }
  h2 { break-after: avoid; } }
"""


@dataclass
class RunRecord:
    """The content of a report, as plain values.

    Attributes:
        history: the entries of ``TrainerState.log_history``.
        settings: name -> value and origin (``"command line"``, ``"conf.yaml:7"``, ``"default"``).
        samples: (split, source, reference, hypothesis).
        shapes: a row of cells under ``SHAPE_HEADS`` for each shape of training batches.
        bad_steps: (step, problem, action, training rows) of each skipped step.
    """

    title: str
    history: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, float | str] = field(default_factory=dict)
    settings: dict[str, tuple[Any, str]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    samples: list[tuple[str, str, str, str]] = field(default_factory=list)
    shapes: list[tuple[str, ...]] = field(default_factory=list)
    bad_steps: list[tuple[str, ...]] = field(default_factory=list)


def write_report(record: RunRecord, output_dir: Path | str) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.png`` to ``output_dir``; returns their paths.

    Both are replaced atomically, so an interruption leaves the earlier report intact.

    Raises:
        OSError: ``output_dir`` cannot be written to.
    """
    output_dir = Path(output_dir)
    page, picture = output_dir / "report.html", output_dir / "report.png"
    atomic_write(page, _page(record))
    atomic_write(picture, all_panels_png(record.history, title=record.title))
    return page, picture


def _page(record: RunRecord) -> str:
    title = html.escape(record.title)
    versions = [(name, _text(version), "") for name, version in record.versions.items()]
    sections = (
        _headlines(record),
        _plots(record),
        _samples(record.samples),
        _results(record.results),
        _shapes(record.shapes),
        _bad_steps(record.bad_steps),
        _settings(record.settings),
        "<h2>Versions</h2>\n" + _name_table(versions) if versions else "",
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{title}</h1>\n" + "\n".join(filter(None, sections)) + "\n</body>\n</html>\n"
    )


def _headlines(record: RunRecord) -> str:
    cards = []
    for name, label, digits, unit in _HEADLINES:
        split = next((s for s in ("test", "val") if f"{s}_{name}" in record.results), None)
        value = record.results[f"{split}_{name}"] if split else None
        if isinstance(value, (int, float)):
            cards.append((f"{value:.{digits}f}{unit}", f"{label} ({split})"))
    cards = cards[:_MOST_HEADLINES]
    if steps := last_step(record.history):
        cards.append((f"{steps:,.0f}", "optimizer steps"))
    seconds = record.results.get("train_runtime")
    if isinstance(seconds, (int, float)) and math.isfinite(seconds):
        cards.append((_duration(seconds), "training time"))
    if not cards:
        return ""
    items = (
        f'<div class="card"><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>'
        for value, label in cards
    )
    return '<div class="cards">\n' + "\n".join(items) + "\n</div>"


def _plots(record: RunRecord) -> str:
    panels = drawn_panels(record.history)
    if not panels:
        return '<h2>Curves</h2>\n<p class="note">Nothing was logged in this run.</p>'
    images = []
    for panel in panels:
        data = base64.b64encode(panel_svg(record.history, panel)).decode("ascii")
        label = html.escape(f"{panel.title} over optimizer steps")
        images.append(f'<img alt="{label}" src="data:image/svg+xml;base64,{data}">')
    return '<h2>Curves</h2>\n<div class="plots">\n' + "\n".join(images) + "\n</div>"


def _samples(samples: Sequence[tuple[str, str, str, str]]) -> str:
    if not samples:
        return ""
    rows = []
    for split, source, reference, hypothesis in samples:
        differs = ' class="differs"' if hypothesis != reference else ""
        rows.append(
            f"<tr><td>{_text(split)}</td><td>{_text(source)}</td><td>{_text(reference)}</td>"
            f"<td{differs}>{_text(hypothesis)}</td></tr>"
        )
    differing = sum(hypothesis != reference for _, _, reference, hypothesis in samples)
    note = f"{len(samples)} rows; output differs from the reference in {differing} (in red)."
    head = "<tr><th>split</th><th>source</th><th>reference</th><th>output</th></tr>"
    return (
        f'<h2>Sample outputs</h2>\n<p class="note">{note}</p>\n<table class="samples">\n{head}\n'
        + "\n".join(rows)
        + "\n</table>"
    )


def _results(results: dict[str, float | str]) -> str:
    """A table of metrics by split, followed by texts and by results of no split."""
    if not results:
        return ""
    by_metric: dict[str, dict[str, float | str]] = {}
    for key, value in results.items():
        prefix, _, metric = key.partition("_")
        split, name = (prefix, metric) if prefix in SPLITS and metric else ("", key)
        by_metric.setdefault(name, {})[split] = value
    splits = [s for s in SPLITS if any(s in row for row in by_metric.values())]
    head = "".join(f'<th class="number">{split}</th>' for split in splits)
    body = []
    for name, row in by_metric.items():
        if any(isinstance(value, str) for value in row.values()) or "" in row:
            continue
        cells = "".join(f'<td class="number">{_figure(row.get(s, ""))}</td>' for s in splits)
        body.append(f'<tr><td class="name"><code>{html.escape(name)}</code></td>{cells}</tr>')
    texts = [
        (f"{split}_{name}" if split else name, _figure(value), "")
        for name, row in by_metric.items()
        for split, value in row.items()
        if isinstance(value, str) or not split
    ]
    table = ""
    if body:
        table = f"<table>\n<tr><th>metric</th>{head}</tr>\n" + "\n".join(body) + "\n</table>\n"
    if texts:
        table += _name_table(texts)
    return f'<h2>Results</h2>\n<div class="wide">\n{table}\n</div>'


def _bad_steps(steps: Sequence[tuple[str, ...]]) -> str:
    if not steps:
        return ""
    rows = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in steps
    )
    head = "<tr><th>step</th><th>problem</th><th>action</th><th>training rows</th></tr>"
    return f"<h2>Skipped steps</h2>\n<table>\n{head}\n{rows}\n</table>"


def _shapes(shapes: Sequence[tuple[str, ...]]) -> str:
    if not shapes:
        return ""
    head = "".join(f'<th class="number">{name}</th>' for name in SHAPE_HEADS)
    rows = [
        "<tr>" + "".join(f'<td class="number">{_text(cell)}</td>' for cell in row) + "</tr>"
        for row in shapes
    ]
    return (
        "<h2>Shapes of training batches</h2>\n"
        '<p class="note">As planned for the steps of one epoch, over all ranks.</p>\n'
        f'<div class="wide">\n<table>\n<tr>{head}</tr>\n' + "\n".join(rows) + "\n</table>\n</div>"
    )


def _settings(settings: dict[str, tuple[Any, str]]) -> str:
    if not settings:
        return ""
    rows = [(name, _text(str(value)), origin) for name, (value, origin) in settings.items()]
    given = [row for row in rows if row[2] != DEFAULT_ORIGIN]
    defaults = [row for row in rows if row[2] == DEFAULT_ORIGIN]
    parts = ["<h2>Settings</h2>"]
    parts.append(
        _name_table(given) if given else '<p class="note">All settings have their defaults.</p>'
    )
    if defaults:
        parts.append(f"<details><summary>{len(defaults)} settings at their defaults</summary>")
        parts += [_name_table(defaults), "</details>"]
    return "\n".join(parts)


def _name_table(rows: Iterable[tuple[str, str, str]]) -> str:
    """A table with rows of name, value (as HTML) and origin."""
    lines = [
        f'<tr><td class="name"><code>{html.escape(name)}</code></td><td>{value}</td>'
        f'<td class="origin">{html.escape(origin)}</td></tr>'
        for name, value, origin in rows
    ]
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _figure(value: float | str) -> str:
    """A number rounded to its significant digits; text is only escaped."""
    if isinstance(value, str) or not math.isfinite(value):
        return _text(str(value))
    if float(value).is_integer() or abs(value) >= 1_000:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.2f}"
    return f"{value:.4f}" if abs(value) >= 0.001 else f"{value:.3g}"


def _text(text: str) -> str:
    if len(text) > LONGEST_TEXT:
        text = f"{text[:LONGEST_TEXT]}… ({len(text) - LONGEST_TEXT:,} more characters)"
    return html.escape(text)


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {whole % 60:02} s" if minutes else f"{whole} s"
