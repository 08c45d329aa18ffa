"""Going back to a checkpoint inside a run, and leaving out the rows of the step that was bad."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from s2s_scale.checkpoint import CHECKPOINT_NAME, TRAINING_STATE, newest_verified
from s2s_scale.checkpoint.portable import read_json
from s2s_scale.errors import UserError
from s2s_scale.trainer.nonfinite import RollBack
from s2s_scale.trainer.resuming import ResumingTrainer


class RollBackTrainer(ResumingTrainer):
    """Goes back."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check_bad_step_settings()
        if self._guard.rolls_back:
            self._guard.find_checkpoint = self._checkpoint_before

    def _check_bad_step_settings(self) -> None:
        """Refuse what this backend cannot do."""
        given = [
            name
            for name, on in (
                ("loss_spike_factor", self.args.loss_spike_factor is not None),
                ("on_bad_step", self.args.on_bad_step == "rollback"),
            )
            if on
        ]
        if given and not self.backend.can_skip_update:
            raise UserError(
                f"{', '.join(given)}: cannot take effect here, where a step's update is made "
                "before its loss can be looked at; leave it out, or take another profile or "
                "another --deepspeed configuration"
            )
        if self.args.on_bad_step == "rollback" and self.backend.static_shapes:
            raise UserError(
                "on_bad_step=rollback: cannot take effect here, where losses are read when a log "
                "is due; use --on_bad_step skip"
            )

    def _checkpoint_before(self, step: int) -> Path | None:
        """The newest checkpoint from before a step. Every rank must call it."""
        self.settle_background_save(wait=True)

        def earlier(folder: Path) -> bool:
            match = CHECKPOINT_NAME.fullmatch(folder.name)
            return match is not None and int(match[1]) < step

        found = None
        if self._ranks.main:
            found = newest_verified(Path(str(self.args.output_dir)), among=earlier)
        return self.backend.collectives.gather_objects(found)[0]

    def bad_steps(self) -> list[tuple[str, ...]]:
        """Step, what was found, what was done, and row ids of each bad step, for the report."""
        guard = self._guard
        kinds = [(step, "not finite") for step in guard.steps]
        kinds += [(step, "loss spike") for step in guard.spikes]
        return [
            (
                str(step),
                kind,
                "rolled back" if step in guard.left_out else "skipped",
                ", ".join(map(str, guard.rows.get(step, ()))) or "unknown",
            )
            for step, kind in sorted(kinds)
        ]

    def _run_epoch(self, **given: Any) -> None:  # type: ignore[override]
        first, last = given["epoch"], given["epoch"]
        begun = True  # the first epoch's beginning was told by whoever called
        while True:
            try:
                for epoch in range(first, last + 1):
                    if not begun:
                        self.control = self.callback_handler.on_epoch_begin(
                            self.args, self.state, self.control
                        )
                    begun = False
                    super()._run_epoch(**{**given, "epoch": epoch})
                    if self.control.should_training_stop:
                        return
                return
            except RollBack as back:
                given |= self._go_back(back, given)
                first, begun = given["epochs_trained"], False

    def _go_back(self, back: RollBack, given: dict[str, Any]) -> dict[str, Any]:
        """Put everything where the checkpoint has it; what ``_run_epoch`` needs to go on there."""
        found, state = self._guard.state(), self.state
        epochs, skipped = self._init_training_state(
            state.max_steps,
            given["num_update_steps_per_epoch"],
            state.num_train_epochs,
            str(back.folder),
            given["trial"],
        )
        self.state.compute_steps(self.args, state.max_steps)
        with self._open(back.folder) as saved:
            self._load_saved(saved)
        self._restore_counts(read_json(back.folder / TRAINING_STATE).get("skipped") or {})
        self._guard.after_rollback(found, back.step)
        self.optimizer.zero_grad()
        self._tr_loss = self._tr_loss.new_zeros(())
        self._globalstep_last_logged = self.state.global_step
        self._meter.read(self.backend.collectives.all_reduce_sum)
        self._step_callback.go_to(self.state.global_step)
        self.callback_handler.lr_scheduler = self.lr_scheduler
        return {
            "resume_from_checkpoint": str(back.folder),
            "epochs_trained": epochs,
            "steps_trained_in_current_epoch": skipped,
        }
