"""Errors that the user can mend, the wording they share, and exit codes. Imports nothing heavy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

EXIT_USER_ERROR = 2
"""Exit code of a ``UserError``."""
EXIT_FAULT = 75
"""Exit code where a rank was lost or hung (sysexits' EX_TEMPFAIL: trying again may help)."""
EXIT_RESUME = 85
"""Exit code of a run that was asked to stop: start it again (HTCondor's code for a checkpoint)."""
LISTED = 5
"""Problems of a kind that are listed; the rest are counted."""


class UserError(ValueError):
    """One or more mistakes in what the user gave: input files, flags, settings, folders.

    Each problem is one line that names the field or file and line, the value found, the value
    expected and the remedy. The command line prints them without a traceback and exits with 2.
    Several problems found together are raised together, so that one run shows them all.
    """

    def __init__(self, *problems: str) -> None:
        if not problems:
            raise TypeError("UserError needs at least one problem")
        self.problems: tuple[str, ...] = problems
        super().__init__("\n".join(problems))


def raise_problems(problems: Sequence[str]) -> None:
    """Raise one ``UserError`` for all ``problems``; do nothing when there are none."""
    if problems:
        raise UserError(*problems)


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the nearest candidate, or an empty string if none is near."""
    near = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""


def unknown_name(what: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not in a fixed list, such as a scheduler or a metric."""
    names = sorted(known)
    return UserError(
        f"unknown {what} '{name}'{did_you_mean(name, names)}; expected one of: {', '.join(names)}"
    )


class Problems:
    """Problem lines by kind. Only the first ``LISTED`` of a kind are kept; the rest are counted.

    A file with a million bad lines thus gives a message that a person can read.
    """

    def __init__(self) -> None:
        self._lines: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self._counts)

    def __contains__(self, kind: str) -> bool:
        return kind in self._counts

    def add(self, kind: str, line: str) -> None:
        """Add one problem. ``kind`` is the plural that completes 'and N more ...'."""
        self.add_many(kind, [line], count=1)

    def add_many(self, kind: str, lines: Iterable[str], *, count: int) -> None:
        """Add ``count`` problems of a kind; ``lines`` may stop after the first ``LISTED``."""
        if count < 1:
            return
        kept = self._lines.setdefault(kind, [])
        kept.extend(line for line, _ in zip(lines, range(LISTED - len(kept)), strict=False))
        self._counts[kind] = self._counts.get(kind, 0) + count

    def raise_any(self) -> None:
        """Raise one ``UserError`` with all problems, kind by kind; do nothing if there are none."""
        lines = []
        for kind, kept in self._lines.items():
            lines += kept
            left_out = self._counts[kind] - len(kept)
            if left_out > 0:
                lines.append(f"and {left_out:,} more {kind}")
        raise_problems(lines)
