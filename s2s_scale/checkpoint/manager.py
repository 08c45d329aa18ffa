"""The checkpoints of an output folder: finding, verifying, rotating and protecting them.

Also here: what must be unchanged for a run to be resumed exactly, and saving in the background.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

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
"""Files that training leaves in its output folder beside the checkpoints and the final model."""
TRAINING_STATE = "training_state.json"
"""In every checkpoint of ours, and in none of transformers' own."""

Note = Callable[[str], None]


def checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints in ``output_dir``, oldest step first.

    A folder counts when it holds both the trainer's state and weights; half-written ones never
    get their final name (see ``atomic_dir``), so this only guards against damage from outside.
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


def remove_partial(output_dir: Path) -> None:
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


Identity = Mapping[str, Mapping[str, Any]]
"""One of ``config.CHANGES`` -> name of a setting -> value, as JSON holds it."""

CONSEQUENCES = {
    "data": "weights, optimizer and schedule are kept; the new data's batch plan is entered at the "
    "same step, so rows of its steps before that wait for the next epoch",
    "tokenizer": "weights, optimizer and position are kept; token ids may mean other text",
    "seed": "weights, optimizer and schedule are kept; the batch plan and dropout are those of the "
    "new seed from here on, so rows may come twice or not at all in this epoch",
    "step_size": "weights, optimizer and schedule are kept; the batch plan is cut anew and entered "
    "at the same step, so rows may come twice or not at all in this epoch",
    "loss": "everything is kept; the loss is another from here on",
    "optimizer": "weights and schedule are kept; moments are kept for the same kind of optimizer, "
    "else they restart from nothing",
    "schedule": "weights, optimizer and step are kept; the new schedule is entered at that step",
}
"""What accepting a change means for the run."""


def differences(saved: Identity, now: Identity) -> list[tuple[str, str, Any, Any]]:
    """(change, setting, value in the checkpoint, value now) for all that differ.

    Settings that only one of the two knows (another version wrote it) are not compared.
    """
    now = json.loads(json.dumps(now, default=str))  # as the other one was written
    return [
        (change, name, saved[change][name], value)
        for change, values in now.items()
        for name, value in values.items()
        if name in saved.get(change, {}) and saved[change][name] != value
    ]


def check_identity(
    folder: Path, saved: Identity, now: Identity, accepted: Sequence[str]
) -> list[str]:
    """Compare a checkpoint's run with this one; a line for each accepted change.

    Raises:
        UserError: there are differences that are not accepted; one line for each, with both values
            and the flag that accepts it.
    """
    found = differences(saved, now)
    refused = [entry for entry in found if entry[0] not in accepted]
    if refused:
        wanted = " ".join(dict.fromkeys([*accepted, *(change for change, *_ in refused)]))
        raise UserError(
            *(
                f"{name}: {_shown(now_value)} now, but {_shown(value)} in {folder}; give the old "
                f"value, or accept it with --accept_changes {wanted} ({CONSEQUENCES[change]})"
                for change, name, value, now_value in refused
            )
        )
    changes = dict.fromkeys(change for change, *_ in found)
    return [f"{change} has changed, as accepted: {CONSEQUENCES[change]}" for change in changes]


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


class BackgroundSave:
    """One save at a time. The process does not end before it is done."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, save: Callable[[], None]) -> None:
        """Run ``save`` in a thread; the one before must have been taken note of."""
        assert self._thread is None, "finished() or wait() comes first"

        def run() -> None:
            try:
                save()
            except BaseException as error:  # noqa: BLE001  (handed over by ``result``)
                self._error = error

        self._thread = threading.Thread(target=run, name="saving a checkpoint")
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether a save is being written."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait until nothing is being written; errors stay for ``result``."""
        if self._thread is not None:
            self._thread.join()

    def result(self) -> BaseException | None:
        """The error of the save that has ended, None where it went well; then a new one may start.

        It does not wait: call it when nothing is ``running``.
        """
        error, self._error, self._thread = self._error, None, None
        return error


def problems_of(error: BaseException | None) -> tuple[str, ...]:
    """What other ranks are told of an error."""
    if error is None:
        return ()
    if isinstance(error, UserError):
        return error.problems
    return (f"saving in the background failed on rank 0: {type(error).__name__}: {error}",)
