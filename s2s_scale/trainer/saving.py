"""Checkpoints and final models, written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints

from s2s_scale.checkpoint import STATE_FILE, Ranks, whole_files, whole_folder
from s2s_scale.trainer.graphs import GraphTrainer


class SavingTrainer(GraphTrainer):
    """Saves."""

    @property
    def _ranks(self) -> Ranks:
        return Ranks(main=self.backend.data_rank == 0, gather=self.backend.gather_objects)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write model and tokenizer, whole or not at all.

        Raises:
            SaveError: the files cannot be written; names the last good checkpoint.
        """
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        with whole_files(Path(str(output_dir or self.args.output_dir)), self._ranks) as folder:
            super().save_model(str(folder), _internal_call=True)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if state_dict is None:
            state_dict = self.backend.weights_to_save(self.model)
        super()._save(output_dir, state_dict=state_dict)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write ``checkpoint-<step>``, whole or not at all, then delete what is over the limit.

        Raises:
            SaveError: the files cannot be written; names the last good checkpoint.
        """
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run_dir = Path(self._get_output_dir(trial=trial))
        final = run_dir / f"checkpoint-{self.state.global_step}"
        best = run_dir / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and (best == final or best.is_dir()):
            self.state.best_model_checkpoint = str(best)
        with self._not_training(), whole_folder(final, self._ranks) as folder:
            super().save_model(str(folder), _internal_call=True)
            if not self.args.save_only_model:
                with self.backend.whole_state(self.optimizer):
                    self._save_optimizer_and_scheduler(str(folder))
                self._save_scaler(str(folder))
                self._save_rng_state(str(folder))
            if self._ranks.main:
                self._save_callback_states()
                self.state.save_to_json(str(folder / STATE_FILE))
        if not self._ranks.main:
            return
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        rotate_checkpoints(
            output_dir=str(run_dir),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
        )

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
