"""Callbacks: batch plan, seeds, bad steps and preemption at each step, progress and watchdog."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NoReturn

import numpy as np
from torch.optim import Optimizer
from transformers import (
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from s2s_scale.backends import Backend
from s2s_scale.data.samplers import EpochSampler
from s2s_scale.resilience import preemption, watchdog
from s2s_scale.resilience.preemption import Stopped
from s2s_scale.trainer.bad_steps import BadSteps
from s2s_scale.trainer.metrics import CompilationWatch


class StepCallback(TrainerCallback):
    """Sets the epoch of the plan, and checks each step before its update.

    The epoch is counted from the global step rather than taken from the data loader, because
    resuming wraps the loader in one that forwards no epoch.

    Args:
        sampler: gives the sampler of the batch plan; None where no plan is followed.
    """

    def __init__(
        self,
        backend: Backend,
        bad_steps: BadSteps,
        compilations: CompilationWatch,
        *,
        sampler: Callable[[], EpochSampler | None],
    ) -> None:
        self._backend, self._bad_steps, self._compilations = backend, bad_steps, compilations
        self._sampler = sampler
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
        sampler = self._sampler()
        if sampler is not None:
            self._next_epoch = state.global_step // sampler.plan.steps
        accumulation = args.gradient_accumulation_steps
        self._backend.start_training(model, optimizer, accumulation=accumulation)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        sampler = self._sampler()
        if sampler is None:
            return
        sampler.set_epoch(self._next_epoch)
        self._epoch_start = state.global_step - state.global_step % sampler.plan.steps
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
        sampler = self._sampler()
        rows: list[int] = []
        if sampler is not None:
            rows = sampler.plan.rows(state.global_step - self._epoch_start).tolist()
        self._bad_steps.finish_step(
            optimizer,
            step=state.global_step + 1,
            rows=rows,
            learning_rate=float(optimizer.param_groups[0]["lr"]),
        )

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
            self._bad_steps.count_overflow()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # transformers has just added to its sum of losses: not a part of the next micro-batch.
        self._backend.flush()
        self._compilations.finish_micro_batch(step=state.global_step)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        self._backend.finish_step(model)
        self._compilations.finish_micro_batch(step=state.global_step)


def step_seed(seed: int, *, step: int, rank: int) -> int:
    """A number below 2**63 for optimizer step ``step`` (from 0) on data rank ``rank``."""
    sequence = np.random.SeedSequence([seed % 2**64, step, rank])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


class SeedCallback(TrainerCallback):
    """Seeds the random generators before each optimizer step, from (seed, step, rank).

    A resumed run therefore draws the same numbers as one that never stopped, whatever happened
    between two steps (an evaluation, a save, a restart), and no generator state has to be saved.
    """

    def __init__(self, seed: Callable[[int], None], *, rank: int) -> None:
        self._seed = seed
        self._rank = rank

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._seed(step_seed(args.seed, step=state.global_step, rank=self._rank))


class SettleCallback(TrainerCallback):
    """Collects the result of a background save before each step, so that its errors surface."""

    def __init__(self, settle: Callable[[], None]) -> None:
        self._settle = settle

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._settle()


class PreemptionCallback(TrainerCallback):
    """Stops training at a point where it can be saved, once any rank was asked to stop.

    ``resilience.preemption`` knows what this process was asked; here the ranks agree.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._epoch_ended = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        handler = preemption.active()
        if handler is not None:
            handler.at_boundaries = True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._epoch_ended = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.end_epoch()

    def end_epoch(self) -> None:
        """Mark that the end of the epoch is being handled, until the next step begins."""
        self._epoch_ended = True

    def requested(self) -> bool:
        """Whether any rank was asked to stop. Every rank must call it."""
        handler = preemption.active()
        if handler is None or not handler.at_boundaries:
            return False
        return self._backend.collectives.any_rank(handler.reason is not None)

    def due(self, state: TrainerState) -> bool:
        """Whether to stop after this step; never between a last step and the end of its epoch.

        Every rank must call it.
        """
        last_of_epoch = float(state.epoch or 0).is_integer()
        return not (last_of_epoch and not self._epoch_ended) and self.requested()

    def leave(self, what: str, state: TrainerState) -> NoReturn:
        """End the run; ``what`` says what was saved. Every rank must call it.

        Raises:
            Stopped: always.
        """
        handler = preemption.active()
        assert handler is not None, "only an active handler is asked to stop"
        # Every rank is past its part of the save once all have said who was asked.
        reasons = self._backend.collectives.gather_objects(handler.reason)
        reason = next((found for found in reasons if found), "a request")
        handler.mark_saved()
        raise Stopped(
            f"stopped by {reason} at step {state.global_step}, {what}; start the same command "
            "again, with --resume_from_checkpoint auto",
            agreed=True,
        )


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


# Name in the log -> (label, format); in the order in which they are shown.
_SHOWN = {
    "loss": ("loss", "{:.4f}"),
    "nll_loss": ("nll", "{:.4f}"),
    "grad_norm": ("grad norm", "{:.3f}"),
    "learning_rate": ("lr", "{:.2e}"),
    "tokens_per_second": ("tokens/s", "{:.0f}"),
    "bleu": ("BLEU", "{:.2f}"),
    "chrf": ("chrF", "{:.2f}"),
    "rougeL": ("ROUGE-L", "{:.2f}"),
    "exact_match": ("exact match %", "{:.2f}"),
    "overflow_steps": ("overflow steps", "{:.0f}"),
    "nonfinite_steps": ("non-finite steps", "{:.0f}"),
    "loss_spikes": ("loss spikes", "{:.0f}"),
}


def log_line(step: int, logs: dict[str, Any]) -> str | None:
    """``step 100  loss 2.3100  …``; evaluations are marked; None for a log with none of these."""
    evaluation = any(name.endswith("_loss") and name.split("_")[0] == "eval" for name in logs)
    prefix = "eval_" if evaluation else ""
    shown = [
        f"{label} {form.format(float(logs[prefix + name]))}"
        for name, (label, form) in _SHOWN.items()
        if prefix + name in logs
    ]
    if not shown:
        return None
    return "  ".join([f"step {step:>5}" + ("  validation" if evaluation else ""), *shown])


class LineProgressCallback(ProgressCallback):
    """transformers' progress bars, with logs as lines above the training bar."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if not state.is_world_process_zero or self.training_bar is None:
            return
        line = log_line(state.global_step, logs or {})
        if line is not None:
            self.training_bar.write(line)
