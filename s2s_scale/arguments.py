"""``Seq2SeqTrainingArguments``: transformers' arguments joined with ours and the old names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import transformers
from transformers.trainer_utils import IntervalStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from s2s_scale.config import (
    DEFAULT_GROUPS_PER_STEP,
    DEFAULT_TOKENS_PER_STEP,
    LEAST_GROUPS_PER_STEP,
    SCHEDULES,
    STREAM_GROUP_TOKENS,
    TrainingExtras,
    below_least,
)
from s2s_scale.data.batch_plan import Mode
from s2s_scale.errors import UserError, raise_problems, unknown_name
from s2s_scale.generation.ctranslate2 import package_problems
from s2s_scale.optim import OPTIONS

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


class OldName(NamedTuple):
    """An old name of a setting that has a modern one."""

    old: str
    modern: str
    to_modern: Callable[[Any], Any]
    """The modern setting's value that a value of the old one means; None if it means none."""
    to_old: Callable[[Any], Any]


OUR_SCHEDULES = {theirs: ours for ours, theirs in SCHEDULES.items()}
OLD_NAMES = (
    OldName("label_smoothing", "label_smoothing_factor", lambda value: value, lambda value: value),
    OldName(
        "lr_scheduler",
        "lr_scheduler_type",
        lambda name: SCHEDULES.get(name, name),
        lambda name: OUR_SCHEDULES.get(name),
    ),
    OldName(
        "adafactor",
        "optim",
        lambda wanted: "adafactor" if wanted else None,
        lambda name: name == "adafactor",
    ),
    OldName(
        "sortish_sampler",
        "batching",
        lambda wanted: "sortish" if wanted else None,
        lambda mode: mode == "sortish",
    ),
)

# Smallest values of transformers' settings that make sense; what uses them would fail late.
_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "generation_max_length": 1,
    "generation_num_beams": 1,
    "dataloader_num_workers": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
}


@dataclass
class Seq2SeqTrainingArguments(TrainingExtras, transformers.Seq2SeqTrainingArguments):
    """All of transformers' ``Seq2SeqTrainingArguments`` plus ``TrainingExtras``.

    An old name and its modern one (``OLD_NAMES``) mean the same setting: give either. After
    construction both hold the value.

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
        self._resolve_old_names(problems)
        self._resolve_batching(problems)
        self._check_names_and_ranges(problems)
        self._check_schedule(problems)
        self._check_combinations(problems)
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
        return OUR_SCHEDULES.get(SchedulerType(self.lr_scheduler_type).value)

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
        """The mode of a plan by rows: ``batching``, or ``sequential`` if data order was chosen."""
        in_order = self.train_sampling_strategy == "sequential"
        return "sequential" if in_order else cast("Mode", self.batching)

    def batching_by_default(self, mode: str) -> None:
        """Choose ``mode`` of batching, unless a mode or a size that implies one was given.

        To be called by the owner of the data, since some modes need the lengths of all rows.
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
        """Fill in the sizes of a step of 'tokens' that were not given, if lengths are unknown.

        If they are known, the sizes are derived from the data (``trainer.dataloaders``).
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

    def _resolve_old_names(self, problems: list[str]) -> None:
        """Give both names of each setting its value, or the default of transformers."""
        for old, modern, to_modern, to_old in OLD_NAMES:
            given = getattr(self, modern)
            given = getattr(given, "value", given)  # of transformers' enums
            if modern == "lr_scheduler_type":
                given = SCHEDULES.get(given, given)
            meant = to_modern(getattr(self, old))
            if meant is not None and given is not None and meant != given:
                problems.append(_contradiction(old, getattr(self, old), modern, given))
            values = (value for value in (meant, given) if value is not None)
            value = next(values, _HF_DEFAULTS.get(modern))
            setattr(self, modern, value)
            setattr(self, old, to_old(value))

    def _resolve_batching(self, problems: list[str]) -> None:
        """Choose the mode of batching where none was given, and fill in transformers' sizes."""
        strategy = getattr(self, "train_sampling_strategy", "random")
        wants_sorted = strategy == LENGTH_SORTED_STRATEGY
        sizes = {name: getattr(self, name) for name in _HF_SIZES if getattr(self, name) is not None}
        names = dict.fromkeys(name for options in TOKEN_OPTIONS.values() for name in options)
        token_options = {n: getattr(self, n) for n in names if getattr(self, n) is not None}
        own_options = token_options.keys() - set.intersection(*map(set, TOKEN_OPTIONS.values()))
        chosen = self.batching is not None or strategy != "random"
        given = (chosen, sizes, own_options, self.auto_batch, self.auto_find_batch_size)
        self._batches_given = any(map(bool, given))
        if self.batching is None and wants_sorted:
            self.batching = "sortish"
        elif self.batching is None and (token_options or self.auto_batch):
            self.batching = "packed" if "tokens_per_row" in token_options else "tokens"
        elif self.batching is None:
            self.batching = "fixed"
        self.sortish_sampler = self.batching == "sortish"
        # Modes other than 'fixed' choose the order of rows themselves.
        if self.batching != ("sortish" if wants_sorted else "fixed") and strategy != "random":
            problems.append(
                _contradiction("train_sampling_strategy", strategy, "batching", self.batching)
            )
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

    def _check_names_and_ranges(self, problems: list[str]) -> None:
        schedules = {*SCHEDULES, *(member.value for member in SchedulerType)}
        known = {
            "learning-rate schedule": (self.lr_scheduler_type, schedules),
            "optimizer": (self.optim, {member.value for member in OptimizerNames}),
        }
        for entry in dataclasses.fields(TrainingExtras):
            if "choices" in entry.metadata and entry.name != "lr_scheduler":
                known[entry.name] = (getattr(self, entry.name), entry.metadata["choices"])
        problems += [
            str(unknown_name(what, str(name), choices))
            for what, (value, choices) in known.items()
            for name in (value if isinstance(value, list) else [value])
            if name not in choices
        ]
        if not 0.0 <= cast("float", self.label_smoothing) < 1.0:
            problems.append(
                f"label_smoothing={self.label_smoothing}: expected a number of at least 0 and "
                "less than 1; 0.1 is usual"
            )
        for name in ("encoder_layerdrop", "decoder_layerdrop", "dropout", "attention_dropout"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                problems.append(f"{name}={value}: expected a probability from 0 to 1")
        problems += below_least(self)
        problems += [
            f"{name}={value}: expected at least {least}; give --{name} a larger value"
            for name, least in _LEAST.items()
            if (value := getattr(self, name)) is not None and value < least
        ]

    def _check_schedule(self, problems: list[str]) -> None:
        """The options of the schedule must have an effect on it, and be given once."""
        for argument, (keyword, takers) in OPTIONS.items():
            value = getattr(self, argument)
            if value is None:
                continue
            if self.lr_scheduler not in takers:
                problems.append(
                    f"{argument}={value}: has no effect on the schedule "
                    f"'{self.lr_scheduler or self.lr_scheduler_type}'; it is for "
                    f"{' and '.join(takers)}: change --lr_scheduler or leave it out"
                )
            if isinstance(self.lr_scheduler_kwargs, dict) and keyword in self.lr_scheduler_kwargs:
                problems.append(
                    f"{argument}={value} and lr_scheduler_kwargs['{keyword}']="
                    f"{self.lr_scheduler_kwargs[keyword]}: give only one of the two"
                )

    def _check_combinations(self, problems: list[str]) -> None:
        """Settings that would have no effect beside others."""
        if self.auto_batch and self.batching != "tokens":
            problems.append(
                f"auto_batch=True: has no effect with batching={self.batching}; use --batching "
                "tokens, or leave it out"
            )
        if self.auto_batch and self.max_tokens_per_device is not None:
            problems.append(
                f"auto_batch=True and max_tokens_per_device={self.max_tokens_per_device}: the "
                "former finds the value of the latter; give only one of the two"
            )
        if self.max_loss_spikes is not None and self.loss_spike_factor is None:
            problems.append(
                f"max_loss_spikes={self.max_loss_spikes}: has no effect without "
                "--loss_spike_factor; add it, or leave it out"
            )
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
                "average_tokens_across_devices=False: has no effect here, because a step's loss is "
                "always divided by its target tokens on all devices; leave it out"
            )


def _contradiction(old: str, old_value: object, modern: str, modern_value: object) -> str:
    return (
        f"{old}={old_value} and {modern}={modern_value} contradict each other: both name the same "
        "setting; give only one of them"
    )
