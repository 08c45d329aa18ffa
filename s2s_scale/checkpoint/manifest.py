"""The manifest of a checkpoint: its files with their sizes and checksums.

The manifest is written last, so a folder without one is not a complete checkpoint. It is canonical
JSON with a checksum of itself: ``verify`` detects a change of any byte in the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from s2s_scale.errors import UserError


class SaveError(UserError):
    """Saving failed for an external reason, such as a full disk or a read-only folder."""


class DamagedCheckpoint(UserError):
    """The files of a checkpoint do not match its manifest; names the first file that differs."""


MANIFEST = "manifest.json"
FORMAT = "s2s-scale checkpoint"
VERSION = 1
ALGORITHM = "xxh3_128"
KIND = "portable"
"""The only kind that is written."""
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Entry:
    """Size in bytes and checksum (hex) of one file."""

    size: int
    checksum: str


@dataclass(frozen=True)
class Manifest:
    """``files``: POSIX path relative to the folder -> entry."""

    kind: str
    step: int
    files: Mapping[str, Entry] = field(default_factory=dict)


def new_checksum() -> Any:
    """A hash object with ``update(bytes)`` and ``hexdigest()``."""
    return xxhash.xxh3_128()


def checksum_of(path: Path) -> Entry:
    """Size and checksum of a file, read in blocks."""
    digest, size = new_checksum(), 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return Entry(size, digest.hexdigest())


def write_manifest(
    folder: Path, *, step: int, known: Mapping[str, Entry] | None = None
) -> Manifest:
    """Write the manifest of all files in ``folder``.

    ``known``: entries of files whose checksum was computed while they were written. They are not
    read again, so that verification compares what reached the disk with what was meant to.
    """
    files = dict(known or {})
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and path.name != MANIFEST and name not in files:
            files[name] = checksum_of(path)
    manifest = Manifest(KIND, step, files)
    (folder / MANIFEST).write_bytes(_encode(manifest))
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest in ``folder``; the files it lists are not checked.

    Raises:
        DamagedCheckpoint: it is missing, of another program or a newer format, damaged, or names a
            file outside the folder.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DamagedCheckpoint(
            f"{path}: {error.strerror}; every complete checkpoint has a manifest: use an older "
            "checkpoint"
        ) from error
    try:
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("expected a JSON object")
    except ValueError as error:
        raise _unreadable(path, str(error)) from error
    version = content.get("version")
    if content.get("format") != FORMAT or not isinstance(version, int):
        raise DamagedCheckpoint(
            f"{path}: found format {content.get('format')!r}; expected {FORMAT!r}"
        )
    if version > VERSION:
        raise DamagedCheckpoint(
            f"{path}: found format version {version}; expected {VERSION} or older; this "
            "checkpoint was written by a newer s2s-scale: upgrade this installation"
        )
    try:
        files = {
            name: Entry(int(e["bytes"]), str(e[ALGORITHM])) for name, e in content["files"].items()
        }
        manifest = Manifest(str(content["kind"]), int(content["step"]), files)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unreadable(path, f"{type(error).__name__} at {error}") from error
    for name in files:
        _check_inside(folder, name)
    if _encode(manifest) != text:
        raise _unreadable(path, "its own checksum does not match")
    return manifest


def verify(folder: Path) -> Manifest:
    """Check every file of a checkpoint against its manifest; every byte is read.

    Raises:
        DamagedCheckpoint: the first file that differs, with what was expected and what was found.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest.files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            found = checksum_of(path) if size == expected.size else Entry(size, "")
        except OSError as error:
            raise DamagedCheckpoint(
                f"{path}: {error.strerror}; expected a file of {expected.size} bytes; use an older "
                "checkpoint"
            ) from error
        if found.size != expected.size:
            raise DamagedCheckpoint(
                f"{path}: found {found.size} bytes; expected {expected.size}; use an older "
                "checkpoint"
            )
        if found.checksum != expected.checksum:
            raise DamagedCheckpoint(
                f"{path}: found checksum {found.checksum}; expected {expected.checksum} "
                f"({ALGORITHM}); use an older checkpoint"
            )
    return manifest


def _encode(manifest: Manifest) -> bytes:
    files = {
        name: {"bytes": entry.size, ALGORITHM: entry.checksum}
        for name, entry in sorted(manifest.files.items())
    }
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "kind": manifest.kind,
        "step": manifest.step,
        "files": files,
    }
    digest = new_checksum()
    digest.update(_dump(content))
    return _dump({**content, "own checksum": digest.hexdigest()})


def _dump(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def _unreadable(path: Path, why: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"{path}: damaged ({why}); use an older checkpoint")


def _check_inside(folder: Path, name: str) -> None:
    """Reject names that lead out of the checkpoint, directly or through a symbolic link."""
    pure = PurePosixPath(name)
    invalid = pure.is_absolute() or ".." in pure.parts or str(pure) != name or "\\" in name
    if invalid or not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise DamagedCheckpoint(
            f"{folder / MANIFEST}: names the file {name!r}; expected files inside {folder}; do not "
            "use this checkpoint"
        )
