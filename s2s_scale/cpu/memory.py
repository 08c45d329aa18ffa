"""How the process's allocator treats large blocks of memory."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of <malloc.h>
_NEVER = 2**31 - 1
_STEP = 64 * 2**20


def keep_freed_memory() -> bool:
    """Let freed memory be used again instead of going back to the system; whether that worked.

    By default the C library maps each large block anew and returns it at once, so that each use
    costs a page fault for every 4 KiB: a new tensor of 65 MB filled with zeros took 30 ms, and 3
    with this. Memory that was needed once stays with the process. For glibc alone.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    wanted = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, _STEP))
    done = [mallopt(option, value) for option, value in wanted]
    return done == [1] * len(wanted)


def give_freed_memory_back() -> None:
    """Let the system have all that is free in this process, so that its size tells what is used."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
        if trim is not None:
            trim(0)
