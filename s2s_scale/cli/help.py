"""Help texts of the command line: plain text, grouped by subject and aligned."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable

from s2s_scale.settings.commands import CHECKPOINT_ACTIONS, Verb, verbs
from s2s_scale.settings.options import Option

# Groups that come first, in this order; others follow as they occur in transformers' source.
FIRST_GROUPS = (
    "files",
    "model",
    "data",
    "output",
    "launch",
    "training",
    "batching",
    "loss",
    "learning rate",
    "optimizer",
    "generation",
    "what runs",
    "evaluation",
)
TYPE_NAMES = {
    "int": "N",
    "float": "X",
    "str": "TEXT",
    "dict": "JSON",
}
LEFT = 34
# Alternatives longer than this are listed in the text and not in the left column.
LONGEST_CHOICES = 24


def overview() -> str:
    """``s2s-scale --help``: one line per verb, and examples."""
    table = verbs().values()
    lines = [
        "s2s-scale: train and run encoder-decoder models, on one CPU or many devices",
        "",
        "usage: s2s-scale VERB [FILE.yaml] [--flag value …]",
        "",
        *(f"  {verb.name:<11} {verb.summary}" for verb in table),
        "",
        "  s2s-scale VERB --help   the flags of a verb",
        "  s2s-scale --version     versions of the package and what it builds on",
        "",
        "examples",
        "  s2s-scale demo",
        "  s2s-scale new-model --architecture t5 --data_dir data --output_dir models/new",
        "  s2s-scale train --model models/new --data_dir data --output_dir runs/first",
        "  s2s-scale generate --model runs/first < source.txt > target.txt",
    ]
    return "\n".join(lines) + "\n"


def verb_help(verb: Verb, *, width: int | None = None) -> str:
    """The help of one verb, ``width`` columns wide (the terminal's, at most 100)."""
    columns = width or min(shutil.get_terminal_size().columns, 100)
    options = verb.options()
    shown = {
        "FILE": " [FILE.yaml]",
        "NAME": " [NAME]",
        "FOLDER": f" {{{','.join(CHECKPOINT_ACTIONS)}}} FOLDER",
    }
    positional = shown.get(verb.positional or "", "")
    required = "".join(f" --{entry.name} {_metavar(entry)}" for entry in options if entry.required)
    flags = " [--flag value …]" if options else ""
    lines = textwrap.wrap(
        f"usage: s2s-scale {verb.name}{positional}{required}{flags}",
        columns,
        subsequent_indent="       ",
    )
    lines += ["", *textwrap.wrap(verb.description, columns)]
    if verb.positional == "FILE":
        profile = "the profile, the profile over " * any(e.name == "profile" for e in options)
        note = (
            "FILE.yaml holds any of these settings as 'name: value' lines. Flags win over the "
            f"file, the file over {profile}defaults."
        )
        lines += textwrap.wrap(note, columns)
    for group, members in _grouped(options).items():
        lines += ["", group]
        for entry in members:
            lines += _option_lines(entry, columns)
    lines += ["", "examples", *(f"  {example}" for example in verb.examples)]
    return "\n".join(lines) + "\n"


def _grouped(options: Iterable[Option]) -> dict[str, list[Option]]:
    groups: dict[str, list[Option]] = {group: [] for group in FIRST_GROUPS}
    for entry in options:
        groups.setdefault(entry.group, []).append(entry)
    return {group: members for group, members in groups.items() if members}


def _option_lines(entry: Option, columns: int) -> list[str]:
    """``  --flag VALUE      text, wrapped in its own column [default]``."""
    flags = ", ".join(f"--{name}" for name in (entry.name, *entry.aliases))
    left = f"  {flags} {_metavar(entry)}".rstrip()
    text = " ".join(part for part in (entry.help, _choices(entry), _default(entry)) if part)
    wrapped = textwrap.wrap(text, columns - LEFT, break_on_hyphens=False) or [""]
    if len(left) < LEFT - 1:
        first, rest = f"{left:<{LEFT}}{wrapped[0]}", wrapped[1:]
        return [first, *(" " * LEFT + line for line in rest)]
    return [left, *(" " * LEFT + line for line in wrapped)]


def _short_choices(entry: Option) -> str:
    choices = "|".join(entry.choices or ())
    return choices if len(choices) <= LONGEST_CHOICES and not entry.is_list else ""


def _metavar(entry: Option) -> str:
    """What stands after the flag: nothing for a flag that is complete alone."""
    if entry.type == "bool":
        return ""
    if entry.choices and _short_choices(entry):
        return _short_choices(entry)
    kinds = [kind for kind in entry.kinds if kind != "bool" and not kind.startswith("list[")]
    if "dict" in kinds:
        kinds = ["dict"]
    name = TYPE_NAMES[kinds[0] if kinds else entry.item_kind]
    name = f"{name} …" if entry.is_list else name
    return f"[{name}]" if entry.bare is not None else name


def _choices(entry: Option) -> str:
    if not entry.choices or _short_choices(entry):
        return ""
    return f"One of: {', '.join(entry.choices)}."


def _default(entry: Option) -> str:
    """``[5e-05]``, or nothing where the default is none, off or empty."""
    if entry.required:
        return "(required)"
    if entry.default is None or entry.default is False or entry.default in ("", []):
        return ""
    if entry.default is True:
        return f"[on; --no_{entry.name} turns it off]"
    shown = " ".join(entry.default) if isinstance(entry.default, list) else entry.default
    return f"[{shown}]"
