"""Going on from a checkpoint: of ours under any backend, or of transformers' own trainer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from s2s_scale.checkpoint import MANIFEST, STATE_FILE, TRAINING_STATE, is_ours
from s2s_scale.checkpoint.huggingface import OPTIMIZER_FILE, HFTrainerCheckpoint
from s2s_scale.checkpoint.manager import Identity, check_identity
from s2s_scale.checkpoint.portable import PortableCheckpoint, SavedState, check_fits, read_json
from s2s_scale.errors import UserError
from s2s_scale.trainer.position import plan_fingerprint
from s2s_scale.trainer.randomness import SeedCallback
from s2s_scale.trainer.saving import SavingTrainer


def is_portable(folder: str | Path | None) -> bool:
    """Whether a folder is a portable checkpoint."""
    if folder is None or not (Path(folder) / MANIFEST).is_file():
        return False
    return read_json(Path(folder) / MANIFEST).get("kind") == "portable"


def is_stock(folder: str | Path | None) -> bool:
    """Whether a folder was written by transformers' own trainer, with a plain optimizer."""
    if folder is None or is_ours(Path(folder)):
        return False
    return (Path(folder) / OPTIMIZER_FILE).is_file()


@dataclass(frozen=True)
class Saved:
    """What a checkpoint of either kind gives.

    Attributes:
        state: weights and moments by parameter name.
        run: what made the saved run what it was, as far as it is known.
        schedule: the schedule's own state.
        moments_fit: whether the moments are those of this run's kind of optimizer.
    """

    state: SavedState
    run: Identity
    schedule: Mapping[str, Any]
    loss_scale: Mapping[str, float] | None
    moments_fit: bool


class SettleCallback(TrainerCallback):
    """Takes note of a save in the background before each step, so that its errors surface."""

    def __init__(self, settle: Callable[[], None]) -> None:
        self._settle = settle

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._settle()


class ResumingTrainer(SavingTrainer):
    """Resumes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(SeedCallback(self.backend.seed, rank=self.backend.collectives.rank))
        self.add_callback(SettleCallback(self.settle_background_save))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        # State by name is read once model and optimizer are where they will stay.
        if not is_portable(resume_from_checkpoint) and not is_stock(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        self._data_identity()  # read here, so that no save has to wait for it
        if resume_from_checkpoint is None:
            return super()._prepare_for_training(max_steps, train_dataloader, None)
        # The saved state brought the old run's intervals along.
        self.state.compute_steps(self.args, max_steps)
        folder = Path(resume_from_checkpoint)
        self._enter_stream(folder)
        if not is_portable(folder) and not is_stock(folder):
            self._check_native(folder)
            return super()._prepare_for_training(max_steps, train_dataloader, str(folder))
        with self._open(folder) as saved:
            check_fits(folder, saved.state, self.backend.whole_shapes(self._plain_model()))
            self._check_run(folder, saved.run)
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
            self._load_saved(saved)
        return prepared

    def _enter_stream(self, folder: Path) -> None:
        """Let the stream begin where the checkpoint left it."""
        if self._stream is None:
            return
        saved = read_json(folder / TRAINING_STATE) if (folder / TRAINING_STATE).is_file() else {}
        position = (saved.get("plan") or {}).get("stream")
        if position is None:
            raise UserError(
                f"resume_from_checkpoint={folder}: does not tell a place in a stream; expected a "
                "checkpoint of a run with --streaming; start from its weights with "
                f"--model_name_or_path {folder}"
            )
        self._stream.go_on(position, saved["step"])

    def _check_native(self, folder: Path) -> None:
        """A backend's own format is read back by the same backend and number of processes."""
        if not (folder / TRAINING_STATE).is_file():  # older than the file
            return
        training = read_json(folder / TRAINING_STATE)
        now = self._shape()
        for name in ("backend", "processes"):
            if training["shape"][name] != now[name]:
                raise UserError(
                    f"resume_from_checkpoint={folder}: is in the native format, written with "
                    f"{name}={training['shape'][name]}; expected {now[name]}, as now; go on as it "
                    "was written, or convert it with s2s-scale checkpoint convert"
                )
        self._check_run(folder, training["run"])

    @contextmanager
    def _open(self, folder: Path) -> Iterator[Saved]:
        """A checkpoint whose state can be read by parameter name."""
        model = self._plain_model()
        if is_stock(folder):
            stock = HFTrainerCheckpoint(folder, model, self.backend.whole_shapes(model))
            run = _run_of_stock(folder, stock.schedule)
            yield Saved(stock, run, stock.schedule, stock.loss_scale, True)
            return
        with PortableCheckpoint(folder) as portable:
            training = portable.training
            if not portable.has_optimizer:
                raise UserError(
                    f"resume_from_checkpoint={folder}: was saved with --save_only_model and has no "
                    f"optimizer state; start from its weights with --model_name_or_path {folder}"
                )
            fit = training["optimizer"]["class"] == self._optimizer_name()
            state = portable.reader_for(model)
            yield Saved(state, training["run"], training["schedule"], training["loss_scale"], fit)

    def _load_saved(self, saved: Saved) -> None:
        """Weights, moments, schedule and loss scale. Every rank must call it."""
        plain = self._plain_model()
        self.backend.load_state(plain, self.optimizer, saved.state, moments=saved.moments_fit)
        saved.state.load_buffers(plain)
        self._load_schedule(saved)
        if saved.loss_scale:
            scaler = getattr(self.accelerator, "scaler", None)
            self.backend.load_loss_scale(self.optimizer, scaler, saved.loss_scale)

    def _load_schedule(self, saved: Saved) -> None:
        """The schedule as it was left, or the new one entered at the same step."""
        now = {**self._schedule_identity(), "learning_rate": self.args.learning_rate}
        before = {**saved.run.get("schedule", {}), **saved.run.get("optimizer", {})}
        if all(now[name] == before[name] for name in now if name in before):
            self.lr_scheduler.load_state_dict(saved.schedule)
        else:
            self._enter_schedule(int(saved.schedule["last_epoch"]))
        rates = self.lr_scheduler.get_last_lr()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _enter_schedule(self, step: int) -> None:
        """Bring a fresh schedule to ``step``, without the optimizer taking any."""
        schedule: Any = self.lr_scheduler
        if not hasattr(schedule, "lr_lambdas"):
            raise UserError(
                f"lr_scheduler_type={self.args.lr_scheduler_type}: cannot be entered at step "
                f"{step}; give the old schedule, or start from the checkpoint's weights with "
                "--model_name_or_path"
            )
        schedule.last_epoch = step
        schedule._step_count = step + 1
        parts = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        schedule._last_lr = [base * rate(step) for base, rate in parts]

    def _check_run(self, folder: Path, run: Identity) -> None:
        """Refuse to go on with another run; say what an accepted change means.

        Raises:
            UserError: one line for each difference.
        """
        notes = check_identity(folder, run, self._identity(), self.args.accept_changes or ())
        if self.backend.collectives.rank == 0:
            for note in notes:
                print(f"note: {note}", file=sys.stderr)
        if (folder / TRAINING_STATE).is_file():
            training = read_json(folder / TRAINING_STATE)
            self._restore_counts(training.get("skipped") or {})
            if not notes:
                self._check_plan(folder, training)

    def _check_plan(self, folder: Path, training: dict[str, Any]) -> None:
        """The same settings give the same plan, unless another version makes it differently."""
        plan, sampler = training.get("plan"), self._step_callback.sampler
        accepted = "data" in (self.args.accept_changes or ())
        if not plan or "stream" in plan or sampler is None or accepted:
            return
        if plan_fingerprint(sampler, plan["epoch"]) != plan["fingerprint"]:
            raise UserError(
                f"{folder}: the batch plan of epoch {plan['epoch']} is not the one it was saved "
                "with, though no setting differs: another version of s2s-scale wrote it; use that "
                "version, or accept it with --accept_changes data"
            )

    def _restore_counts(self, skipped: dict[str, Any]) -> None:
        self._guard.load(skipped)
        self._step_callback.overflow_steps = int(skipped.get("overflow_steps", 0))

    def _load_best_model(self) -> None:
        folder = self.state.best_model_checkpoint
        if not is_portable(folder):
            super()._load_best_model()
            return
        plain = self._plain_model()
        with PortableCheckpoint(Path(str(folder))) as portable:
            state = portable.reader_for(plain)
            self.backend.load_state(plain, self.optimizer, state, moments=False)
            state.load_buffers(plain)


def _run_of_stock(folder: Path, schedule: Mapping[str, Any]) -> Identity:
    """What a checkpoint of transformers' own tells of its run, to be compared with this one."""
    state = read_json(folder / STATE_FILE)
    rates = schedule.get("base_lrs") or [None]
    return {
        "optimizer": {"learning_rate": rates[0]} if rates[0] is not None else {},
        "schedule": {"training steps of the schedule": state["max_steps"]},
    }
