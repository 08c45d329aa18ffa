"""Folders that all ranks write together, complete or not at all, by one run at a time.

The lock of an output folder is released by the operating system when its process ends, however it
ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from s2s_scale.checkpoint.manager import last_checkpoint_text
from s2s_scale.checkpoint.manifest import SaveError
from s2s_scale.errors import UserError
from s2s_scale.utils import as_any_new_file

_TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "basic_ios", "iostream error")
"""Parts of the messages of torch's file writer: the first two name its source, the others are
what the C++ library says once a stream has failed, which comes alone for small files."""
_PROBE_BYTES = 1 << 20


@dataclass(frozen=True)
class Ranks:
    """What saving needs to know of the other ranks.

    ``gather`` gives every rank's value in the order of ranks; every rank must call it.
    """

    main: bool
    gather: Callable[[str | None], list[str | None]]


SINGLE = Ranks(main=True, gather=lambda value: [value])
"""The only process there is."""


@contextmanager
def atomic_dir(final: Path, ranks: Ranks = SINGLE) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``final`` when the block ends well, else vanishes.

    Files are flushed to disk before the rename, so ``final`` is either absent, its earlier self,
    or complete; never half-written. Every rank must enter, and all of them see the same folder.

    Raises:
        SaveError: writing failed on some rank; names the last good checkpoint beside ``final``.
    """
    partial = final.with_name(f".{final.name}.incomplete")

    def publish() -> None:
        replaced = final.with_name(f".{final.name}.replaced")
        if final.exists():  # never gone before the new one is there
            final.rename(replaced)
        partial.rename(final)
        _flush_path(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    with _staged(final.name, final.parent, partial, publish, ranks):
        yield partial


@contextmanager
def whole_files(folder: Path, ranks: Ranks = SINGLE) -> Iterator[Path]:
    """Yield a temporary folder whose files move into ``folder`` when the block ends well.

    For results that stand beside other files, such as the final model in the output folder.
    Every rank must enter.

    Raises:
        SaveError: as ``atomic_dir``.
    """
    partial = folder / ".final.incomplete"

    def publish() -> None:
        for path in sorted(partial.iterdir()):
            path.replace(folder / path.name)
        partial.rmdir()

    with _staged("the model", folder, partial, publish, ranks):
        yield partial


@contextmanager
def _staged(
    what: str, folder: Path, partial: Path, publish: Callable[[], None], ranks: Ranks
) -> Iterator[None]:
    """Rank 0 makes ``partial``, the block fills it, rank 0 publishes it; all or none succeed.

    A failed write on one rank is raised on every rank, so that none waits for another.
    """

    def settle(error: BaseException | None) -> None:
        # The reason is looked for on the disk as it is, so before anything is deleted.
        reason = None if error is None else _write_failure(error, partial)
        unexpected = error is not None and reason is None
        first = None if unexpected else next((r for r in ranks.gather(reason) if r), None)
        if ranks.main and (unexpected or first):
            shutil.rmtree(partial, ignore_errors=True)
        try:
            if error is not None and unexpected:
                raise error
            if first is not None:
                raise _save_error(what, folder, first) from error
        finally:
            del error  # an exception in a frame of its own traceback would keep files open

    def make() -> None:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)

    def finish() -> None:
        _flush(partial)
        publish()

    settle(failure_of(make) if ranks.main else None)
    failure = None
    try:
        yield
    except BaseException as error:  # noqa: BLE001  (settle raises it again, on every rank)
        failure = error
    try:
        settle(failure)
    finally:
        del failure
    settle(failure_of(finish) if ranks.main else None)


def seen_by_all(folder: Path, ranks: Ranks, *, count: int) -> bool:
    """Whether all ``count`` ranks see the ``folder`` of rank 0, not another one of its name.

    Rank 0 leaves a file of a name that never was before, and each looks for it. False as well where
    ranks cannot tell each other. Every rank must call it.
    """
    name = f".seen-{uuid.uuid4().hex}"
    probe, made = folder / name, False
    if ranks.main:
        with suppress(OSError):
            probe.touch()
            made = True
    name = ranks.gather(name if made else None)[0] or ""
    seen = ranks.gather(name if name and os.path.exists(folder / name) else None)
    if ranks.main:  # it would become part of the checkpoint
        with suppress(OSError):
            probe.unlink()
    return seen == [name] * count


def failure_of(step: Callable[[], None]) -> BaseException | None:
    """The error of ``step``, or None; for errors that are raised later, where all ranks hear."""
    try:
        step()
    except BaseException as error:  # noqa: BLE001  (handed to settle, which raises it again)
        return error
    return None


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Report a failed write in the block as one ``SaveError``; for files that need no rename.

    Raises:
        SaveError: as ``atomic_dir``.
    """
    try:
        yield
    except OSError as error:
        raise _save_error(what, folder, error.strerror or str(error)) from error


def _save_error(what: str, folder: Path, reason: str) -> SaveError:
    return SaveError(
        f"saving {what} in {folder} failed: {reason}; expected a folder that can be written to, "
        f"with enough free space; {last_checkpoint_text(folder)}"
    )


def _write_failure(error: BaseException, folder: Path) -> str | None:
    """The system's reason if ``error`` is a failed write below ``folder``, else None.

    Libraries wrap the system's error in types of their own: safetensors in a SafetensorError and
    tokenizers in a bare Exception, both with its number in the text; torch in a RuntimeError of
    its file writer, which names the reason only if the file could not be opened.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = str(error)
    number = re.search(r"\(os error (\d+)\)", text)
    if number:
        return os.strerror(int(number.group(1)))
    if isinstance(error, SafetensorError):
        return text
    if isinstance(error, RuntimeError) and any(sign in text for sign in _TORCH_WRITER):
        opening = re.search(r"strerror: (.+)", text)
        return opening.group(1).strip() if opening else _reason_now(folder)
    return None


def _reason_now(folder: Path) -> str:
    """Why ``folder`` cannot be written to, found by trying; torch's writer does not tell."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(_PROBE_BYTES))
            probe.flush()
    except OSError as error:
        return error.strerror or str(error)
    return "torch could not write its file (is there room for it, and no limit on file sizes?)"


def _flush(folder: Path) -> None:
    """fsync every file below ``folder``, with the mode of any new file, and the folders."""
    for root, _, files in os.walk(folder):
        for name in files:
            as_any_new_file(Path(root) / name, folder=folder)
        for name in (*files, "."):
            _flush_path(Path(root) / name)


def _flush_path(path: Path) -> None:
    """fsync one file or folder; for a folder this makes renames inside it last."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
