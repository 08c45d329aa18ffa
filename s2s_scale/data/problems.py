"""Collects the mistakes found in a file, a few of each kind, and raises them together."""

from __future__ import annotations

from collections.abc import Iterable

from s2s_scale.errors import raise_problems

LISTED = 5


class Problems:
    """Problem lines by kind. Only the first ``LISTED`` of a kind are kept; the rest are counted.

    A file with a million bad lines thus gives a message that a person can read.
    """

    def __init__(self) -> None:
        self._lines: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self._counts)

    def add(self, kind: str, line: str) -> None:
        """Add one problem. ``kind`` is the plural that 'and N more' is said of."""
        self.add_many(kind, [line], count=1)

    def add_many(self, kind: str, lines: Iterable[str], *, count: int) -> None:
        """Add ``count`` problems of a kind; ``lines`` may stop after the first ``LISTED``."""
        if count < 1:
            return
        kept = self._lines.setdefault(kind, [])
        kept.extend(line for line, _ in zip(lines, range(LISTED - len(kept)), strict=False))
        self._counts[kind] = self._counts.get(kind, 0) + count

    def lines(self) -> list[str]:
        """All kept lines in the order of their kinds, each kind followed by what was left out."""
        lines = []
        for kind, kept in self._lines.items():
            lines += kept
            left_out = self._counts[kind] - len(kept)
            if left_out > 0:
                lines.append(f"and {left_out:,} more {kind}")
        return lines

    def raise_any(self) -> None:
        """Raise one ``UserError`` with all lines; do nothing when there are none."""
        raise_problems(self.lines())
