"""Training that was asked to stop: agreed on by all ranks, saved, taken up where it was left."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from s2s_scale.checkpoint import TRAINING_STATE, newest_verified
from s2s_scale.checkpoint.portable import read_json
from s2s_scale.resilience import preemption
from s2s_scale.resilience.preemption import Stopped
from s2s_scale.trainer.rolling_back import RollBackTrainer


class _EvaluationStopped(BaseException):
    """All ranks leave an evaluation between two batches; the step before it is complete."""


class BoundaryCallback(TrainerCallback):
    """From the beginning of training on, a request to stop is met where it can be saved."""

    def __init__(self) -> None:
        self.epoch_ended = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        guard = preemption.active()
        if guard is not None:
            guard.at_boundaries = True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.epoch_ended = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.epoch_ended = True


class StoppingTrainer(RollBackTrainer):
    """Stops at the end of a step, or between two batches of an evaluation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._boundary = BoundaryCallback()
        self.add_callback(self._boundary)

    def _asked_to_stop(self) -> bool:
        """Whether any rank was asked. Every rank must call it."""
        guard = preemption.active()
        if guard is None or not guard.at_boundaries:
            return False
        return self.backend.collectives.any_rank(guard.reason is not None)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' ``train``.

        Raises:
            Stopped: the process, or another rank's, was asked to stop, and everything is saved.
        """
        try:
            return super().train(*args, **kwargs)
        except _EvaluationStopped:  # the one before the first step
            self._leave("with nothing to save")

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        try:
            return super().evaluate(*args, **kwargs)
        except _EvaluationStopped:
            if self.is_in_train:
                raise
            self._leave_after_training()

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._asked_to_stop():
            raise _EvaluationStopped
        return super().prediction_step(*args, **kwargs)

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        """transformers' hook after each step and after each epoch: there a run stops."""
        control = self.control
        wanted = {"evaluate": control.should_evaluate, "save": control.should_save}
        stop = not self._epoch_is_ending() and self._asked_to_stop()
        if not stop:
            try:
                super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
                return
            except _EvaluationStopped:
                pass
        # What was trained since the last log would otherwise be in no log.
        control.should_log = True
        control.should_evaluate = control.should_save = False
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        self._pending = wanted
        self._save_checkpoint(model, trial)
        self.settle_background_save(wait=True)
        self._leave(f"saved in {self._checkpoint_of_step(trial)}")

    def _epoch_is_ending(self) -> bool:
        """Whether this step is its epoch's last, and what the epoch's end brings is to come."""
        return float(self.state.epoch or 0).is_integer() and not self._boundary.epoch_ended

    def _checkpoint_of_step(self, trial: Any) -> Path:
        return Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"

    def _leave_after_training(self) -> NoReturn:
        """Stop in an evaluation after training; there must be something to go on from."""
        output_dir = Path(str(self.args.output_dir))
        found = newest_verified(output_dir) if self._ranks.main else None
        found = self.backend.collectives.gather_objects(found)[0]
        if found is None and self.optimizer is not None:
            self._save_checkpoint(self.model, None)
            self.settle_background_save(wait=True)
            found = self._checkpoint_of_step(None)
        self._leave(f"it goes on from {found}" if found else "with nothing to save")

    def _leave(self, what: str) -> NoReturn:
        guard = preemption.active()
        assert guard is not None, "only a guard is asked to stop"
        # Every rank is past its part of the save once all have said who was asked.
        reasons = self.backend.collectives.gather_objects(guard.reason)
        reason = next((found for found in reasons if found), "a request")
        guard.mark_saved()
        raise Stopped(
            f"stopped by {reason} at step {self.state.global_step}, {what}; start the same "
            "command again, with --resume_from_checkpoint auto",
            agreed=True,
        )

    # ---- Going on ----

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        prepared = super()._prepare_for_training(
            max_steps, train_dataloader, resume_from_checkpoint
        )
        file = Path(resume_from_checkpoint or "", TRAINING_STATE)
        if resume_from_checkpoint and file.is_file():
            self._pending = dict(read_json(file).get("pending") or self._pending)
        return prepared

    def _run_epoch(self, **given: Any) -> None:  # type: ignore[override]
        names = ("model", "trial", "epoch", "ignore_keys_for_eval", "start_time")
        self._catch_up(*(given[name] for name in names))
        finished = self.state.global_step >= self.state.max_steps
        if finished or self.control.should_training_stop:
            # Of a run that had ended, transformers would train one step more.
            self.control.should_training_stop = True
            return
        super()._run_epoch(**given)

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: Any) -> Any:
        self._catch_up(self.model_wrapped, trial, self.state.epoch, None, start_time)
        return super()._finalize_training(trial, num_train_samples, start_time)

    def _catch_up(self, model: Any, trial: Any, epoch: Any, ignore: Any, start_time: float) -> None:
        """The evaluation, and the save after it, that the stopped run still had to do."""
        pending, self._pending = self._pending, {"evaluate": False, "save": False}
        if pending["evaluate"]:
            self.control.should_log = False
            self.control.should_evaluate, self.control.should_save = True, pending["save"]
            self._boundary.epoch_ended = True
            self._maybe_log_save_evaluate(
                self._tr_loss, None, model, trial, epoch, ignore, start_time
            )
