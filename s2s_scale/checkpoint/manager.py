"""The output folder of a run: its checkpoints, what an earlier run left there, and its lock."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from s2s_scale.checkpoint.manifest import MANIFEST, DamagedCheckpoint, verify
from s2s_scale.errors import UserError

CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
STATE_FILE = "trainer_state.json"
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
RUN_FILES = (
    STATE_FILE,
    "all_results.json",
    "train_results.json",
    "val_results.json",
    "test_results.json",
    "val_generations.txt",
    "test_generations.txt",
    "report.html",
    "report.png",
)
"""Files that training writes to its output folder besides checkpoints and the final model."""
TRAINING_STATE = "training_state.json"
"""In every checkpoint of this package, and in none that transformers' own trainer wrote."""
LOCK = ".s2s-scale.lock"

Note = Callable[[str], None]


def checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints in ``output_dir``, ordered by step.

    A folder counts if it contains both the trainer's state and weights. Half-written ones never
    get their final name (see ``atomic_dir``), so this only guards against external damage.
    """
    found = []
    if output_dir.is_dir():
        for folder in output_dir.iterdir():
            match = CHECKPOINT_NAME.fullmatch(folder.name)
            if match and (folder / STATE_FILE).is_file() and _has_weights(folder):
                found.append((int(match.group(1)), folder))
    return [folder for _, folder in sorted(found)]


def is_ours(folder: Path) -> bool:
    """Whether this package wrote the checkpoint, which then has a manifest if it is complete."""
    return any((folder / name).exists() for name in (TRAINING_STATE, MANIFEST))


def check_intact(folder: Path) -> None:
    """Verify a checkpoint of this package; transformers' own have no manifest to compare with.

    Raises:
        DamagedCheckpoint: a file does not match the manifest.
    """
    if is_ours(folder):
        verify(folder)


def newest_verified(
    output_dir: Path,
    note: Note = lambda text: None,
    *,
    among: Callable[[Path], bool] = lambda folder: True,
) -> Path | None:
    """The newest checkpoint whose files match its manifest, or None. Every byte is read.

    Args:
        note: called with a message for each newer checkpoint that is skipped.
        among: which checkpoints are considered.
    """
    for folder in filter(among, reversed(checkpoints(output_dir))):
        try:
            check_intact(folder)
            return folder
        except DamagedCheckpoint as error:
            note(f"{folder.name} is skipped: {error}")
    return None


def last_checkpoint_text(output_dir: Path) -> str:
    """How to continue from the newest checkpoint, as the end of an error message."""
    saved = newest_verified(output_dir)
    if saved is None:
        return "no checkpoint had been saved"
    return (
        f"the last good checkpoint is {saved}; "
        "fix the cause, then continue with --resume_from_checkpoint latest"
    )


def resolve_resume(
    value: str | None, output_dir: Path, note: Note = lambda text: None
) -> Path | None:
    """The folder that ``--resume_from_checkpoint`` selects, or None to start from the beginning.

    Args:
        value: a checkpoint folder; ``latest``, for the newest checkpoint that passes verification;
            ``auto``, for the same but None if there is no checkpoint at all; or None.
        note: called with a message for each damaged checkpoint that ``latest`` skips.

    Raises:
        UserError: the folder does not exist, is not a checkpoint, or is damaged.
    """
    if value is None or value.lower() == "false":
        return None
    if value.lower() == "auto" and not checkpoints(output_dir):
        return None
    if value.lower() in ("latest", "true", "auto"):
        skipped: list[str] = []
        saved = newest_verified(output_dir, skipped.append)
        if saved is None:
            found = "; ".join(skipped) if skipped else "no checkpoint found"
            raise UserError(
                f"resume_from_checkpoint={value}: {found} in {output_dir}; omit the flag to start "
                "from the beginning, or give a checkpoint folder"
            )
        for text in skipped:
            note(text)
        return saved
    folder = Path(value)
    missing = [
        what
        for what, exists in (
            ("the folder itself", folder.is_dir()),
            (STATE_FILE, (folder / STATE_FILE).is_file()),
            ("weights (model.safetensors)", _has_weights(folder)),
        )
        if not exists
    ]
    if missing:
        raise UserError(
            f"resume_from_checkpoint={value}: not a checkpoint, missing: {', '.join(missing)}; "
            "give a checkpoint-N folder of an earlier run, or 'latest'"
        )
    check_intact(folder)
    return folder


def rotate(output_dir: Path, *, limit: int | None, best: str | None) -> list[Path]:
    """Delete the oldest checkpoints until ``limit`` remain (None: keep all); returns those deleted.

    The best one is kept, and so is the newest that passes verification: otherwise a newer, damaged
    one could outlive the last from which the run can be resumed.
    """
    saved = checkpoints(output_dir)
    if not limit or limit <= 0 or len(saved) <= limit:
        return []
    kept = {newest_verified(output_dir), saved[-1]}
    if best is not None:
        kept |= {folder for folder in saved if folder.resolve() == Path(best).resolve()}
    old = [folder for folder in saved if folder not in kept]
    removed = old[: len(saved) - max(limit, len(kept - {None}))]
    for folder in removed:
        shutil.rmtree(folder, ignore_errors=True)
    return removed


def remove_partial(output_dir: Path) -> None:
    """Clean up after a run that was killed while saving. The caller must hold the lock."""
    for replaced in output_dir.glob(".checkpoint-*.replaced"):
        final = replaced.with_name(replaced.name.removeprefix(".").removesuffix(".replaced"))
        if not final.exists():  # killed between the two renames
            replaced.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
    for partial in output_dir.glob(".checkpoint-*.incomplete"):
        shutil.rmtree(partial, ignore_errors=True)


def earlier_run(output_dir: Path) -> list[str]:
    """Names of the files and folders that an earlier training run left in ``output_dir``."""
    if not output_dir.is_dir():
        return []
    names = [name for name in RUN_FILES if (output_dir / name).exists()]
    names += [name for name in WEIGHT_FILES if (output_dir / name).exists()]
    return [folder.name for folder in checkpoints(output_dir)] + names


def refuse_earlier_run(output_dir: Path) -> None:
    """Refuse to train into a folder that contains an earlier run.

    Raises:
        UserError: it does; names the flags that continue or replace that run.
    """
    left = earlier_run(output_dir)
    if left:
        shown = ", ".join(left[:4]) + (", …" if len(left) > 4 else "")
        raise UserError(
            f"output_dir={output_dir}: holds an earlier run ({shown}); continue it with "
            "--resume_from_checkpoint latest, start afresh with --overwrite_output_dir, "
            "or give another folder"
        )


def remove_earlier_run(output_dir: Path) -> None:
    """Delete an earlier run's checkpoints and result files, and nothing else in the folder.

    If two runs were mixed, ``latest`` could select a checkpoint of the wrong one.
    """
    for name in earlier_run(output_dir):
        path = output_dir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def check_writable(output_dir: Path) -> None:
    """Create ``output_dir`` and one small file in it, so that an unusable folder is found early.

    Raises:
        UserError: the folder cannot be created or written to, with the system's reason.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"output_dir={output_dir}: is a file; give a folder")
    probe = output_dir / f".write-test-{os.getpid()}"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"output_dir={output_dir}: cannot be written to ({error.strerror}); give a writable "
            "folder on a disk with free space"
        ) from error


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in WEIGHT_FILES)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of an output folder, so that one run at a time writes to it; for rank 0.

    It is a POSIX record lock: NFS enforces it across hosts, and the operating system releases it
    when the process ends, however it ends. On a file system without locks this does nothing.

    Raises:
        UserError: another process holds the lock; names its host and process id.
    """
    path = folder / LOCK
    descriptor = _acquire(path)
    holder = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    try:
        with suppress(OSError):  # on a full disk the lock is held without naming its holder
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _acquire(path: Path) -> int:
    """A descriptor that holds the lock of the file currently at ``path``."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return descriptor  # a file system without locks
            try:
                holder = json.loads(path.read_text(encoding="utf-8"))
                who = f"process {holder['pid']} on host {holder['host']}, since {holder['started']}"
            except (OSError, ValueError, KeyError, TypeError):
                who = "an unknown process"
            os.close(descriptor)
            raise UserError(
                f"output_dir={path.parent}: another run writes to it ({who}); wait for that run to "
                "end, stop it, or give another folder"
            ) from error
        # The previous holder may have removed the file after this process opened it.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)
