"""Folders that all ranks write together: they appear complete or not at all."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from s2s_scale.checkpoint.manager import last_checkpoint_text
from s2s_scale.checkpoint.manifest import SaveError
from s2s_scale.utils import as_any_new_file

_TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "basic_ios", "iostream error")
"""Substrings of the errors of torch's file writer: the first two name its source; the others come
from the C++ stream, and are the only text for small files."""
_PROBE_BYTES = 1 << 20


@dataclass(frozen=True)
class Ranks:
    """What saving needs to know about the other ranks.

    ``gather`` returns the values of all ranks, ordered by rank; every rank must call it.
    """

    main: bool
    gather: Callable[[str | None], list[str | None]]


SINGLE = Ranks(main=True, gather=lambda value: [value])
"""A single process."""


@contextmanager
def atomic_dir(final: Path, ranks: Ranks = SINGLE) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to ``final`` if the block succeeds, else deleted.

    Files are flushed to disk before the rename, so ``final`` is absent, unchanged or complete, but
    never half-written. Every rank must enter; all ranks see the same folder.

    Raises:
        SaveError: writing failed on some rank; names the last good checkpoint next to ``final``.
    """
    partial = final.with_name(f".{final.name}.incomplete")

    def publish() -> None:
        replaced = final.with_name(f".{final.name}.replaced")
        if final.exists():  # kept until the new one is in place
            final.rename(replaced)
        partial.rename(final)
        _flush_path(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    with _staged(final.name, final.parent, partial, publish, ranks):
        yield partial


@contextmanager
def atomic_files(folder: Path, ranks: Ranks = SINGLE) -> Iterator[Path]:
    """Yield a temporary folder whose files move into ``folder`` if the block succeeds.

    For results that share a folder with other files, such as the final model in the output folder.
    Every rank must enter.

    Raises:
        SaveError: as for ``atomic_dir``.
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
    """Rank 0 creates ``partial``, the block fills it, rank 0 publishes it; all or none succeed.

    A failed write on one rank is raised on all of them, so that no rank waits for another.
    """

    def settle(error: BaseException | None) -> None:
        # Finding the reason may probe the disk, so it comes before anything is deleted.
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
            del error  # a reference cycle with its own traceback would keep files open

    def create() -> None:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)

    def finish() -> None:
        for root, _, files in os.walk(partial):
            for name in files:
                as_any_new_file(Path(root) / name, folder=partial)
            for name in (*files, "."):
                _flush_path(Path(root) / name)
        publish()

    settle(failure_of(create) if ranks.main else None)
    failure = None
    try:
        yield
    except BaseException as error:  # noqa: BLE001  (raised by settle, on every rank)
        failure = error
    try:
        settle(failure)
    finally:
        del failure
    settle(failure_of(finish) if ranks.main else None)


def seen_by_all(folder: Path, ranks: Ranks, *, count: int) -> bool:
    """Whether ``folder`` is the same folder on all ``count`` ranks, as on a shared file system.

    Rank 0 creates a file with a unique name, and every rank looks for it. Also False if ``ranks``
    does not connect ``count`` ranks. Every rank must call it.
    """
    name = f".seen-{uuid.uuid4().hex}"
    probe, created = folder / name, False
    if ranks.main:
        with suppress(OSError):
            probe.touch()
            created = True
    name = ranks.gather(name if created else None)[0] or ""
    seen = ranks.gather(name if name and os.path.exists(folder / name) else None)
    if ranks.main:  # it must not become part of the checkpoint
        with suppress(OSError):
            probe.unlink()
    return seen == [name] * count


def failure_of(step: Callable[[], None]) -> BaseException | None:
    """Run ``step`` and return its error, if any, to be raised where all ranks learn of it."""
    try:
        step()
    except BaseException as error:  # noqa: BLE001  (raised by the caller)
        return error
    return None


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Turn a failed write in the block into a ``SaveError``.

    Raises:
        SaveError: as for ``atomic_dir``.
    """
    try:
        yield
    except OSError as error:
        raise _save_error(what, folder, error.strerror or str(error)) from error


def _save_error(what: str, folder: Path, reason: str) -> SaveError:
    return SaveError(
        f"saving {what} in {folder} failed: {reason}; expected a writable folder with enough free "
        f"space; {last_checkpoint_text(folder)}"
    )


def _write_failure(error: BaseException, folder: Path) -> str | None:
    """The operating system's reason if ``error`` is a failed write below ``folder``, else None.

    Libraries wrap the ``OSError`` in types of their own: safetensors in a SafetensorError and
    tokenizers in a bare Exception, both with the errno in the text; torch's file writer in a
    RuntimeError that names the reason only if the file could not be opened.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = str(error)
    number = re.search(r"\(os error (\d+)\)", text)
    if number:
        return os.strerror(int(number.group(1)))
    if isinstance(error, SafetensorError):
        return text
    if not isinstance(error, RuntimeError) or not any(part in text for part in _TORCH_WRITER):
        return None
    opening = re.search(r"strerror: (.+)", text)
    if opening:
        return opening.group(1).strip()
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(_PROBE_BYTES))
            probe.flush()
    except OSError as found:
        return found.strerror or str(found)
    return "torch could not write its file; check the free space and the limit on file sizes"


def _flush_path(path: Path) -> None:
    """fsync one file or folder; for a folder this makes renames inside it durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
