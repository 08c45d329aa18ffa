"""The words of one verb's command line into typed values. Every problem is collected.

``argparse`` is not used: it stops at the first mistake, accepts abbreviations in places, and does
not name the nearest option.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s2s_scale.errors import UserError, did_you_mean
from s2s_scale.settings.commands import Verb, verbs
from s2s_scale.settings.options import Option
from s2s_scale.settings.parsing import FALSE_WORDS, NONE_WORDS, TRUE_WORDS, expected, from_words


@dataclass
class ParsedLine:
    """What a command line gave: typed values by option name, what stood alone, the problems."""

    values: dict[str, Any] = field(default_factory=dict)
    positional: str | None = None
    problems: list[str] = field(default_factory=list)


def parse_line(verb: Verb, words: Sequence[str]) -> ParsedLine:
    """Parse the words that follow the verb. Flags may be written with dashes or underscores."""
    return _Parser(verb).parse(words)


def unknown_option(name: str, *, verb: Verb, written: str) -> str:
    """The problem for an option that the verb lacks; ``written`` is how the user wrote it."""
    known = {entry.name for entry in verb.options()}
    near = did_you_mean(written, [("--" if written[:2] == "--" else "") + k for k in sorted(known)])
    owners = [
        other.name
        for other in verbs().values()
        if any(name in (entry.name, *entry.aliases) for entry in other.options())
    ]
    what = "option" if written.startswith("--") else "setting"
    if owners:
        return f"'{written}' is no {what} of {verb.name}, but of {', '.join(owners)}{near}"
    return f"unknown {what} '{written}'{near or f'; s2s-scale {verb.name} --help lists them'}"


class _Parser:
    """State of one parse: the verb's flags by name and the words that are still to come."""

    def __init__(self, verb: Verb) -> None:
        self.verb = verb
        self.flags = {
            name: entry for entry in verb.options() for name in (entry.name, *entry.aliases)
        }
        self.rest: list[str] = []
        self.line = ParsedLine()
        self.written: dict[str, str] = {}

    def parse(self, words: Sequence[str]) -> ParsedLine:
        self.rest = list(words)
        while self.rest:
            word = self.rest.pop(0)
            if _is_flag(word):
                self._flag(word)
            else:
                self._alone(word)
        return self.line

    def _alone(self, word: str) -> None:
        """A word that belongs to no flag: the settings file or name, or a mistake."""
        takes = self.verb.positional
        if takes and self.line.positional is None:
            self.line.positional = word
        elif takes:
            self.line.problems.append(
                f"unexpected '{word}': {self.verb.name} takes one {takes}, and that is "
                f"'{self.line.positional}'"
            )
        else:
            self.line.problems.append(f"unexpected '{word}': expected a flag such as --output_dir")

    def _flag(self, word: str) -> None:
        """A flag with its values, however it is written."""
        written, equals, value = word.partition("=")
        name = written[2:].replace("-", "_")
        entry = self.flags.get(name)
        if entry is None and name.startswith("no_") and not equals:
            entry = self.flags.get(name[3:])
            if entry is not None and entry.is_bool:
                return self._store(entry, written, False)
            entry = None
        if entry is None:
            self._take_words()
            self.line.problems.append(unknown_option(name, verb=self.verb, written=written))
            return None
        words = [value] if equals else self._values_of(entry)
        if not words and entry.bare is not None and not equals:
            return self._store(entry, written, entry.bare)
        if not words:
            self.line.problems.append(f"{written}: expected {expected(entry)}, got nothing")
            return None
        try:
            return self._store(entry, written, from_words(entry, words))
        except UserError as error:
            self.line.problems.append(f"{written}: {error}")
        return None

    def _store(self, entry: Option, written: str, value: Any) -> None:
        if entry.name in self.line.values and self.line.values[entry.name] != value:
            self.line.problems.append(
                f"{written}: given twice, as {self.line.values[entry.name]!r} "
                f"({self.written[entry.name]}) and {value!r}; keep one"
            )
            return
        self.line.values[entry.name] = value
        self.written[entry.name] = written

    def _values_of(self, entry: Option) -> list[str]:
        """Take the words that belong to ``entry`` from those to come."""
        if entry.is_list:
            return self._take_words()
        if not self.rest or _is_flag(self.rest[0]):
            return []
        if entry.bare is not None and self._stands_alone(entry, self.rest[0]):
            return []
        return [self.rest.pop(0)]

    def _stands_alone(self, entry: Option, word: str) -> bool:
        """Whether ``word`` after a flag that may stand alone is the settings file, not a value."""
        if entry.is_bool and word.lower() in (*TRUE_WORDS, *FALSE_WORDS, *NONE_WORDS):
            return False
        free = self.verb.positional is not None and self.line.positional is None
        return free and (Path(word).suffix in (".yaml", ".yml") or Path(word).is_file())

    def _take_words(self) -> list[str]:
        """Take all words up to the next flag."""
        count = next((i for i, w in enumerate(self.rest) if _is_flag(w)), len(self.rest))
        taken, self.rest = self.rest[:count], self.rest[count:]
        return taken


def _is_flag(word: str) -> bool:
    """``--name``; ``-`` is a stream and ``-1`` a number. A text ``--x`` needs ``--flag=--x``."""
    return bool(re.match(r"--[^\W\d]", word)) or word in ("-h", "--")
