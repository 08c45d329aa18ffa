"""Which processes of this machine have a file open."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def holders(files: Sequence[Path], proc: Path = Path("/proc")) -> list[tuple[int, str]]:
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
