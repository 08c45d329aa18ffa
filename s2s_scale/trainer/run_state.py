"""The state of a run, in values that JSON holds: what a checkpoint keeps beside tensors."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn
from transformers import TrainerState
from transformers.trainer_callback import ExportableState

from s2s_scale import __version__
from s2s_scale.arguments import TOKEN_OPTIONS, Seq2SeqTrainingArguments
from s2s_scale.backends import Backend
from s2s_scale.checkpoint import TRAINING_STATE
from s2s_scale.checkpoint.portable import read_json
from s2s_scale.data.cache import hash_tokenizer, rows_fingerprint
from s2s_scale.data.samplers import EpochSampler, PlanSampler
from s2s_scale.data.streaming import StreamedExamples
from s2s_scale.errors import UserError, raise_problems
from s2s_scale.resilience.reports import RUN_VARIABLE
from s2s_scale.trainer.bad_steps import BadSteps
from s2s_scale.trainer.streaming import StreamLoader
from s2s_scale.utils import package_version

_VERSIONED = ("transformers", "accelerate", "safetensors", "deepspeed", "fairscale")
_OPTIMIZER_SETTINGS = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
NOTHING_PENDING = {"evaluate": False, "save": False}

Identity = Mapping[str, Mapping[str, Any]]
"""One of ``config.CHANGES`` -> name of a setting -> JSON value."""

CONSEQUENCES = {
    "data": "weights, optimizer and schedule are kept; the new data's batch plan is entered at the "
    "same step, so the rows of its earlier steps wait for the next epoch",
    "tokenizer": "weights, optimizer and position are kept; token ids may stand for other text",
    "seed": "weights, optimizer and schedule are kept; batch plan and dropout follow the new seed "
    "from here on, so rows may come twice or not at all in this epoch",
    "step_size": "weights, optimizer and schedule are kept; the batch plan is recomputed and "
    "entered at the same step, so rows may come twice or not at all in this epoch",
    "loss": "everything is kept; the loss changes from here on",
    "optimizer": "weights and schedule are kept; moments are kept for the same kind of optimizer, "
    "else they restart from zero",
    "schedule": "weights, optimizer and step are kept; the new schedule is entered at that step",
}
"""What accepting a change means for the run."""


@dataclass(frozen=True)
class Data:
    """What a run trains on, and in which order.

    Attributes:
        dataset: the training set; None where no batch plan is followed.
        tokenizer: makes its token ids, if known.
        sampler: this rank's, which holds the plan.
        stream: the loader, where the data are streamed.
        rows_per_device: rows of a device's micro-batch, where the mode counts rows.
    """

    dataset: Any
    tokenizer: Any
    sampler: EpochSampler | None
    stream: StreamLoader | None
    rows_per_device: int


@dataclass(frozen=True)
class RunFiles:
    """What describes a run in a checkpoint: the contents of three JSON files."""

    trainer_state: TrainerState
    training_state: dict[str, Any]
    settings: dict[str, Any]


class RunState:
    """Describes a run: its identity, its progress, and what is still pending.

    Args:
        args: the training arguments.
        backend: distributes the run.
        bad_steps: their state is saved and restored with the run's.
        loss_mode: see ``LossComputer``.
    """

    def __init__(
        self,
        args: Seq2SeqTrainingArguments,
        backend: Backend,
        bad_steps: BadSteps,
        *,
        loss_mode: str,
    ) -> None:
        self._args, self._backend, self._loss_mode = args, backend, loss_mode
        self._bad_steps = bad_steps
        self.settings: Mapping[str, tuple[Any, str]] = {}
        """Setting -> (value, origin) of the command line, where one started the run."""
        self._row_digest: tuple[int, str] | None = None
        self._tokenizer_digest: tuple[int, str] | None = None
        self._pending = dict(NOTHING_PENDING)

    @property
    def optimizer_name(self) -> str:
        """The kind of optimizer; fused or not is the same kind."""
        name = str(getattr(self._args.optim, "value", self._args.optim))
        return "adamw_torch" if name == "adamw_torch_fused" else name

    def shape(self, data: Data) -> dict[str, Any]:
        """How the run is distributed, which may change when it is resumed."""
        return {
            "backend": self._backend.name,
            "processes": self._backend.collectives.world_size,
            "rows_per_device": data.rows_per_device,
            "accumulation": self._args.gradient_accumulation_steps,
        }

    def leave_pending(self, *, evaluate: bool, save: bool) -> None:
        """Record what was due after the step and is left to the resumed run."""
        self._pending = {"evaluate": evaluate, "save": save}

    def take_pending(self) -> dict[str, bool]:
        """Return what was left pending, and clear it."""
        pending, self._pending = self._pending, dict(NOTHING_PENDING)
        return pending

    def training_state(
        self,
        data: Data,
        state: TrainerState,
        model: nn.Module,
        *,
        schedule: Any,
        loss_scale: Mapping[str, float] | None,
    ) -> dict[str, Any]:
        """The content of ``training_state.json``; ``model``: inside its wrappers."""
        optimizer = {"class": self.optimizer_name, "numbers": {}}
        return {
            "step": state.global_step,
            "epoch": state.epoch,
            "plan": _plan_position(data, state.global_step),
            "schedule": schedule.state_dict(),
            "optimizer": None if self._args.save_only_model else optimizer,
            "loss_scale": loss_scale,
            "frozen": [n for n, p in model.named_parameters() if not p.requires_grad],
            "random": {
                "seed": self._args.seed,
                "rule": "each step is seeded by (seed, step, data rank)",
            },
            "skipped": self._bad_steps.state(),
            "pending": dict(self._pending),
            "run": self.identity(data, max_steps=state.max_steps),
            "shape": self.shape(data),
        }

    def files(
        self,
        state: TrainerState,
        data: Data,
        model: nn.Module,
        schedule: Any,
        loss_scale: Mapping[str, float] | None,
    ) -> RunFiles:
        """What describes the run in a checkpoint."""
        training = self.training_state(data, state, model, schedule=schedule, loss_scale=loss_scale)
        return RunFiles(state, training, settings_and_versions(self.settings))

    def identity(self, data: Data, *, max_steps: int) -> Identity:
        """What must not change when the run is resumed; see ``check_identity``."""
        args = self._args
        optimizer = {name: getattr(args, name) for name in _OPTIMIZER_SETTINGS}
        optimizer |= {"optim": self.optimizer_name, "optim_args": args.optim_args}
        return {
            "data": self.data_identity(data),
            "tokenizer": {"tokenizer": self._digest_of(data.tokenizer)},
            "seed": {"seed": args.seed, "data_seed": args.plan_seed},
            "step_size": self._step_size(data),
            "loss": {
                "label_smoothing": args.label_smoothing,
                "loss_reduction": args.loss_reduction,
                "loss": self._loss_mode,
            },
            "optimizer": {**optimizer, "max_grad_norm": args.max_grad_norm},
            "schedule": self.schedule_identity(max_steps=max_steps),
        }

    def data_identity(self, data: Data) -> dict[str, Any]:
        """A digest of the training set; computed once for each data set."""
        dataset = data.dataset
        if isinstance(dataset, StreamedExamples):
            return dataset.identity()
        if dataset is None:
            return {}
        if self._row_digest is None or self._row_digest[0] != id(dataset):
            self._row_digest = (id(dataset), rows_fingerprint(dataset))
        return {"training rows": len(dataset), "digest of the training rows": self._row_digest[1]}

    def _digest_of(self, tokenizer: Any) -> str | None:
        if tokenizer is None or not hasattr(tokenizer, "save_pretrained"):
            return None
        if self._tokenizer_digest is None or self._tokenizer_digest[0] != id(tokenizer):
            digest = hashlib.blake2b(hash_tokenizer(tokenizer), digest_size=8)
            self._tokenizer_digest = (id(tokenizer), digest.hexdigest())
        return self._tokenizer_digest[1]

    def _step_size(self, data: Data) -> dict[str, Any]:
        sampler, args = data.sampler, self._args
        if sampler is None and data.stream is None:
            return {}
        if data.stream is not None and args.batching != "tokens":
            rows = data.rows_per_device * args.gradient_accumulation_steps
            size: dict[str, Any] = {
                "rows per optimizer step": rows * self._backend.collectives.world_size
            }
        elif isinstance(sampler, PlanSampler):
            size = {"rows per optimizer step": sampler.rows_per_step}
        else:
            per_device = "max_tokens_per_device"  # free to change: it moves no pair to another step
            names = (name for name in TOKEN_OPTIONS[args.plan_mode] if name != per_device)
            size = {name: getattr(sampler or args, name) for name in names}
        return {
            **size,
            "batching": args.plan_mode,
            "dataloader_drop_last": args.dataloader_drop_last,
        }

    def schedule_identity(self, *, max_steps: int) -> dict[str, Any]:
        """The learning-rate schedule over ``max_steps`` optimizer steps."""
        args = self._args
        name = args.schedule_name or str(args.lr_scheduler_type)
        found: dict[str, Any] = {
            "lr_scheduler": name,
            "options of the schedule": dict(args.schedule_options),
        }
        if name == "constant":
            return found
        found["warmup steps"] = args.get_warmup_steps(max_steps)
        if name != "constant_w_warmup":
            found["training steps of the schedule"] = max_steps
        return found

    def resume(self, folder: Path, saved: Identity, data: Data, *, max_steps: int) -> None:
        """Restore the run's state from a checkpoint; print what accepted changes mean.

        Raises:
            UserError: one line for each difference that was not accepted.
        """
        accepted = self._args.accept_changes or ()
        now = self.identity(data, max_steps=max_steps)
        notes = check_identity(folder, saved, now, accepted)
        if self._backend.collectives.rank == 0:
            for note in notes:
                print(f"note: {note}", file=sys.stderr)
        if not (folder / TRAINING_STATE).is_file():
            return
        training = read_json(folder / TRAINING_STATE)
        self._bad_steps.load(training.get("skipped") or {})
        if not notes and "data" not in accepted:
            _check_plan(folder, training.get("plan"), data.sampler)
        self._pending = dict(training.get("pending") or NOTHING_PENDING)


def check_identity(
    folder: Path, saved: Identity, now: Identity, accepted: Sequence[str]
) -> list[str]:
    """Compare a checkpoint's run with this one; returns one line for each accepted change.

    Settings known to only one of the two (another version wrote the checkpoint) are not compared.

    Raises:
        UserError: there are differences that were not accepted; one line for each, with both
            values and the flag that accepts it.
    """

    def shown(value: Any) -> str:
        return "none" if value is None else str(value)

    now = json.loads(json.dumps(now, default=str))  # as ``saved`` was written
    found = [
        (change, name, saved[change][name], value)
        for change, values in now.items()
        for name, value in values.items()
        if name in saved.get(change, {}) and saved[change][name] != value
    ]
    changes = list(dict.fromkeys(change for change, *_ in found))
    wanted = " ".join(dict.fromkeys([*accepted, *changes]))
    problems = [
        f"{name}: {shown(value)} now, but {shown(before)} in {folder}; give the old value, or "
        f"accept the change with --accept_changes {wanted} ({CONSEQUENCES[change]})"
        for change, name, before, value in found
        if change not in accepted
    ]
    raise_problems(problems)
    return [f"{change} has changed, as accepted: {CONSEQUENCES[change]}" for change in changes]


def settings_and_versions(given: Mapping[str, tuple[Any, str]]) -> dict[str, Any]:
    """The content of ``settings.json``: ``given`` settings with their origins, and versions."""
    settings = {n: {"value": value, "origin": origin} for n, (value, origin) in given.items()}
    found = {name: package_version(name) for name in _VERSIONED}
    versions = {"s2s-scale": __version__, "torch": torch.__version__, **found}
    return {
        "settings": settings,
        "versions": {name: value for name, value in versions.items() if value},
        "run": os.environ.get(RUN_VARIABLE),
    }


def note_best(state: TrainerState, run_dir: Path) -> str | None:
    """The checkpoint with the best metric; recorded in ``state`` if it exists or is being made."""
    best = run_dir / f"checkpoint-{state.best_global_step}"
    if state.best_global_step and (state.best_global_step == state.global_step or best.is_dir()):
        state.best_model_checkpoint = str(best)
    found: str | None = state.best_model_checkpoint
    return found


def export_callbacks(state: TrainerState, callbacks: Iterable[Any]) -> None:
    """Store the state of exportable callbacks in the trainer's state."""
    states: dict[str, Any] = state.stateful_callbacks  # type: ignore[assignment]
    for callback in callbacks:
        if not isinstance(callback, ExportableState):
            continue
        name, exported = type(callback).__name__, callback.state()
        if isinstance(states.get(name), list):
            states[name].append(exported)
        else:
            states[name] = exported


def stream_position(folder: Path) -> tuple[dict[str, Any], int]:
    """The stream position of a checkpoint, and the step it was saved at.

    Raises:
        UserError: it was not written by a run that streams its data.
    """
    saved = read_json(folder / TRAINING_STATE) if (folder / TRAINING_STATE).is_file() else {}
    position = (saved.get("plan") or {}).get("stream")
    if position is None:
        raise UserError(
            f"resume_from_checkpoint={folder}: holds no position in a stream; expected a "
            "checkpoint of a run with --streaming; start from its weights with "
            f"--model_name_or_path {folder}"
        )
    return position, saved["step"]


def _plan_position(data: Data, step: int) -> dict[str, Any] | None:
    """Epoch and step inside it, and a digest of that epoch's plan."""
    if data.stream is not None:
        return {"stream": data.stream.position(step)}
    if data.sampler is None:
        return None
    epoch, step_of_epoch = divmod(step, data.sampler.steps)
    fingerprint = plan_fingerprint(data.sampler, epoch)
    return {"epoch": epoch, "step": step_of_epoch, "fingerprint": fingerprint}


def _check_plan(folder: Path, plan: Mapping[str, Any] | None, sampler: EpochSampler | None) -> None:
    """The same settings give the same plan, unless another version makes it differently."""
    if not plan or "stream" in plan or sampler is None:
        return
    if plan_fingerprint(sampler, plan["epoch"]) != plan["fingerprint"]:
        raise UserError(
            f"{folder}: the batch plan of epoch {plan['epoch']} is not the one it was saved "
            "with, though no setting differs: another version of s2s-scale wrote it; use that "
            "version, or accept it with --accept_changes data"
        )


def plan_fingerprint(sampler: EpochSampler, epoch: int) -> str:
    """Digest of the rows of each step of an epoch; the sampler's epoch is unchanged."""
    before = sampler.epoch
    sampler.set_epoch(epoch)
    digest = xxhash.xxh3_128(sampler.plan.order.tobytes())
    digest.update(sampler.plan.offsets.tobytes())
    sampler.set_epoch(before)
    return str(digest.hexdigest())
