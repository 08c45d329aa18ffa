"""Reads DeepSpeed configurations, and finds where they contradict the training flags.

Imports no DeepSpeed: the launcher checks a configuration before anything is started.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from s2s_scale.config import SCHEDULES
from s2s_scale.errors import UserError

AUTO = "auto"
ZERO_STAGES = (0, 1, 2, 3)

# Key in the configuration -> flag that decides the same.
SAME_AS_FLAG = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "bf16.enabled": "bf16",
    "fp16.enabled": "fp16",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler.params.warmup_max_lr": "learning_rate",
    "scheduler.params.warmup_num_steps": "warmup_steps",
    "scheduler.params.total_num_steps": "max_steps",
}
DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_grad_norm": 1.0,
    "bf16": False,
    "fp16": False,
    "learning_rate": 5e-5,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "weight_decay": 0.0,
    "warmup_steps": 0,
    "max_steps": -1,
    "optim": "adamw_torch_fused",
    "lr_scheduler_type": "linear",
}
# Type of DeepSpeed's schedule -> the same one in transformers.
SAME_SCHEDULES = {"WarmupDecayLR": "linear", "WarmupLR": "constant_with_warmup"}


def read_config(path: Path) -> dict[str, Any]:
    """The configuration in a JSON file.

    Raises:
        UserError: unreadable; not valid JSON, with line and column; an invalid ZeRO stage.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a DeepSpeed configuration") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}; correct it there"
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object with DeepSpeed's settings")
    stage = _lookup(config, "zero_optimization.stage")
    if stage not in (None, *ZERO_STAGES) or isinstance(stage, bool):
        raise UserError(
            f"{path}: zero_optimization.stage: expected 0, 1, 2 or 3, got {json.dumps(stage)}"
        )
    return config


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"'{key}' is given twice; keep one")
        seen[key] = value
    return seen


def zero_stage(config: Mapping[str, Any]) -> int:
    """The ZeRO stage, 0 where none is given."""
    return int(dict(config.get("zero_optimization") or {}).get("stage") or 0)


def offloads_optimizer(config: Mapping[str, Any]) -> bool:
    """Whether optimizer state is kept in host memory."""
    zero = config.get("zero_optimization") or {}
    return dict(zero.get("offload_optimizer") or {}).get("device", "none") != "none"


def update_can_wait(config: Mapping[str, Any]) -> bool:
    """Whether the update is that of plain ZeRO, which can wait until the gradients are checked.

    Others update in pieces during the backward pass, or by an optimizer of their own.
    """
    zero, stage = dict(config.get("zero_optimization") or {}), zero_stage(config)
    offload, data_types = zero.get("offload_optimizer") or {}, config.get("data_types") or {}
    in_pieces = zero.get("zenflow") or offload.get("super_offload")
    bf16_optimizer = stage == 1 and data_types.get("grad_accum_dtype") == "fp32"
    return stage > 0 and not in_pieces and not bf16_optimizer


def without_sections_of_flags(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without ``optimizer`` and ``scheduler``, which are built from the flags.

    ``contradictions`` has made sure that both agree.
    """
    kept = {name: copy.deepcopy(value) for name, value in config.items()}
    kept.pop("optimizer", None)
    kept.pop("scheduler", None)
    return kept


def contradictions(
    config: Mapping[str, Any], values: Mapping[str, Any], *, world_size: int | None = None
) -> list[str]:
    """One line for each value in ``config`` that differs from what the training flags say.

    Adafactor under ZeRO is one too: see docs/explanation/decisions.md.

    Args:
        values: training arguments that were given; others have their defaults.
        world_size: number of processes, if it is known; ``train_batch_size`` depends on it.
    """
    flags = {**DEFAULTS, **{name: value for name, value in values.items() if value is not None}}
    schedule = _plain(flags.get("lr_scheduler", flags["lr_scheduler_type"]))
    schedule = SCHEDULES.get(schedule, schedule)
    optim, stage = _plain(flags["optim"]), zero_stage(config)
    if stage and (flags.get("adafactor") or optim == "adafactor"):
        return [
            f"--adafactor (--optim adafactor): ZeRO {stage} keeps flat pieces of the parameters, "
            "but Adafactor needs whole matrices, so its results would differ; use --optim "
            "adamw_torch, or a profile such as cpu-oss or gpu-oss"
        ]
    # (key in the configuration, its value, flags, their value)
    pairs: list[tuple[str, Any, str, Any]] = [
        (key, _lookup(config, key), f"--{name}", flags[name]) for key, name in SAME_AS_FLAG.items()
    ]
    kind = _lookup(config, "optimizer.type")
    if kind is not None:
        same = str(kind).lower() in ("adam", "adamw") and optim.startswith("adamw")
        betas = _lookup(config, "optimizer.params.betas")
        flag_betas = [flags["adam_beta1"], flags["adam_beta2"]]
        pairs += [
            ("optimizer.type", None if same else kind, "--optim", optim),
            ("optimizer.params.betas", betas, "--adam_beta1 and --adam_beta2", flag_betas),
        ]
    kind = _lookup(config, "scheduler.type")
    if kind is not None:
        # DeepSpeed's warm-up is logarithmic unless the type says otherwise; ours is linear.
        linear = _lookup(config, "scheduler.params.warmup_type") == "linear"
        same = SAME_SCHEDULES.get(str(kind)) == schedule
        same = same and (linear or not float(flags["warmup_steps"]))
        shown = kind if linear else f"{kind} with a logarithmic warm-up"
        start = _lookup(config, "scheduler.params.warmup_min_lr")
        pairs += [
            ("scheduler.type", None if same else shown, "--lr_scheduler", schedule),
            ("scheduler.params.warmup_min_lr", start, "the start of every schedule's warm-up", 0),
        ]
    if world_size is not None:
        rows = flags["per_device_train_batch_size"] * flags["gradient_accumulation_steps"]
        given = "--per_device_train_batch_size x --gradient_accumulation_steps x processes"
        pairs.append(("train_batch_size", config.get("train_batch_size"), given, rows * world_size))
    return [
        f'{key} is {value}, but {flag} is {other}; write "auto" there or leave it out, or change '
        "the flag"
        for key, value, flag, other in pairs
        if value not in (None, AUTO) and not _same(value, other)
    ]


def _plain(choice: Any) -> str:
    """A choice as text; transformers keeps its own as enum members."""
    return str(getattr(choice, "value", choice))


def _lookup(config: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key, or None."""
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    try:
        return float(one) == float(other)
    except (TypeError, ValueError):
        return bool(one == other)
