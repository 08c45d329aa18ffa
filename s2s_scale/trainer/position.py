"""Where training stands, in values that JSON holds: what a checkpoint keeps beside tensors."""

from __future__ import annotations

import hashlib
import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import xxhash

from s2s_scale import __version__
from s2s_scale.arguments import TOKEN_OPTIONS
from s2s_scale.checkpoint.manager import Identity
from s2s_scale.data.cache import hash_tokenizer, rows_fingerprint
from s2s_scale.data.samplers import EpochSampler, PlanSampler
from s2s_scale.data.streaming import StreamedExamples
from s2s_scale.resilience.reports import RUN_VARIABLE
from s2s_scale.trainer.graphs import GraphTrainer

_VERSIONED = ("torch", "transformers", "accelerate", "safetensors", "deepspeed", "fairscale")
_OPTIMIZER_SETTINGS = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")


class PositionTrainer(GraphTrainer):
    """Tells what makes this run the run that it is, and how far it has come."""

    settings_of_run: Any = None
    """Setting -> (value, origin) of the command line, where one started the run."""

    _pending: dict[str, bool]
    """What was due after the step and was left undone, since the run was asked to stop."""
    _found_loss_scale: dict[str, float] | None = None
    _row_digest: tuple[int, str] | None = None
    _tokenizer_seen: tuple[int, str] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pending = {"evaluate": False, "save": False}

    def _plain_model(self) -> Any:
        """The model itself, inside whatever it was wrapped in."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _collect_for_saving(self) -> None:
        """What all ranks must take part in before rank 0 describes the run."""
        scaler = getattr(self.accelerator, "scaler", None)
        self._found_loss_scale = self.backend.loss_scale(self.optimizer, scaler)

    def _training_state(self) -> dict[str, Any]:
        """The content of ``training_state.json``."""
        args = self.args
        optimizer = {"class": self._optimizer_name(), "numbers": {}}
        return {
            "step": self.state.global_step,
            "epoch": self.state.epoch,
            "plan": self._plan_position(),
            "schedule": self.lr_scheduler.state_dict(),
            "optimizer": None if args.save_only_model else optimizer,
            "loss_scale": self._found_loss_scale,
            "frozen": [n for n, p in self._plain_model().named_parameters() if not p.requires_grad],
            "random": {
                "seed": args.seed,
                "rule": "each step is seeded by (seed, step, data rank)",
            },
            "skipped": {
                **self._guard.state(),
                "overflow_steps": self._step_callback.overflow_steps,
            },
            "pending": dict(self._pending),
            "run": self._identity(),
            "shape": self._shape(),
        }

    def _shape(self) -> dict[str, Any]:
        """How the run is spread out; it may be another one when the run goes on."""
        return {
            "backend": self.backend.name,
            "processes": self.backend.collectives.world_size,
            "rows_per_device": self._train_batch_size,
            "accumulation": self.args.gradient_accumulation_steps,
        }

    def _settings_and_versions(self) -> dict[str, Any]:
        """The content of ``settings.json``: each setting with its origin, and versions."""
        given = self.settings_of_run or {}
        settings = {n: {"value": value, "origin": origin} for n, (value, origin) in given.items()}
        versions = {"s2s-scale": __version__, **{name: _version(name) for name in _VERSIONED}}
        return {
            "settings": settings,
            "versions": {k: v for k, v in versions.items() if v},
            "run": os.environ.get(RUN_VARIABLE),
        }

    def _optimizer_name(self) -> str:
        """The kind of optimizer, whatever is wrapped around it; fused or not is the same kind."""
        name = str(getattr(self.args.optim, "value", self.args.optim))
        return "adamw_torch" if name == "adamw_torch_fused" else name

    def _identity(self) -> Identity:
        """What must not change when the run goes on; see ``checkpoint.identity``."""
        args = self.args
        optimizer = {name: getattr(args, name) for name in _OPTIMIZER_SETTINGS}
        optimizer |= {"optim": self._optimizer_name(), "optim_args": args.optim_args}
        return {
            "data": self._data_identity(),
            "tokenizer": {"tokenizer": self._tokenizer_digest()},
            "seed": {"seed": args.seed, "data_seed": args.plan_seed},
            "step_size": self._step_size_identity(),
            "loss": {
                "label_smoothing": args.label_smoothing,
                "loss_reduction": args.loss_reduction,
                "loss": self._loss_mode,
            },
            "optimizer": {**optimizer, "max_grad_norm": args.max_grad_norm},
            "schedule": self._schedule_identity(),
        }

    def _data_identity(self) -> dict[str, Any]:
        dataset = self.train_dataset
        if isinstance(dataset, StreamedExamples):
            return dataset.identity()
        if dataset is None or not self._follows_plan(dataset):
            return {}
        if self._row_digest is None or self._row_digest[0] != id(dataset):
            self._row_digest = (id(dataset), rows_fingerprint(dataset))
        return {"training rows": len(dataset), "digest of the training rows": self._row_digest[1]}

    def _tokenizer_digest(self) -> str | None:
        tokenizer = self.processing_class
        if tokenizer is None or not hasattr(tokenizer, "save_pretrained"):
            return None
        if self._tokenizer_seen is None or self._tokenizer_seen[0] != id(tokenizer):
            digest = hashlib.blake2b(hash_tokenizer(tokenizer), digest_size=8)
            self._tokenizer_seen = (id(tokenizer), digest.hexdigest())
        return self._tokenizer_seen[1]

    def _step_size_identity(self) -> dict[str, Any]:
        sampler, args = self._step_callback.sampler, self.args
        if sampler is None and self._stream is None:
            return {}
        if self._stream is not None and args.batching != "tokens":
            rows = self._train_batch_size * args.gradient_accumulation_steps
            size: dict[str, Any] = {
                "rows per optimizer step": rows * self.backend.collectives.world_size
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

    def _schedule_identity(self) -> dict[str, Any]:
        args = self.args
        name = args.schedule_name or str(args.lr_scheduler_type)
        found: dict[str, Any] = {
            "lr_scheduler": name,
            "options of the schedule": dict(args.schedule_options),
        }
        if name == "constant":
            return found
        total = self.state.max_steps
        found["warmup steps"] = args.get_warmup_steps(total)
        if name != "constant_w_warmup":
            found["training steps of the schedule"] = total
        return found

    def _plan_position(self) -> dict[str, Any] | None:
        """Epoch and step inside it, and a digest of that epoch's plan."""
        sampler = self._step_callback.sampler
        if self._stream is not None:
            return {"stream": self._stream.position(self.state.global_step)}
        if sampler is None:
            return None
        epoch, step = divmod(self.state.global_step, sampler.steps)
        return {"epoch": epoch, "step": step, "fingerprint": plan_fingerprint(sampler, epoch)}


def plan_fingerprint(sampler: EpochSampler, epoch: int) -> str:
    """Digest of the rows of every step of an epoch; the sampler is left as it was."""
    before = sampler.epoch
    sampler.set_epoch(epoch)
    digest = xxhash.xxh3_128(sampler.plan.order.tobytes())
    digest.update(sampler.plan.offsets.tobytes())
    sampler.set_epoch(before)
    return str(digest.hexdigest())


def _version(name: str) -> str | None:
    try:
        return torch.__version__ if name == "torch" else version(name)
    except PackageNotFoundError:
        return None
