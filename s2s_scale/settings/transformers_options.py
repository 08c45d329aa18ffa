"""Writes the table of transformers' training settings, for ``settings.options``.

``python -m s2s_scale.settings.transformers_options`` prints the table of the installed version;
with ``--write`` it goes to ``transformers-VERSION.json`` beside this file. A test compares it with
the installed version.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import typing
from pathlib import Path
from typing import Any

from s2s_scale.settings.options import describe_field
from s2s_scale.utils import atomic_write

PYTHON_ONLY = ("parallelism_config",)
"""Settings whose values are Python objects and have no written form."""


def read_fields() -> list[dict[str, Any]]:
    """Name, type, default, choices, optional, const and help of every setting, in field order."""
    from transformers import Seq2SeqTrainingArguments

    hints = typing.get_type_hints(Seq2SeqTrainingArguments)
    return [
        {
            **describe_field(entry, hints[entry.name]),
            # argparse's own escape of the percent sign
            "help": " ".join(str(entry.metadata.get("help", "")).replace("%%", "%").split()),
        }
        for entry in dataclasses.fields(Seq2SeqTrainingArguments)
        if entry.name not in PYTHON_ONLY
    ]


def main(argv: list[str]) -> None:
    text = "[\n" + ",\n".join(json.dumps(entry) for entry in read_fields()) + "\n]\n"
    if argv == ["--write"]:
        from transformers import __version__

        atomic_write(Path(__file__).with_name(f"transformers-{__version__}.json"), text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main(sys.argv[1:])
