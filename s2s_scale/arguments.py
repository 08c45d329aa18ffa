"""``Seq2SeqTrainingArguments``: transformers' arguments joined with ours and the old names."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, cast

import transformers
from transformers.trainer_utils import IntervalStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from s2s_scale.config import (
    BAD_STEPS,
    BATCHING_MODES,
    CHANGES,
    CHECKPOINT_FORMATS,
    CPU_FUNCTIONS,
    DEFAULT_GROUPS_PER_STEP,
    DEFAULT_TOKENS_PER_STEP,
    GENERATION_ENGINES,
    LEAST_GROUPS_PER_STEP,
    LINEAR_CROSS_ENTROPY,
    LOSS_REDUCTIONS,
    STREAM_GROUP_TOKENS,
    TrainingExtras,
)
from s2s_scale.data.batch_plan import Mode
from s2s_scale.errors import UserError, raise_problems, unknown_name
from s2s_scale.generation.engines import package_problems
from s2s_scale.optim import MODERN_NAMES, OPTIONS

_HF_DEFAULTS = {
    f.name: f.default
    for f in dataclasses.fields(transformers.Seq2SeqTrainingArguments)
    if f.default is not dataclasses.MISSING
}

TOKEN_OPTIONS = {
    "tokens": ("tokens_per_step", "groups_per_step", "max_tokens_per_device"),
    "packed": ("tokens_per_step", "tokens_per_row", "max_tokens_per_device"),
}
"""Modes whose steps have a budget of tokens, and the options of each."""
_HF_SIZES = ("per_device_train_batch_size", "gradient_accumulation_steps")
LENGTH_SORTED_STRATEGY = "group_by_length"


@dataclass
class Seq2SeqTrainingArguments(TrainingExtras, transformers.Seq2SeqTrainingArguments):
    """All of transformers' ``Seq2SeqTrainingArguments`` plus ``TrainingExtras``.

    An old name (``label_smoothing``, ``lr_scheduler``, ``adafactor``, ``sortish_sampler``) and its
    modern twin (``label_smoothing_factor``, ``lr_scheduler_type``, ``optim``, ``batching``) mean
    the same setting: give either. After construction both hold the value.

    Raises:
        UserError: (a ``ValueError``) both were given with different values, a value is out of
            range, or a setting could have no effect. All problems are listed at once.
    """

    # Re-declared with None so that "not given" can be told from "given with the default value".
    label_smoothing_factor: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Label smoothing epsilon, in [0, 1). Default: 0.0."}
    )
    lr_scheduler_type: SchedulerType | str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Learning-rate schedule. Default: linear."}
    )
    optim: OptimizerNames | str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Optimizer. Default: AdamW, fused where torch has it."}
    )

    per_device_train_batch_size: int = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Rows of a device's micro-batch. Default: 8."}
    )
    gradient_accumulation_steps: int = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Micro-batches of a step on each device. Default: 1."}
    )

    def __post_init__(self) -> None:
        problems: list[str] = []
        self._resolve_label_smoothing(problems)
        self._resolve_schedule(problems)
        self._resolve_optimizer(problems)
        self._resolve_batching(problems)
        self._check_auto_batch(problems)
        self._check_ranges(problems)
        self._check_checkpoints(problems)
        raise_problems(problems)
        super().__post_init__()
        if self.schedule_name == "constant" and self.warmup_steps:
            raise UserError(
                f"warmup_steps={self.warmup_steps}: the schedule 'constant' has no warm-up; "
                "use --lr_scheduler constant_w_warmup, or leave --warmup_steps out"
            )

    @classmethod
    def from_transformers(cls, args: transformers.TrainingArguments) -> Seq2SeqTrainingArguments:
        """The same settings as transformers' ``TrainingArguments``, with ours at their defaults."""
        known = {f.name for f in dataclasses.fields(cls) if f.init}
        values = {
            f.name: getattr(args, f.name)
            for f in dataclasses.fields(args)
            if f.init and f.name in known
        }
        return cls(**values)

    @property
    def evaluates_while_training(self) -> bool:
        """Whether ``eval_strategy`` asks for evaluations between training steps."""
        return IntervalStrategy(self.eval_strategy) != IntervalStrategy.NO

    @property
    def schedule_name(self) -> str | None:
        """The schedule's name in ``arg_to_scheduler``; None for one that only transformers has."""
        modern = SchedulerType(self.lr_scheduler_type).value
        return next((ours for ours, theirs in MODERN_NAMES.items() if theirs == modern), None)

    @property
    def schedule_options(self) -> dict[str, Any]:
        """Keywords for the schedule: from ``lr_scheduler_kwargs`` and our own flags."""
        options = dict(cast("dict[str, Any]", self.lr_scheduler_kwargs) or {})
        for argument, (keyword, _) in OPTIONS.items():
            if getattr(self, argument) is not None:
                options[keyword] = getattr(self, argument)
        return options

    @property
    def plan_mode(self) -> Mode:
        """The mode of a plan by rows: ``batching``, or data order where that was asked for."""
        in_order = self.train_sampling_strategy == "sequential"
        return "sequential" if in_order else cast("Mode", self.batching)

    def batching_by_default(self, mode: str) -> None:
        """Choose ``mode`` of batching unless a mode was given, or a size that only some modes take.

        For whoever knows the data: their lengths must be at hand.
        """
        if not self._batches_given:
            self.batching = mode

    def set_accumulation(self, micro_batches: int) -> None:
        """Make a step consist of ``micro_batches``, before the model is wrapped."""
        self.gradient_accumulation_steps = micro_batches
        deepspeed = getattr(self, "hf_deepspeed_config", None)
        if deepspeed is not None:
            # It was completed from the arguments when they were made; DeepSpeed checks the product.
            config = deepspeed.config
            config["gradient_accumulation_steps"] = micro_batches
            config["train_batch_size"] = (
                config["train_micro_batch_size_per_gpu"] * micro_batches * self.world_size
            )

    def settle_token_sizes(self) -> None:
        """Fill in the sizes of a step of 'tokens' that are left open, where no lengths are known.

        Where they are, the data decide (``trainer.dataloaders``).
        """
        if self.batching != "tokens":
            return
        self.tokens_per_step = self.tokens_per_step or DEFAULT_TOKENS_PER_STEP
        if self.groups_per_step is None:
            few = max(LEAST_GROUPS_PER_STEP, self.tokens_per_step // STREAM_GROUP_TOKENS)
            self.groups_per_step = min(DEFAULT_GROUPS_PER_STEP, few)

    @property
    def plan_seed(self) -> int:
        """Seed of the batch plan."""
        return int(self.seed if self.data_seed is None else self.data_seed)

    def _resolve_label_smoothing(self, problems: list[str]) -> None:
        old, modern = self.label_smoothing, self.label_smoothing_factor
        if old is not None and modern is not None and old != modern:
            problems.append(_twins("label_smoothing", old, "label_smoothing_factor", modern))
        value = next((v for v in (old, modern) if v is not None), 0.0)
        if not 0.0 <= value < 1.0:
            problems.append(
                f"label_smoothing={value}: expected a number from 0 up to, not including, 1; "
                "0.1 is usual"
            )
        self.label_smoothing = self.label_smoothing_factor = value

    def _resolve_schedule(self, problems: list[str]) -> None:
        old, modern = self.lr_scheduler, self.lr_scheduler_type
        if modern is not None:
            modern = modern.value if isinstance(modern, SchedulerType) else str(modern)
        valid = {*MODERN_NAMES, *(s.value for s in SchedulerType)}
        unknown = {name for name in (old, modern) if name is not None and name not in valid}
        problems += [
            str(unknown_name("learning-rate schedule", name, valid)) for name in sorted(unknown)
        ]
        if unknown:
            return
        as_modern = [MODERN_NAMES.get(name, name) for name in (old, modern) if name is not None]
        if len(set(as_modern)) > 1:
            problems.append(_twins("lr_scheduler", old, "lr_scheduler_type", modern))
        name = as_modern[0] if as_modern else str(_HF_DEFAULTS["lr_scheduler_type"])
        self.lr_scheduler_type = name
        ours = next((o for o, theirs in MODERN_NAMES.items() if theirs == name), None)
        self.lr_scheduler = ours
        for argument, (keyword, takers) in OPTIONS.items():
            value = getattr(self, argument)
            if value is None:
                continue
            if ours not in takers:
                problems.append(
                    f"{argument}={value}: has no effect on the schedule '{ours or name}'; it is "
                    f"for {' and '.join(takers)}: change --lr_scheduler or leave it out"
                )
            if isinstance(self.lr_scheduler_kwargs, dict) and keyword in self.lr_scheduler_kwargs:
                problems.append(
                    f"{argument}={value} and lr_scheduler_kwargs['{keyword}']="
                    f"{self.lr_scheduler_kwargs[keyword]}: give one of the two"
                )

    def _resolve_optimizer(self, problems: list[str]) -> None:
        name = self.optim.value if isinstance(self.optim, OptimizerNames) else self.optim
        valid = [o.value for o in OptimizerNames]
        if name is not None and name not in valid:
            problems.append(str(unknown_name("optimizer", name, valid)))
        if self.adafactor and name not in (None, "adafactor"):
            problems.append(_twins("adafactor", True, "optim", name))
        if self.adafactor:
            name = "adafactor"
        self.optim = name if name is not None else cast("str", _HF_DEFAULTS["optim"])
        self.adafactor = self.optim == "adafactor"

    def _resolve_batching(self, problems: list[str]) -> None:
        if self.batching is not None and self.batching not in BATCHING_MODES:
            problems.append(str(unknown_name("batching", self.batching, BATCHING_MODES)))
        strategy = getattr(self, "train_sampling_strategy", "random")
        sizes = {name: getattr(self, name) for name in _HF_SIZES if getattr(self, name) is not None}
        names = dict.fromkeys(name for options in TOKEN_OPTIONS.values() for name in options)
        token_options = {n: getattr(self, n) for n in names if getattr(self, n) is not None}
        wants_sorted = self.sortish_sampler or strategy == LENGTH_SORTED_STRATEGY
        if wants_sorted and self.batching not in (None, "sortish"):
            old = "sortish_sampler" if self.sortish_sampler else "train_sampling_strategy"
            problems.append(_twins(old, getattr(self, old), "batching", self.batching))
        chosen = self.batching is not None or wants_sorted or strategy != "random"
        own_options = token_options.keys() - set.intersection(*map(set, TOKEN_OPTIONS.values()))
        given = (chosen, sizes, own_options, self.auto_batch, self.auto_find_batch_size)
        self._batches_given = any(map(bool, given))
        if self.batching is None:
            by_tokens = "packed" if "tokens_per_row" in token_options else "tokens"
            by_default = by_tokens if token_options or self.auto_batch else "fixed"
            self.batching = "sortish" if wants_sorted else by_default
        fits = strategy == "random" or (strategy == LENGTH_SORTED_STRATEGY and wants_sorted)
        if self.batching in ("sortish", *TOKEN_OPTIONS) and not fits:
            problems.append(_twins("train_sampling_strategy", strategy, "batching", self.batching))
        if self.batching in TOKEN_OPTIONS:
            unused = sizes | ({"auto_find_batch_size": True} if self.auto_find_batch_size else {})
            own = TOKEN_OPTIONS[self.batching]
            unused |= {name: value for name, value in token_options.items() if name not in own}
            remedy = f"use {' and '.join(f'--{name}' for name in own)} instead"
        else:
            unused, remedy = token_options, "use --batching tokens, or leave it out"
        problems += [
            f"{name}={value}: has no effect with batching={self.batching}; {remedy}"
            for name, value in unused.items()
        ]
        for name in _HF_SIZES:
            if getattr(self, name) is None:
                setattr(self, name, _HF_DEFAULTS[name])
        self.sortish_sampler = self.batching == "sortish"

    def _check_auto_batch(self, problems: list[str]) -> None:
        if self.auto_batch and self.batching != "tokens":
            problems.append(
                f"auto_batch=True: has no effect with batching={self.batching}; use --batching "
                "tokens, or leave it out"
            )
        if self.auto_batch and self.max_tokens_per_device is not None:
            problems.append(
                f"auto_batch=True and max_tokens_per_device={self.max_tokens_per_device}: the "
                "first finds what the second says; give one of the two"
            )

    def _check_checkpoints(self, problems: list[str]) -> None:
        if self.checkpoint_format not in CHECKPOINT_FORMATS:
            names = CHECKPOINT_FORMATS
            problems.append(str(unknown_name("checkpoint format", self.checkpoint_format, names)))
        problems += [
            str(unknown_name("change", name, CHANGES))
            for name in self.accept_changes or ()
            if name not in CHANGES
        ]
        if self.max_loss_spikes is not None and self.loss_spike_factor is None:
            problems.append(
                f"max_loss_spikes={self.max_loss_spikes}: has no effect without "
                "--loss_spike_factor; add it, or leave it out"
            )
        if self.save_in_background and self.checkpoint_format == "native":
            problems.append(
                "save_in_background=True: has no effect with checkpoint_format=native; use "
                "--checkpoint_format portable, or leave it out"
            )

    def _check_ranges(self, problems: list[str]) -> None:
        for name in ("encoder_layerdrop", "decoder_layerdrop", "dropout", "attention_dropout"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                problems.append(f"{name}={value}: expected a probability from 0 to 1")
        problems += [
            str(unknown_name(name, getattr(self, name), known))
            for name, known in (
                ("loss_reduction", LOSS_REDUCTIONS),
                ("on_bad_step", BAD_STEPS),
                ("linear_cross_entropy", LINEAR_CROSS_ENTROPY),
                ("generation_engine", GENERATION_ENGINES),
                ("cpu_functions", CPU_FUNCTIONS),
            )
            if getattr(self, name) not in known
        ]
        problems += [
            f"{name}={value}: expected at least {least}; give --{name} a larger value"
            for name, least in _LEAST.items()
            if (value := getattr(self, name)) is not None and value < least
        ]
        if self.generation_engine == "ctranslate2":
            problems += package_problems()
            if not self.predict_with_generate:
                problems.append(
                    "generation_engine=ctranslate2: has no effect without predict_with_generate; "
                    "give --predict_with_generate, or leave it out"
                )
        if self.eval_tokens_per_device is not None and self.num_buckets is not None:
            problems.append(
                f"eval_tokens_per_device={self.eval_tokens_per_device}: has no effect with "
                f"num_buckets={self.num_buckets}, which pads every evaluation batch to "
                "--per_device_eval_batch_size rows; leave one of them out"
            )
        if not self.average_tokens_across_devices:
            problems.append(
                "average_tokens_across_devices=False: has no effect here, a step's loss is always "
                "divided by its target tokens on all devices; leave it out"
            )


_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "tokens_per_step": 1,
    "groups_per_step": 1,
    "max_tokens_per_device": 1,
    "tokens_per_row": 1,
    "eval_tokens_per_device": 1,
    "num_buckets": 1,
    "generation_max_length": 1,
    "generation_num_beams": 1,
    "dataloader_num_workers": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "max_nonfinite_steps": 1,
    "loss_spike_factor": 1,
    "max_loss_spikes": 1,
    "fault_timeout_seconds": 0,
    "grace_seconds": 0,
    "max_compilations": 1,
}
"""Smallest values that make sense, checked here because what uses them would fail late."""


def _twins(old: str, old_value: object, modern: str, modern_value: object) -> str:
    return (
        f"{old}={old_value} and {modern}={modern_value} contradict each other: both name the same "
        "setting; give only one of them"
    )
