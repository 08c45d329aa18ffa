"""Checkpoint folders: found, written whole or not at all, and protected from a second run."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

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


class SaveError(UserError):
    """Saving failed for a reason outside the program, such as a full disk or a read-only folder."""


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


def last_checkpoint_text(output_dir: Path) -> str:
    """How to go on from the newest checkpoint, as the end of an error message."""
    saved = checkpoints(output_dir)
    if not saved:
        return "no checkpoint had been saved"
    return (
        f"the last good checkpoint is {saved[-1]}; "
        "mend the cause, then go on with --resume_from_checkpoint latest"
    )


def resolve_resume(value: str | None, output_dir: Path) -> Path | None:
    """The folder that ``--resume_from_checkpoint`` means: ``latest``, a path, or nothing.

    Raises:
        UserError: no such folder, or it is no checkpoint.
    """
    if value is None or value.lower() == "false":
        return None
    if value.lower() in ("latest", "true"):
        saved = checkpoints(output_dir)
        if not saved:
            raise UserError(
                f"resume_from_checkpoint={value}: no checkpoint found in {output_dir}; leave the "
                "flag out to start from the beginning, or name a checkpoint folder"
            )
        return saved[-1]
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
    return folder


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


@contextmanager
def whole_folder(final: Path, ranks: Ranks = SINGLE) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``final`` when the block ends well, else vanishes.

    Files are flushed to disk before the rename, so ``final`` is either absent, its earlier self,
    or complete; never half-written. Every rank must enter, and all of them see the same folder.

    Raises:
        SaveError: writing failed on some rank; names the last good checkpoint beside ``final``.
    """
    partial = final.with_name(f".{final.name}.incomplete")

    def publish() -> None:
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)

    with _staged(final.name, final.parent, partial, publish, ranks):
        yield partial


@contextmanager
def whole_files(folder: Path, ranks: Ranks = SINGLE) -> Iterator[Path]:
    """Yield a temporary folder whose files move into ``folder`` when the block ends well.

    For results that stand beside other files, such as the final model in the output folder.
    Every rank must enter.

    Raises:
        SaveError: as ``whole_folder``.
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

    settle(_failure_of(make) if ranks.main else None)
    failure = None
    try:
        yield
    except BaseException as error:  # noqa: BLE001  (settle raises it again, on every rank)
        failure = error
    try:
        settle(failure)
    finally:
        del failure
    settle(_failure_of(finish) if ranks.main else None)


def _failure_of(step: Callable[[], None]) -> BaseException | None:
    try:
        step()
    except BaseException as error:  # noqa: BLE001  (handed to settle, which raises it again)
        return error
    return None


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Report a failed write in the block as one ``SaveError``; for files that need no rename.

    Raises:
        SaveError: as ``whole_folder``.
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
    """fsync every file below ``folder`` and the folders themselves."""
    for root, _, files in os.walk(folder):
        for name in (*files, "."):
            descriptor = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in WEIGHT_FILES)
