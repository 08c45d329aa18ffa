"""Locks on compiled extensions that a killed process has left behind.

torch holds a lock file while it compiles or loads an extension, and waits without end where there
is one. A process that is killed in between leaves it, and every later run would hang.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from s2s_scale.processes import holders

logger = logging.getLogger(__name__)

ABANDONED_SECONDS = 60.0
"""A lock this old which no process here has open is nobody's, unless a machine that shares the
folder compiles for that long: then the extension is compiled twice."""


def extensions_folder() -> Path:
    """Where torch keeps compiled extensions, one folder for each below those of Python versions."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(chosen) if chosen else Path("~/.cache/torch_extensions").expanduser()


def remove_abandoned_locks(folder: Path) -> list[Path]:
    """Delete the locks below ``folder`` that nobody holds, and say so; returns them."""
    removed = []
    for lock in (*folder.glob("*/lock"), *folder.glob("*/*/lock")):
        try:
            age = time.time() - lock.stat().st_mtime
            if age < ABANDONED_SECONDS or holders([lock.resolve()]):
                continue
            lock.unlink()
        except OSError:  # another rank was faster
            continue
        logger.warning(f"{lock}: left by a process that was killed {age:,.0f} s ago; removed")
        removed.append(lock)
    return removed
