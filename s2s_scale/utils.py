"""Where tables are printed.

What writing leaves on the disk: who may read a file, and no folder where nothing was written.

Which processes of this machine have a file open.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 120
"""A pipe has no width of its own; the usual 80 columns would fold or cut nearly every cell."""


def table_console() -> Console:
    """Standard output for tables, whose text is shown as it is: brackets are no markup."""
    from rich.console import Console  # most commands print no table

    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(width=width, file=sys.stdout, markup=False)


def as_any_new_file(path: Path, *, folder: Path) -> None:
    """Give ``path`` the mode of a new file, told from ``folder``, which was made by ``mkdir``.

    safetensors writes its files for their owner alone, whatever the umask says.
    """
    os.chmod(path, folder.stat().st_mode & 0o666)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder that holds nothing, as after a run that was refused."""
    with suppress(OSError):
        folder.rmdir()


def processes_holding(files: Sequence[Path], proc: Path = Path("/proc")) -> list[tuple[int, str]]:
    """(pid, name) of every process, this one left out, that has one of ``files`` open.

    Only processes that this user may look into are seen.
    """
    wanted = {str(path) for path in files}
    found = []
    for folder in sorted(proc.glob("[0-9]*"), key=lambda path: int(path.name)):
        if int(folder.name) == os.getpid():
            continue
        try:
            held = {os.readlink(link) for link in (folder / "fd").iterdir()}
            if held & wanted:
                found.append((int(folder.name), (folder / "comm").read_text().strip()))
        except OSError:  # it ended, or is another user's
            continue
    return found
