"""The table of ``s2s-scale profiles``."""

from __future__ import annotations

import sys

from rich.table import Table

from s2s_scale.errors import UserError
from s2s_scale.profiles import available, resolve
from s2s_scale.utils import table_console


def print_table() -> int:
    """Print every profile that is found and whether it is usable here. Returns the exit code.

    A profile with a mistake has its row too; the mistakes follow on stderr, and the code is 2.
    """
    table = Table(title="Launcher profiles", title_justify="left")
    for heading in ("name", "backend", "launcher", "device", "what for", "usable here"):
        table.add_column(heading, overflow="fold")
    mistakes: list[str] = []
    for name, path in available().items():
        try:
            profile = resolve(str(path))
        except UserError as error:
            mistakes += error.problems
            table.add_row(name, "-", "-", "-", "-", "no: the file has mistakes, see below")
            continue
        reasons = [problem.partition(": ")[2] for problem in profile.unusable()]
        table.add_row(
            name,
            profile.backend,
            profile.launcher,
            profile.device,
            profile.description,
            f"no: {'; '.join(reasons)}" if reasons else "yes",
        )
    table_console().print(table)
    for mistake in mistakes:
        print(f"error: {mistake}", file=sys.stderr)
    return 2 if mistakes else 0
