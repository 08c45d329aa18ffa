"""Who may read what is written: whoever may read any other new file of this user."""

from __future__ import annotations

import os
from pathlib import Path


def as_any_new_file(path: Path, *, folder: Path) -> None:
    """Give ``path`` the mode of a new file, told from ``folder``, which was made by ``mkdir``.

    safetensors writes its files for their owner alone, whatever the umask says.
    """
    os.chmod(path, folder.stat().st_mode & 0o666)
