"""The results of a run: JSON files, the table printed at the end, and the report."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from s2s_scale.evaluation.text import TextEvaluation
from s2s_scale.utils import atomic_write, package_version

PACKAGES = (
    "s2s-scale", "torch", "transformers", "accelerate", "datasets", "tokenizers", "sacrebleu",
    "rouge-score",
)  # fmt: skip
ALL_RESULTS = "all_results.json"

_DIGITS = {"loss": 4, "nll_loss": 4, "perplexity": 3}
_HIDDEN = ("total_flos", "model_preparation_time", "steps_per_second", "epoch")
"""Metrics of transformers' trainer that the table and the report omit; the files contain them."""


@dataclass
class Results:
    """Metrics of the evaluated splits, with samples and signatures of the text metrics."""

    metrics: dict[str, float] = field(default_factory=dict)
    """Prefixed by split: ``train_loss``, ``test_bleu``, …"""
    signatures: dict[str, str] = field(default_factory=dict)
    """Metric -> signature in sacrebleu's format."""
    samples: list[tuple[str, str, str, str]] = field(default_factory=list)
    """(split, source, reference, hypothesis)."""

    def add(self, split: str, metrics: Mapping[str, float], text: TextEvaluation | None) -> None:
        """Add a split's metrics, prefixed by the split's name if they are not already."""
        self.metrics |= {
            name if name.startswith(f"{split}_") else f"{split}_{name}": value
            for name, value in metrics.items()
            if name != "epoch"
        }
        if text is None:
            return
        self.signatures |= text.signatures
        self.samples += [(split, s.source, s.reference, s.hypothesis) for s in text.samples]

    def of(self, split: str) -> dict[str, Any]:
        """A split's metrics, including the signatures of the text metrics."""
        found: dict[str, Any] = {
            name: value for name, value in self.metrics.items() if name.startswith(f"{split}_")
        }
        found |= {
            f"{split}_{metric}_signature": signature
            for metric, signature in self.signatures.items()
            if f"{split}_{metric}" in found
        }
        return found

    def write(self, output_dir: Path, split: str) -> Path:
        """Write ``<split>_results.json`` and merge it into ``all_results.json``."""
        own = self.of(split)
        path, merged = output_dir / f"{split}_results.json", output_dir / ALL_RESULTS
        earlier = json.loads(merged.read_text(encoding="utf-8")) if merged.exists() else {}
        for file, values in ((path, own), (merged, earlier | own)):
            text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False)
            atomic_write(file, text + "\n")
        return path


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that affect results."""
    found = {name: found for name in PACKAGES if (found := package_version(name))}
    return {"Python": platform.python_version(), **found}


def write_run_report(
    output_dir: Path,
    *,
    title: str,
    history: list[dict[str, Any]],
    results: Results,
    settings: Mapping[str, tuple[Any, str]],
    shapes: Sequence[tuple[str, ...]] = (),
    bad_steps: Sequence[tuple[str, ...]] = (),
) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.png`` to ``output_dir``; returns their paths."""
    # Imported only at the end of a run: matplotlib takes a tenth of all import time.
    from s2s_scale.report.page import RunRecord, write_report

    record = RunRecord(
        title=title,
        history=history,
        results={
            name: value for name, value in results.metrics.items() if not name.endswith(_HIDDEN)
        }
        | {f"{name} signature": value for name, value in results.signatures.items()},
        settings=dict(settings),
        versions=versions(),
        samples=results.samples,
        shapes=list(shapes),
        bad_steps=list(bad_steps),
    )
    return write_report(record, output_dir)


def print_table(results: Results, *, title: str) -> None:
    """Print the metrics as a table with a row per metric and a column per split."""
    splits = [s for s in ("train", "val", "test") if results.of(s)]
    names: dict[str, None] = {}
    for split in splits:
        for name in results.metrics:
            if name.startswith(f"{split}_") and name.removeprefix(f"{split}_") not in _HIDDEN:
                names[name.removeprefix(f"{split}_")] = None
    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    for split in splits:
        table.add_column(split, justify="right")
    for name in names:
        cells = []
        for split in splits:
            value: Any = results.metrics.get(f"{split}_{name}", "")
            digits = _DIGITS.get(name, 2)
            cells.append(f"{value:.{digits}f}" if isinstance(value, float) else str(value))
        table.add_row(name, *cells)
    console = Console(markup=False)
    console.print(table)
    for metric, signature in results.signatures.items():
        console.print(f"{metric}: {signature}", highlight=False, soft_wrap=True)
