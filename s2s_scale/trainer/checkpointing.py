"""Saving checkpoints, complete or not at all, and resuming from them under any backend."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from s2s_scale.arguments import Seq2SeqTrainingArguments
from s2s_scale.backends import Backend
from s2s_scale.checkpoint import (
    MANIFEST,
    STATE_FILE,
    TRAINING_STATE,
    Ranks,
    SaveError,
    atomic_dir,
    newest_verified,
    rotate,
    write_manifest,
)
from s2s_scale.checkpoint.atomic import failure_of, seen_by_all
from s2s_scale.checkpoint.huggingface import HFTrainerCheckpoint
from s2s_scale.checkpoint.portable import (
    SETTINGS,
    Content,
    PortableCheckpoint,
    SavedState,
    StateWriter,
    check_fits,
    copy_to_host,
    finalize_shards,
    read_json,
    write_json,
    write_states,
)
from s2s_scale.errors import UserError
from s2s_scale.trainer.compat import enter_schedule
from s2s_scale.trainer.run_state import Identity, RunFiles

LossScale = Mapping[str, float] | None


@dataclass(frozen=True)
class Trained:
    """What training changes, and what belongs beside it.

    Attributes:
        model: the model inside its wrappers.
        optimizer: as the trainer has wrapped it; None before there is one.
        schedule: of the learning rate.
        scaler: accelerate's gradient scaler, or None.
        tokenizer: saved beside the weights, if there is one.
    """

    model: Any
    optimizer: Any
    schedule: Any = None
    scaler: Any = None
    tokenizer: Any = None


@dataclass(frozen=True)
class Saved:
    """An open checkpoint.

    Attributes:
        run: the saved run's identity, as far as it is known.
        state: weights and moments by parameter name.
        schedule: the schedule's own state.
        loss_scale: as ``Backend.loss_scale`` gave it.
        moments_fit: whether the moments are those of this run's kind of optimizer.
    """

    run: Identity
    state: SavedState
    schedule: Mapping[str, Any]
    loss_scale: Mapping[str, float] | None = None
    moments_fit: bool = True


class BackgroundSave:
    """Runs one save at a time in a thread. The process does not exit before it has finished."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, save: Callable[[], None]) -> None:
        """Run ``save`` in a thread; the ``result`` of the previous save must have been taken."""
        assert self._thread is None, "result() comes first"

        def run() -> None:
            try:
                save()
            except BaseException as error:  # noqa: BLE001  (returned by ``result``)
                self._error = error

        self._thread = threading.Thread(target=run, name="saving a checkpoint")
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether a save is in progress."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait for the save in progress, if any; an error is kept for ``result``."""
        if self._thread is not None:
            self._thread.join()

    def result(self) -> BaseException | None:
        """The error of the finished save, or None; a new save may then start.

        Does not wait: call it when nothing is ``running``.
        """
        error, self._error, self._thread = self._error, None, None
        return error


class Checkpointer:
    """Saves checkpoints and loads them.

    Args:
        args: the training arguments, of which the ``save_*`` and ``checkpoint_*`` are read.
        backend: gives and takes the state of model and optimizer.
    """

    def __init__(self, args: Seq2SeqTrainingArguments, backend: Backend) -> None:
        self._args, self._backend = args, backend
        self._background = BackgroundSave()
        self._background_pending = False
        self.seconds: list[float] = []
        """How long training stood still for each checkpoint."""

    @property
    def ranks(self) -> Ranks:
        """What saving needs to know about the other ranks."""
        collectives = self._backend.collectives
        return Ranks(main=collectives.rank == 0, gather=collectives.gather_objects)

    # ---- Saving ----

    def save(
        self,
        final: Path,
        trained: Trained,
        *,
        run_files: Callable[[LossScale], RunFiles],
        best: str | None,
    ) -> None:
        """Write the checkpoint ``final``, then delete old ones. Every rank must call it.

        Args:
            run_files: what describes the run; called on rank 0.
            best: a checkpoint that is never deleted.

        Raises:
            SaveError: the files cannot be written; names the last good checkpoint.
        """
        started = time.perf_counter()
        loss_scale = self._backend.loss_scale(trained.optimizer, trained.scaler)
        if self._args.save_only_model:
            trained = replace(trained, optimizer=None)
        self.settle(wait=True)
        if self._args.save_in_background:
            self._save_in_background(final, trained, partial(run_files, loss_scale), best)
        else:
            with atomic_dir(final, self.ranks) as folder:
                content = self._write(folder, trained)
                if content is not None:
                    files = run_files(loss_scale)
                    self._describe(folder, files)
                    self._close(folder, files.training_state, content)
            if self.ranks.main:
                rotate(final.parent, limit=self._args.save_total_limit, best=best)
        self.seconds.append(time.perf_counter() - started)

    def _save_in_background(
        self,
        final: Path,
        trained: Trained,
        run_files: Callable[[], RunFiles],
        best: str | None,
    ) -> None:
        """Copy the state to host memory, and write it in a thread on rank 0."""
        states = copy_to_host(self._backend.state(trained.model, trained.optimizer))
        self._background_pending = True
        if not self.ranks.main:
            return
        scratch, files = TemporaryDirectory(prefix="s2s-scale-save-"), run_files()

        def write_small_files() -> None:
            _write_config(Path(scratch.name), trained)
            self._describe(Path(scratch.name), files)

        failure = failure_of(write_small_files)
        writer = self._writer(final, trained.model)
        writer.hold_buffers()

        def save() -> None:
            with scratch, atomic_dir(final) as folder:
                if failure is not None:  # raised where all ranks hear of it
                    raise failure
                shutil.copytree(scratch.name, folder, dirs_exist_ok=True)
                writer.move_to(folder)
                written = write_states(_given_away(states), writer)
                content = finalize_shards(folder, [written])
                self._close(folder, files.training_state, content)
            rotate(final.parent, limit=self._args.save_total_limit, best=best)

        self._background.start(save)

    def settle(self, *, wait: bool = False) -> None:
        """Collect the result of a background save that has ended. Every rank must call it.

        Raises:
            SaveError: it failed; on every rank.
        """
        if not self._background_pending:
            return
        error: BaseException | None = None
        running = False
        if self.ranks.main:
            if wait:
                self._background.wait()
            running = self._background.running
            error = None if running else self._background.result()
        problems: tuple[str, ...] = ()
        if isinstance(error, UserError):
            problems = error.problems
        elif error is not None:
            what = f"{type(error).__name__}: {error}"
            problems = (f"saving in the background failed on rank 0: {what}",)
        gathered = self._backend.collectives.gather_objects((running, problems))
        self._background_pending, problems = gathered[0]
        if error is not None and not isinstance(error, SaveError):
            raise error
        if problems:
            raise SaveError(*problems) from error

    def wait(self) -> None:
        """Wait until this process has finished writing; ``settle`` reports errors."""
        self._background.wait()

    def _write(self, folder: Path, trained: Trained) -> Content | None:
        """Weights and optimizer state by parameter name; each rank writes its own share.

        Every rank must call it. The content of the checkpoint, on rank 0.
        """
        writer = self._writer(folder, trained.model)
        collectives, count = self._backend.collectives, self._backend.collectives.world_size
        writers: dict[str, int] = {}
        # Rank 0 writes all where not every rank sees the same folder, and where transformers
        # converts weights, which it does with all of them together.
        if count > 1 and not writer.keys.converts and seen_by_all(folder, self.ranks, count=count):
            writers = self._backend.writers(trained.model, trained.optimizer)
        states = self._backend.state(trained.model, trained.optimizer, writers)
        written = None

        def write() -> None:
            nonlocal written
            writes = self.ranks.main or collectives.rank in writers.values()
            written = write_states(states, writer if writes else None)

        failure = failure_of(write)
        everyone = collectives.gather_objects(written)
        if failure is not None:
            raise failure
        complete = [one for one in everyone if one is not None]
        if not self.ranks.main or len(complete) < len(everyone):  # the rank that failed says why
            return None
        _write_config(folder, trained)
        return finalize_shards(folder, complete)

    def _writer(self, folder: Path, model: nn.Module) -> StateWriter:
        size = self._args.checkpoint_shard_mib << 20
        return StateWriter(folder, model, shard_bytes=size, rank=self._backend.collectives.rank)

    @staticmethod
    def _describe(folder: Path, files: RunFiles) -> None:
        files.trainer_state.save_to_json(str(folder / STATE_FILE))
        write_json(folder / SETTINGS, files.settings)

    def _close(self, folder: Path, training: dict[str, Any], content: Content) -> None:
        """The run's state and the manifest: the last files of a checkpoint."""
        if training["optimizer"] is not None:
            training["optimizer"]["numbers"] = content.numbers
        write_json(folder / TRAINING_STATE, training)
        write_manifest(folder, step=training["step"], known=content.entries)

    # ---- Loading ----

    @contextmanager
    def open(self, folder: Path, model: nn.Module, *, optimizer_name: str) -> Iterator[Saved]:
        """Open a checkpoint in order to resume from it; ``model`` is inside no wrapper.

        ``optimizer_name`` is this run's, as ``RunState`` gives it.

        Raises:
            UserError: it holds another model, or no optimizer state that can be read.
        """
        shapes = self._backend.whole_shapes(model)
        if is_portable(folder):
            with PortableCheckpoint(folder) as portable:
                training = portable.training
                if not portable.has_optimizer:
                    raise UserError(
                        f"resume_from_checkpoint={folder}: was saved with --save_only_model and "
                        "has no optimizer state; start from its weights with "
                        f"--model_name_or_path {folder}"
                    )
                state = portable.reader_for(model)
                check_fits(folder, state, shapes)
                yield Saved(
                    training["run"],
                    state,
                    training["schedule"],
                    training["loss_scale"],
                    training["optimizer"]["class"] == optimizer_name,
                )
        else:
            stock = HFTrainerCheckpoint(folder, model, shapes)
            check_fits(folder, stock, shapes)
            # What such a checkpoint records of its run, to be compared with this one.
            rates = stock.schedule.get("base_lrs") or [None]
            steps = read_json(folder / STATE_FILE)["max_steps"]
            run: Identity = {
                "optimizer": {"learning_rate": rates[0]} if rates[0] is not None else {},
                "schedule": {"training steps of the schedule": steps},
            }
            yield Saved(run, stock, stock.schedule, stock.loss_scale)

    def load(
        self,
        saved: Saved,
        trained: Trained,
        *,
        schedule_identity: Mapping[str, Any],
    ) -> None:
        """Load weights, moments, buffers, schedule and loss scale. Every rank must call it.

        Called after ``Backend.after_prepare``. ``schedule_identity``: as ``RunState`` gives it.

        Raises:
            UserError: the schedule is another one, of a kind that cannot be entered at a step.
        """
        moments, state = saved.moments_fit, saved.state
        self._backend.load_state(trained.model, trained.optimizer, state, moments=moments)
        state.load_buffers(trained.model)
        now = {**schedule_identity, "learning_rate": self._args.learning_rate}
        name = str(getattr(self._args.lr_scheduler_type, "value", self._args.lr_scheduler_type))
        load_schedule(trained.schedule, trained.optimizer, saved, now, name=name)
        if saved.loss_scale:
            self._backend.load_loss_scale(trained.optimizer, trained.scaler, saved.loss_scale)

    def load_best(self, folder: str | None, trained: Trained) -> bool:
        """Load the weights of a portable checkpoint; returns False for any other folder.

        Every rank must call it.
        """
        if folder is None or not is_portable(folder):
            return False
        with PortableCheckpoint(Path(folder)) as portable:
            state = portable.reader_for(trained.model)
            self._backend.load_state(trained.model, trained.optimizer, state, moments=False)
            state.load_buffers(trained.model)
        return True

    def newest(self, output_dir: Path) -> Path | None:
        """The newest checkpoint that is whole, on every rank. Every rank must call it."""
        found = newest_verified(output_dir) if self.ranks.main else None
        return self._backend.collectives.gather_objects(found)[0]


def is_portable(folder: str | Path | None) -> bool:
    """Whether a folder is a portable checkpoint."""
    if folder is None or not (Path(folder) / MANIFEST).is_file():
        return False
    return read_json(Path(folder) / MANIFEST).get("kind") == "portable"


def load_schedule(
    schedule: Any, optimizer: Any, saved: Saved, now: Mapping[str, Any], *, name: str
) -> None:
    """Continue the saved schedule, or enter a new one at the same step.

    Args:
        now: this run's schedule and learning rate, which decide whether it is the saved one.
        name: ``lr_scheduler_type``, for messages.

    Raises:
        UserError: a new schedule is of a kind that cannot be entered at a step.
    """
    before = {**saved.run.get("schedule", {}), **saved.run.get("optimizer", {})}
    step = int(saved.schedule["last_epoch"])
    if all(now[name] == before[name] for name in now if name in before):
        schedule.load_state_dict(saved.schedule)
    elif hasattr(schedule, "lr_lambdas"):
        enter_schedule(schedule, step)
    else:
        raise UserError(
            f"lr_scheduler_type={name}: cannot be entered at step {step}; give the old schedule, "
            "or start from the checkpoint's weights with --model_name_or_path"
        )
    for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate


def _write_config(folder: Path, trained: Trained) -> None:
    """Configuration and tokenizer, as ``save_pretrained`` writes them beside the weights."""
    model = trained.model
    if hasattr(model, "config"):
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    if trained.tokenizer is not None:
        trained.tokenizer.save_pretrained(folder)


def _given_away(states: list[Any]) -> Iterator[Any]:
    """The states one by one; each can be freed once it is written."""
    states.reverse()
    while states:
        yield states.pop()
