"""What every folder uses: atomic files, installed versions, a free port, tables, a label's pad."""

from __future__ import annotations

import os
import socket
import sys
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

IGNORE_INDEX = -100
"""Label of a position that counts in no loss, as in torch's ``cross_entropy``."""
PIPE_WIDTH = 120
"""A pipe has no width of its own; the usual 80 columns would fold or cut nearly every cell."""


@contextmanager
def atomic_file(path: Path, *, binary: bool = False) -> Iterator[IO[Any]]:
    """Open a new file that takes the place of ``path`` when the block ends without an error.

    Readers see the file of before or the whole new one, never a part; after an error nothing has
    changed. Folders above ``path`` are made. Text is UTF-8.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.incomplete")
    try:
        with partial.open("wb") if binary else partial.open("w", encoding="utf-8") as stream:
            yield stream
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write ``content`` as the whole of the file ``path``; see ``atomic_file``."""
    with atomic_file(path, binary=isinstance(content, bytes)) as stream:
        stream.write(content)


def as_any_new_file(path: Path, *, folder: Path) -> None:
    """Give ``path`` the mode of a new file, told from ``folder``, which was made by ``mkdir``.

    safetensors writes its files for their owner alone, whatever the umask says.
    """
    os.chmod(path, folder.stat().st_mode & 0o666)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder that holds nothing, as after a run that was refused."""
    with suppress(OSError):
        folder.rmdir()


def package_version(name: str) -> str | None:
    """Version of an installed distribution; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Distribution -> its version, or ``not installed``."""
    return {name: package_version(name) or "not installed" for name in names}


def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def table_console() -> Console:
    """Standard output for tables, whose text is shown as it is: brackets are no markup."""
    from rich.console import Console  # most commands print no table

    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(width=width, file=sys.stdout, markup=False)


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
