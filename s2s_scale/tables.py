"""Where tables are printed."""

from __future__ import annotations

import sys

from rich.console import Console

PIPE_WIDTH = 120
"""A pipe has no width of its own; the usual 80 columns would fold or cut nearly every cell."""


def table_console() -> Console:
    """Standard output for tables, whose text is shown as it is: brackets are no markup."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(width=width, file=sys.stdout, markup=False)
