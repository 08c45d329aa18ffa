"""One run per output folder: a lock that the system releases when its process ends, however."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from s2s_scale.errors import UserError

LOCK = ".s2s-scale.lock"
_HELD = (errno.EACCES, errno.EAGAIN)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of an output folder; for rank 0.

    It is a POSIX record lock, which NFS passes on to other hosts. Where a file system has no locks,
    none is held.

    Raises:
        UserError: another process holds it; names its host and process id.
    """
    path = folder / LOCK
    descriptor = _acquire(path)
    try:
        with contextlib.suppress(OSError):  # a full disk keeps the lock, without a name in it
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, _own_text(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _acquire(path: Path) -> int:
    """A descriptor that holds the lock of the file that has this name."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                text = _held_by(path)
                os.close(descriptor)
                raise UserError(text) from error
            return descriptor  # a file system without locks
        # The holder before may have removed the name while this process opened the file.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)


def _own_text() -> bytes:
    started = time.strftime("%Y-%m-%d %H:%M:%S %z")
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": started}
    return json.dumps(holder).encode()


def _held_by(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        who = f"process {holder['pid']} on host {holder['host']}, since {holder['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "a process that has not told its name"
    return (
        f"output_dir={path.parent}: another run writes to it ({who}); wait for it, end it, or give "
        "another folder"
    )
