"""The callback that tells the process's watchdog how far training has come."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from s2s_scale.resilience import watchdog


class WatchdogCallback(TrainerCallback):
    """Marks each step, evaluation batch and save; all ranks pass the same marks.

    The first step may take long: what it needs is compiled.
    """

    def __init__(self) -> None:
        self._first_step = ExitStack()
        self._begun = False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        watchdog.at("training step", step=state.global_step + 1)
        if not self._begun:
            self._begun = True
            self._first_step.enter_context(watchdog.pause("the first step"))

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        watchdog.at("training step", step=state.global_step + 1)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        watchdog.at("optimizer step", step=state.global_step + 1)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._first_step.close()
        watchdog.at("after the step", step=state.global_step)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        watchdog.at("evaluation", step=state.global_step)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        watchdog.at("after the evaluation", step=state.global_step)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        watchdog.at("after saving", step=state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        watchdog.at("after training", step=state.global_step)
