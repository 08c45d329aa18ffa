"""What writing leaves on the disk: who may read a file, and no folder where nothing was written."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def as_any_new_file(path: Path, *, folder: Path) -> None:
    """Give ``path`` the mode of a new file, told from ``folder``, which was made by ``mkdir``.

    safetensors writes its files for their owner alone, whatever the umask says.
    """
    os.chmod(path, folder.stat().st_mode & 0o666)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder that holds nothing, as after a run that was refused."""
    with suppress(OSError):
        folder.rmdir()
