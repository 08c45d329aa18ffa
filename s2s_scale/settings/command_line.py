"""The arguments of one command into typed values. Every problem is collected.

``argparse`` is not used: it stops at the first mistake, accepts abbreviations in places, and does
not name the nearest option.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2s_scale.errors import UserError, did_you_mean
from s2s_scale.settings.commands import Command, all_commands
from s2s_scale.settings.options import Option
from s2s_scale.settings.parsing import (
    ALONE,
    BOOLS,
    COMMAND_LINE,
    NONE_WORDS,
    Entry,
    convert_entries,
)


@dataclass(frozen=True)
class ParsedLine:
    """What a command line gave: typed values by option name, the positional, the problems."""

    values: dict[str, Any]
    positional: str | None
    problems: list[str]


def parse_line(command: Command, argv: Sequence[str]) -> ParsedLine:
    """Parse what follows the command's name. Flags may be written with dashes or underscores."""
    options = command.options_by_name()
    entries: list[Entry] = []
    problems: list[str] = []
    positional: str | None = None
    rest = list(argv)
    while rest:
        label, equals, text = (word := rest.pop(0)).partition("=")
        following = next((i for i, word in enumerate(rest) if _is_flag(word)), len(rest))
        name = label[2:].replace("-", "_")
        option = options.get(name)
        if not _is_flag(word):
            if command.positional is None:
                problems.append(f"unexpected '{word}': expected a flag such as --output_dir")
            elif positional is None:
                positional = word
            else:
                problems.append(
                    f"unexpected '{word}': {command.name} takes one {command.positional}, and "
                    f"that is '{positional}'"
                )
            continue
        negated = options.get(name[3:]) if name.startswith("no_") and not equals else None
        if option is None and negated is not None and negated.is_bool:
            entries.append(Entry(negated.name, label, "false", COMMAND_LINE))
            continue
        if equals:
            values = [text]
        else:
            takes_all = option is None or option.is_list
            values = rest[: following if takes_all else min(following, 1)]
            # A flag that may stand alone before the settings file leaves that to be the positional.
            if option is not None and option.const is not None and values:
                is_value = option.is_bool and values[0].lower() in (*BOOLS, *NONE_WORDS)
                path = Path(values[0])
                is_file = path.suffix in (".yaml", ".yml") or path.is_file()
                if command.positional and positional is None and is_file and not is_value:
                    values = []
            del rest[: len(values)]
        written = ALONE if not values else values[0] if len(values) == 1 else values
        entries.append(Entry(name, label, written, COMMAND_LINE))

    found, wrong = convert_entries(entries, lambda entry: find_option(command, entry))
    return ParsedLine({k: value for k, (value, _) in found.items()}, positional, problems + wrong)


def find_option(command: Command, entry: Entry) -> Option:
    """The option of the command that an entry names.

    Raises:
        UserError: it has none of that name; says which commands have, and which name is near.
    """
    options = command.options_by_name()
    if entry.name in options:
        return options[entry.name]
    is_flag = entry.label.startswith("--")
    what, dashes = ("option", "--") if is_flag else ("setting", "")
    names = sorted({option.name for option in options.values()})
    near = did_you_mean(entry.label, [dashes + name for name in names])
    table = all_commands().values()
    owners = [other.name for other in table if entry.name in other.options_by_name()]
    if owners:
        raise UserError(
            f"'{entry.label}' is not a{'n' * is_flag} {what} of {command.name}, but of "
            f"{', '.join(owners)}{near}"
        )
    hint = near or f"; s2s-scale {command.name} --help lists them"
    raise UserError(f"unknown {what} '{entry.label}'{hint}")


def _is_flag(word: str) -> bool:
    """``--name``; ``-`` is a stream and ``-1`` a number. A text ``--x`` needs ``--flag=--x``."""
    return bool(re.match(r"--[^\W\d]", word)) or word in ("-h", "--")
