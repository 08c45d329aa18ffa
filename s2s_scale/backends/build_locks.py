"""A lock on a compiled extension that outlives nobody.

torch holds a lock file while it compiles or loads an extension, and waits without end where there
is one. A process that is killed in between leaves it, and every other would hang.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from pathlib import Path
from typing import Any

from s2s_scale.utils import holders

logger = logging.getLogger(__name__)

OURS = "held by a process that also locks the file beside this one\n"
ABANDONED_SECONDS = 60.0
"""A lock of torch's own that is this old and that no process here has open is nobody's, unless a
machine that shares the folder compiles for that long: then the extension is compiled twice."""
LOOK_SECONDS = 0.5


def use_own_locks() -> None:
    """Make torch lock extensions with ``BuildLock``, in this process."""
    from torch.utils import cpp_extension

    cpp_extension.FileBaton = BuildLock  # type: ignore[attr-defined,assignment]


class BuildLock:
    """In place of ``torch.utils.file_baton.FileBaton``, whose file it makes, so that the two
    exclude each other. Beside it lies one with a POSIX record lock, which the system releases with
    the process. ``try_acquire`` waits and then succeeds: what a killed process has left unfinished
    is built, where torch would load a file that is not there.
    """

    def __init__(self, lock_file_path: str, *_: Any, **__: Any) -> None:
        self.path = Path(lock_file_path)
        self._descriptor: int | None = None

    def try_acquire(self) -> bool:
        """Wait for the lock; always True."""
        beside = self.path.with_name(self.path.name + ".held")
        self._descriptor = os.open(beside, os.O_RDWR | os.O_CREAT, 0o644)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
        while not self._create():
            if abandoned(self.path):
                self.path.unlink(missing_ok=True)
                logger.warning(f"{self.path}: left by a process that was killed; removed")
            else:
                time.sleep(LOOK_SECONDS)
        return True

    def release(self) -> None:
        """Let the next one in."""
        assert self._descriptor is not None
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def _create(self) -> bool:
        try:
            with self.path.open("x", encoding="utf-8") as stream:
                stream.write(OURS)
        except FileExistsError:
            return False
        return True


def abandoned(lock: Path) -> bool:
    """Whether a lock's holder is gone, asked by a process that has the lock beside it."""
    try:
        if lock.read_text(encoding="utf-8") == OURS:
            return True
        age = time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return False
    return age >= ABANDONED_SECONDS and not holders([lock.resolve()])
