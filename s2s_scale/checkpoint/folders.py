"""Checkpoint folders: found, verified, counted, and protected from a second run."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from s2s_scale.checkpoint.errors import DamagedCheckpoint
from s2s_scale.checkpoint.manifest import MANIFEST, verify
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
"""Files that training leaves in its output folder beside the checkpoints and the final model."""
TRAINING_STATE = "training_state.json"
"""In every checkpoint of ours, and in none of transformers' own."""

Note = Callable[[str], None]


def checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints in ``output_dir``, oldest step first.

    A folder counts when it holds both the trainer's state and weights; half-written ones never
    get their final name (see ``whole_folder``), so this only guards against damage from outside.
    """
    found = []
    if output_dir.is_dir():
        for folder in output_dir.iterdir():
            match = CHECKPOINT_NAME.fullmatch(folder.name)
            if match and (folder / STATE_FILE).is_file() and _has_weights(folder):
                found.append((int(match.group(1)), folder))
    return [folder for _, folder in sorted(found)]


def is_ours(folder: Path) -> bool:
    """Whether a checkpoint was written by this package, and so has a manifest if it is whole."""
    return any((folder / name).exists() for name in (TRAINING_STATE, MANIFEST))


def check_whole(folder: Path) -> None:
    """Verify a checkpoint of ours; transformers' own have nothing to be compared with.

    Raises:
        DamagedCheckpoint: a file is not what the manifest says.
    """
    if is_ours(folder):
        verify(folder)


def newest_verified(
    output_dir: Path,
    note: Note = lambda text: None,
    *,
    among: Callable[[Path], bool] = lambda folder: True,
) -> Path | None:
    """The newest checkpoint whose files are what its manifest says; None if there is none.

    ``note`` is told of each newer one that is skipped, with the reason. Every byte is read.
    ``among`` says which are looked at.
    """
    for folder in filter(among, reversed(checkpoints(output_dir))):
        try:
            check_whole(folder)
            return folder
        except DamagedCheckpoint as error:
            note(f"{folder.name} is skipped: {error}")
    return None


def last_checkpoint_text(output_dir: Path) -> str:
    """How to go on from the newest checkpoint, as the end of an error message."""
    saved = newest_verified(output_dir)
    if saved is None:
        return "no checkpoint had been saved"
    return (
        f"the last good checkpoint is {saved}; "
        "mend the cause, then go on with --resume_from_checkpoint latest"
    )


def resolve_resume(
    value: str | None, output_dir: Path, note: Note = lambda text: None
) -> Path | None:
    """The folder that ``--resume_from_checkpoint`` means: ``latest``, ``auto``, a path, or nothing.

    ``latest`` is the newest one that can be verified; ``note`` is told of those skipped. ``auto``
    is the same, and nothing where there is no checkpoint at all.

    Raises:
        UserError: no such folder, it is no checkpoint, or it is damaged.
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
                f"resume_from_checkpoint={value}: {found} in {output_dir}; leave the "
                "flag out to start from the beginning, or name a checkpoint folder"
            )
        for text in skipped:
            note(text)
        return saved
    folder = Path(value)
    missing = [
        what
        for what, there in (
            ("the folder itself", folder.is_dir()),
            (STATE_FILE, (folder / STATE_FILE).is_file()),
            ("weights (model.safetensors)", _has_weights(folder)),
        )
        if not there
    ]
    if missing:
        raise UserError(
            f"resume_from_checkpoint={value}: not a checkpoint, missing: {', '.join(missing)}; "
            "give a checkpoint-N folder of an earlier run, or 'latest'"
        )
    check_whole(folder)
    return folder


def rotate(output_dir: Path, *, limit: int | None, best: str | None) -> list[Path]:
    """Delete the oldest checkpoints until ``limit`` are left (None: all stay); those deleted.

    The best one stays, and so does the newest that can be verified: a newer, damaged one would
    otherwise outlive the last one that a run can go on from.
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


def tidy(output_dir: Path) -> None:
    """Remove what a run left that was killed while it saved; for the holder of the lock."""
    for replaced in output_dir.glob(".checkpoint-*.replaced"):
        final = replaced.with_name(replaced.name.removeprefix(".").removesuffix(".replaced"))
        if not final.exists():  # killed between its two renames
            replaced.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
    for partial in output_dir.glob(".checkpoint-*.incomplete"):
        shutil.rmtree(partial, ignore_errors=True)


def earlier_run(output_dir: Path) -> list[str]:
    """Names of what an earlier training run left in ``output_dir``; empty if there was none."""
    if not output_dir.is_dir():
        return []
    names = [name for name in RUN_FILES if (output_dir / name).exists()]
    names += [name for name in WEIGHT_FILES if (output_dir / name).exists()]
    return [folder.name for folder in checkpoints(output_dir)] + names


def refuse_earlier_run(output_dir: Path) -> None:
    """Refuse to train into a folder that holds a run.

    Raises:
        UserError: the folder holds a run; names the flags that continue or replace it.
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
    """Delete an earlier run's checkpoints and result files; nothing else in the folder.

    A mix of two runs would let ``latest`` mean the wrong one.
    """
    for name in earlier_run(output_dir):
        path = output_dir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def check_writable(output_dir: Path) -> None:
    """Create ``output_dir`` and one small file in it, so that a bad folder is found at once.

    Raises:
        UserError: the folder cannot be made or written to, with the system's reason.
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
            f"output_dir={output_dir}: cannot be written to ({error.strerror}); give a folder that "
            "you may write to, on a disk with free space"
        ) from error


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in WEIGHT_FILES)
