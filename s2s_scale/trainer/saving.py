"""Checkpoints and final models, written whole or not at all."""

from __future__ import annotations

import shutil
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn
from transformers.trainer_callback import ExportableState

from s2s_scale.checkpoint import (
    STATE_FILE,
    TRAINING_STATE,
    Ranks,
    SaveError,
    atomic_dir,
    rotate,
    whole_files,
    write_manifest,
)
from s2s_scale.checkpoint.atomic import failure_of, seen_by_all
from s2s_scale.checkpoint.manager import BackgroundSave, problems_of
from s2s_scale.checkpoint.portable import (
    SETTINGS,
    Content,
    StateWriter,
    finalize_shards,
    held,
    write_json,
    write_states,
)
from s2s_scale.resilience import watchdog
from s2s_scale.trainer.position import PositionTrainer


class SavingTrainer(PositionTrainer):
    """Saves."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._background = BackgroundSave()
        self._background_pending = False
        self._weights_to_save: dict[str, Tensor] | None = None
        self.save_seconds: list[float] = []
        """How long training stood still for each checkpoint."""

    @property
    def _ranks(self) -> Ranks:
        return Ranks(
            main=self.backend.collectives.rank == 0, gather=self.backend.collectives.gather_objects
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write model and tokenizer, whole or not at all.

        Raises:
            SaveError: the files cannot be written; names the last good checkpoint.
        """
        # Every rank takes part in gathering, while transformers calls ``_save`` on rank 0 alone.
        self._weights_to_save = self.backend.weights_to_save(self.model)
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        with whole_files(Path(str(output_dir or self.args.output_dir)), self._ranks) as folder:
            super().save_model(str(folder), _internal_call=True)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if state_dict is None:
            state_dict, self._weights_to_save = self._weights_to_save, None
        super()._save(output_dir, state_dict=state_dict)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write ``checkpoint-<step>``, whole or not at all, then delete what is over the limit.

        Raises:
            SaveError: the files cannot be written; names the last good checkpoint.
        """
        started = time.perf_counter()
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run_dir = Path(self._get_output_dir(trial=trial))
        final = run_dir / f"checkpoint-{self.state.global_step}"
        best = run_dir / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and (best == final or best.is_dir()):
            self.state.best_model_checkpoint = str(best)
        self._collect_for_saving()
        with self._not_training(), watchdog.pause("saving"):
            self.settle_background_save(wait=True)
            if self.args.save_in_background:
                self._save_in_background(final)
            else:
                self._save_now(final)
        self.save_seconds.append(time.perf_counter() - started)
        if self.args.push_to_hub:
            self.settle_background_save(wait=True)
            if self._ranks.main:
                self._push_from_checkpoint(str(final))

    def _save_now(self, final: Path) -> None:
        with atomic_dir(final, self._ranks) as folder:
            native = self.args.checkpoint_format == "native"
            content = self._write_native(folder) if native else self._write_portable(folder)
            if content is not None:
                self._describe(folder)
                self._close(folder, self._training_state(), content)
        if self._ranks.main:
            self._rotate(final.parent)

    def _save_in_background(self, final: Path) -> None:
        """Copy the state to host memory, and write it in a thread of rank 0."""
        plain = self._plain_model()
        states = held(self.backend.state(plain, self._saved_optimizer))
        self._background_pending = True
        if not self._ranks.main:
            return
        scratch = TemporaryDirectory(prefix="s2s-scale-save-")
        failure = failure_of(partial(self._write_small_files, Path(scratch.name), plain))
        training = self._training_state()
        writer = self._state_writer(final, plain)
        writer.hold_buffers()

        def save() -> None:
            with scratch, atomic_dir(final) as folder:
                if failure is not None:  # told where all ranks hear of it
                    raise failure
                shutil.copytree(scratch.name, folder, dirs_exist_ok=True)
                writer.move_to(folder)
                written = write_states(_given_away(states), writer)
                self._close(folder, training, finalize_shards(folder, [written]))
            self._rotate(final.parent)

        self._background.start(save)

    def _write_small_files(self, folder: Path, plain: Any) -> None:
        self._write_config(folder, plain)
        self._describe(folder)

    def settle_background_save(self, *, wait: bool = False) -> None:
        """Take note of a save in the background that has ended. Every rank must call it.

        Raises:
            SaveError: it failed; on every rank.
        """
        if not self._background_pending:
            return
        error = None
        running = False
        if self._ranks.main:
            if wait:
                self._background.wait()
            running = self._background.running
            error = None if running else self._background.result()
        running, problems = self.backend.collectives.gather_objects((running, problems_of(error)))[
            0
        ]
        self._background_pending = running
        if error is not None and not isinstance(error, SaveError):
            raise error
        if problems:
            raise SaveError(*problems) from error

    def wait_for_background_save(self) -> None:
        """Wait until this process writes nothing any more; for the end of a run that failed."""
        self._background.wait()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self.settle_background_save(wait=True)
        return super()._finalize_training(*args, **kwargs)

    @property
    def _saved_optimizer(self) -> Any:
        """The optimizer, or None where only weights are saved."""
        return None if self.args.save_only_model else self.optimizer

    def _write_native(self, folder: Path) -> Content | None:
        """The files that transformers and the backend's library write themselves.

        Every rank must call it; what is known of them, on rank 0.
        """
        super().save_model(str(folder), _internal_call=True)
        if not self.args.save_only_model:
            with self.backend.consolidated_state(self.optimizer):
                self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
        self.backend.collectives.gather_objects(
            None
        )  # all ranks' files are there before they are counted
        return Content({}, {}) if self._ranks.main else None

    def _write_portable(self, folder: Path) -> Content | None:
        """Weights and optimizer state by parameter name; each rank writes its own share.

        Every rank must call it. The content of the checkpoint, on rank 0.
        """
        plain = self._plain_model()
        writer = self._state_writer(folder, plain)
        writers = self._writers(folder, writer)
        states = self.backend.state(plain, self._saved_optimizer, writers)
        written = None

        def write() -> None:
            nonlocal written
            writes = self._ranks.main or self.backend.collectives.rank in writers.values()
            written = write_states(states, writer if writes else None)

        failure = failure_of(write)
        everyone = self.backend.collectives.gather_objects(written)
        if failure is not None:
            raise failure
        complete = [one for one in everyone if one is not None]
        if not self._ranks.main or len(complete) < len(everyone):  # the rank that failed says why
            return None
        self._write_config(folder, plain)
        return finalize_shards(folder, complete)

    def _writers(self, folder: Path, writer: StateWriter) -> dict[str, int]:
        """Which rank writes which parameter; none for rank 0 alone.

        That writes all where not every rank sees the same folder, and where transformers converts
        weights, which it does with all of them together. Every rank must call it.
        """
        count = self.backend.collectives.world_size
        if count == 1 or writer.keys.converts:
            return {}
        if not seen_by_all(folder, self._ranks, count=count):
            return {}
        return self.backend.writers(writer.model, self._saved_optimizer)

    def _state_writer(self, folder: Path, model: nn.Module) -> StateWriter:
        size = self.args.checkpoint_shard_mib << 20
        return StateWriter(folder, model, shard_bytes=size, rank=self.backend.collectives.rank)

    def _write_config(self, folder: Path, model: Any) -> None:
        """Configuration and tokenizer, as ``save_pretrained`` writes them beside the weights."""
        if hasattr(model, "config"):
            model.config.dtype = str(model.dtype).removeprefix("torch.")
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(folder)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _describe(self, folder: Path) -> None:
        """The trainer's state and the settings, which both formats have."""
        self._save_callback_states()
        self.state.save_to_json(str(folder / STATE_FILE))
        write_json(folder / SETTINGS, self._settings_and_versions())

    def _close(self, folder: Path, training: dict[str, Any], content: Content) -> None:
        """Where training stands, and the manifest: the last files of a checkpoint."""
        kind = self.args.checkpoint_format
        if training["optimizer"] is not None and kind == "portable":
            training["optimizer"]["numbers"] = content.numbers
        write_json(folder / TRAINING_STATE, training)
        write_manifest(folder, kind=kind, step=training["step"], known=content.entries)

    def _rotate(self, run_dir: Path) -> None:
        best = self.state.best_model_checkpoint
        rotate(run_dir, limit=self.args.save_total_limit, best=best)

    def _save_callback_states(self) -> None:
        """Put the state of callbacks that export one into the trainer's state."""
        states: dict[str, Any] = self.state.stateful_callbacks  # type: ignore[assignment]
        for callback in [*self.callback_handler.callbacks, self.control]:
            if not isinstance(callback, ExportableState):
                continue
            name, exported = type(callback).__name__, callback.state()
            if isinstance(states.get(name), list):
                states[name].append(exported)
            else:
                states[name] = exported


def _given_away(states: list[Any]) -> Any:
    """The states one by one, each let go of once it is written."""
    states.reverse()
    while states:
        yield states.pop()
