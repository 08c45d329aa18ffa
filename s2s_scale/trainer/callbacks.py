"""Callbacks that tie the batch plan and the non-finite guard to the trainer's steps."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from s2s_scale.backends import Backend
from s2s_scale.data.samplers import EpochSampler
from s2s_scale.trainer.compilations import CompilationWatch
from s2s_scale.trainer.nonfinite import NonFiniteGuard


class StepCallback(TrainerCallback):
    """Tells the sampler its epoch and the guard which rows are in the step about to be made.

    It also counts ``overflow_steps``, those that an fp16 loss scaler has skipped.

    The epoch is counted from the global step rather than taken from the data loader, because
    resuming wraps the loader in one that forwards no epoch.
    """

    def __init__(self, guard: NonFiniteGuard, backend: Backend) -> None:
        self.guard = guard
        self.backend = backend
        self.sampler: EpochSampler | None = None
        self.overflow_steps = 0
        self.watch: CompilationWatch | None = None
        self.shape: tuple[int, ...] = ()
        self._next_epoch = 0
        self._epoch_start = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        if self.sampler is not None:
            self._next_epoch = state.global_step // self.sampler.plan.steps
        self.backend.start_training(model, optimizer, accumulation=args.gradient_accumulation_steps)

    def go_to(self, step: int) -> None:
        """Training goes on after ``step``, whatever came before; then an epoch begins."""
        if self.sampler is not None:
            self._next_epoch = step // self.sampler.plan.steps

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.sampler is None:
            return
        self.sampler.set_epoch(self._next_epoch)
        steps_before = state.global_step % self.sampler.plan.steps
        self._epoch_start = state.global_step - steps_before
        self._next_epoch += 1

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **_: Any,
    ) -> None:
        assert optimizer is not None, "the trainer passes its optimizer to callbacks"
        rows: list[int] = []
        if self.sampler is not None:
            rows = self.sampler.plan.rows(state.global_step - self._epoch_start).tolist()
        self.guard.finish_step(
            optimizer,
            self.backend,
            step=state.global_step + 1,
            rows=rows,
            learning_rate=float(optimizer.param_groups[0]["lr"]),
        )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        self.backend.finish_step(model)
        self._count_compilations(state)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # transformers has just added to its sum of losses: not a part of the next micro-batch.
        self.backend.flush()
        self._count_compilations(state)

    def _count_compilations(self, state: TrainerState) -> None:
        if self.watch is not None and self.shape:
            self.watch.ran("training", self.shape, step=state.global_step)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **_: Any,
    ) -> None:
        # With a loss scaler a step is skipped when the scaled gradients overflow.
        if args.fp16 and getattr(optimizer, "step_was_skipped", False):
            self.overflow_steps += 1
