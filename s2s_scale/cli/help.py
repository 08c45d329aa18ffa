"""Help texts of the command line: plain text, grouped by subject and aligned."""

from __future__ import annotations

import shutil
import textwrap

from s2s_scale.settings.commands import CHECKPOINT_ACTIONS, Command, all_commands
from s2s_scale.settings.options import Option

# Groups that come first, in this order; others follow in the order of transformers' fields.
FIRST_GROUPS = (
    *("files", "model", "data", "output", "launch", "training", "batching", "loss"),
    *("learning rate", "optimizer", "generation", "what runs", "evaluation"),
)
TYPE_NAMES = {"int": "N", "float": "X", "str": "TEXT", "dict": "JSON"}
POSITIONALS = {
    "FILE": " [FILE.yaml]",
    "NAME": " [NAME]",
    "FOLDER": f" {{{','.join(CHECKPOINT_ACTIONS)}}} FOLDER",
    None: "",
}
LEFT = 34
# Alternatives longer than this are listed in the text and not in the left column.
LONGEST_CHOICES = 24


def overview() -> str:
    """``s2s-scale --help``: one line per command, and examples."""
    lines = [
        "s2s-scale: train and run encoder-decoder models, on one CPU or many devices",
        "",
        "usage: s2s-scale COMMAND [FILE.yaml] [--flag value …]",
        "",
        *(f"  {command.name:<11} {command.summary}" for command in all_commands().values()),
        "",
        "  s2s-scale COMMAND --help   the flags of a command",
        "  s2s-scale --version        versions of the package and what it builds on",
        "",
        "examples",
        "  s2s-scale demo",
        "  s2s-scale new-model --architecture t5 --data_dir data --output_dir models/new",
        "  s2s-scale train --model models/new --data_dir data --output_dir runs/first",
        "  s2s-scale generate --model runs/first < source.txt > target.txt",
    ]
    return "\n".join(lines) + "\n"


def command_help(command: Command, *, width: int | None = None) -> str:
    """The help of one command, ``width`` columns wide (the terminal's, at most 100)."""
    columns = width or min(shutil.get_terminal_size().columns, 100)
    options = command.options()
    required = "".join(f" --{entry.name} {_metavar(entry)}" for entry in options if entry.required)
    flags = " [--flag value …]" if options else ""
    lines = textwrap.wrap(
        f"usage: s2s-scale {command.name}{POSITIONALS[command.positional]}{required}{flags}",
        columns,
        subsequent_indent="       ",
    )
    lines += ["", *textwrap.wrap(command.description, columns)]
    if command.positional == "FILE":
        profile = "the profile, the profile over " if command.launched else ""
        note = (
            "FILE.yaml holds any of these settings as 'name: value' lines. Flags win over the "
            f"file, the file over {profile}defaults."
        )
        lines += textwrap.wrap(note, columns)
    groups: dict[str, list[Option]] = {group: [] for group in FIRST_GROUPS}
    for entry in options:
        groups.setdefault(entry.group, []).append(entry)
    for group, members in groups.items():
        if members:
            lines += ["", group, *(line for entry in members for line in _lines(entry, columns))]
    lines += ["", "examples", *(f"  {example}" for example in command.examples)]
    return "\n".join(lines) + "\n"


def _lines(entry: Option, columns: int) -> list[str]:
    """``  --flag VALUE      text, wrapped in its own column [default]``."""
    flags = ", ".join(f"--{name}" for name in (entry.name, *entry.aliases))
    metavar = _metavar(entry)
    left = f"  {flags} {metavar}".rstrip()
    text = [entry.help]
    if entry.choices and "|".join(entry.choices) != metavar:
        text.append(f"One of: {', '.join(entry.choices)}.")
    if entry.required:
        text.append("(required)")
    elif entry.default is True:
        text.append(f"[on; --no_{entry.name} turns it off]")
    elif entry.default is not None and entry.default is not False and entry.default not in ("", []):
        is_list = isinstance(entry.default, list)
        text.append(f"[{' '.join(entry.default) if is_list else entry.default}]")
    wrapped = textwrap.wrap(" ".join(text), columns - LEFT, break_on_hyphens=False) or [""]
    if len(left) < LEFT - 1:
        left = f"{left:<{LEFT}}{wrapped.pop(0)}"
    return [left, *(" " * LEFT + line for line in wrapped)]


def _metavar(entry: Option) -> str:
    """What stands after the flag: nothing for a flag that is complete alone."""
    if entry.type == "bool":
        return ""
    choices = "|".join(entry.choices or ())
    if choices and len(choices) <= LONGEST_CHOICES and not entry.is_list:
        return choices
    kinds = [kind for kind in entry.kinds if kind != "bool" and not kind.startswith("list[")]
    kind = "dict" if "dict" in kinds else kinds[0] if kinds else entry.item_kind
    name = TYPE_NAMES[kind] + " …" * entry.is_list
    return f"[{name}]" if entry.const is not None else name
