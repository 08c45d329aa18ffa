"""Every option with its name, type, default and help. Imports neither torch nor transformers.

Options of ours are the fields of dataclasses made with ``config.setting``. Those of transformers
come from a table per version of it (``transformers-VERSION.json`` beside this file, written by
``transformers_options``): importing transformers takes seconds, which is too long for ``--help``
and for finding a mistyped flag.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import os
import sys
import types
import typing
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from s2s_scale.config import SCHEDULES, Help, TrainingExtras
from s2s_scale.errors import UserError

GROUPS = {
    "output": "output_dir",
    "training": "per_device_train_batch_size num_train_epochs max_steps "
    "gradient_accumulation_steps",
    "learning rate": "learning_rate lr_* warmup_*",
    "optimizer": "optim optim_* weight_decay adam_*",
    "regularization and stability": "average_tokens_across_devices max_grad_norm",
    "loss": "label_smoothing_factor",
    "mixed precision": "bf16* fp16* tf32",
    "activation checkpointing": "activation_checkpointing* gradient_checkpointing*",
    "compilation and kernels": "torch_compile* *liger_kernel*",
    "memory and noise": "use_cache neftune_noise_alpha torch_empty_cache_steps "
    "auto_find_batch_size",
    "batching": "sortish_sampler train_sampling_strategy length_column_name dataloader_drop_last",
    "generation": "predict_with_generate generation_*",
    "what runs": "do_* resume_from_checkpoint local_rank",
    "evaluation": "eval_* per_device_eval_batch_size prediction_loss_only",
    "metrics": "include_for_metrics batch_eval_metrics",
    "checkpoints": "save_* enable_jit_checkpoint load_best_model_at_end metric_for_best_model "
    "greater_is_better ignore_data_skip restore_callback_states_from_checkpoint",
    "logging": "log_* logging_* include_num_input_tokens_seen disable_tqdm",
    "experiment tracking": "report_to run_name project trackio_*",
    "hub integration": "push_to_hub hub_*",
    "reproducibility": "full_determinism seed data_seed",
    "data loader": "dataloader_* remove_unused_columns label_names",
    "devices and processes": "use_cpu accelerator_config ddp_* fsdp* deepspeed",
    "debugging": "debug skip_memory_metrics",
}
"""Group in ``--help`` -> names of transformers' settings in it, or patterns of names. The first
that matches counts; names that none matches are in the group ``other``."""

# Where our own use of an option says more than transformers' text.
HELP_OVERRIDES = {
    "output_dir": "Folder for checkpoints, the trained model, results and the report.",
    "do_train": "Accepted for old scripts: 'train' always trains.",
    "do_eval": "After training, evaluate on the validation split (val_results.json).",
    "do_predict": "After training, evaluate on the test split (test_results.json).",
    "resume_from_checkpoint": (
        "Resume from this checkpoint folder; 'latest': from the newest one; 'auto': likewise, or "
        "start from the beginning if there is none."
    ),
    "sortish_sampler": "Old name of --batching sortish.",
    "deepspeed": "DeepSpeed configuration to use instead of the profile's: a name in ds_configs/, "
    "such as zero2, or the path of a JSON file.",
    "predict_with_generate": "Generate text during evaluation and compute --metrics from it.",
}


@dataclass(frozen=True)
class Option:
    """One setting that the command line and a YAML file accept.

    ``type`` is one of int, float, bool, str, dict, list[int|float|str], or several of them
    joined by ``|``. ``const`` is the value of the flag without a value, None if it needs one.
    ``choices`` are the texts that may be given, None if any value of the type may. ``least`` is
    the smallest number that may be given.
    """

    name: str
    type: str
    default: Any
    help: str
    group: str
    choices: tuple[str, ...] | None = None
    optional: bool = False
    const: Any = None
    aliases: tuple[str, ...] = ()
    required: bool = False
    least: int | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The alternatives in ``type``."""
        return tuple(self.type.split("|"))

    @property
    def is_bool(self) -> bool:
        """Whether true and false are among its values, so that ``--no_name`` makes sense."""
        return "bool" in self.kinds

    @property
    def is_list(self) -> bool:
        """Whether the flag takes one or more values."""
        return any(kind.startswith("list[") for kind in self.kinds)

    @property
    def item_kind(self) -> str:
        """The type of a list's items, such as ``str`` for ``list[str]``."""
        return next(kind[5:-1] for kind in self.kinds if kind.startswith("list["))


def describe_field(entry: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    """Name, type, default, choices, optional and const of a dataclass field, as for ``Option``.

    ``hint`` is the field's evaluated annotation. Enums, paths and configuration objects are
    written as text; the values of an enum are the choices.
    """
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds: list[str] = []
    choices = entry.metadata.get("choices")
    for part in typing.get_args(hint) if union else (hint,):
        origin = typing.get_origin(part) or part
        if part is type(None):
            continue
        if origin is list:
            (item,) = typing.get_args(part)
            kinds.append(f"list[{item.__name__ if item in (int, float, bool) else 'str'}]")
        elif origin in (int, float, bool, dict):
            kinds.append(origin.__name__)
        elif origin is typing.Literal:
            kinds += [type(value).__name__ for value in typing.get_args(part)]
        else:
            kinds.append("str")
            if choices is None and isinstance(part, type) and issubclass(part, enum.Enum):
                choices = [member.value for member in part]
    default = entry.default
    if default is dataclasses.MISSING:
        factory = entry.default_factory
        default = None if factory is dataclasses.MISSING else factory()
    return {
        "name": entry.name,
        "type": "|".join(dict.fromkeys(kinds)),
        "default": default.value if isinstance(default, enum.Enum) else default,
        "choices": None if choices is None else tuple(choices),
        "optional": default is None or type(None) in typing.get_args(hint),
        "const": True if "bool" in kinds else entry.metadata.get("const"),
    }


@functools.cache
def options_of(cls: type) -> list[Option]:
    """The options that a dataclass of ours describes: its fields made by ``config.setting``."""
    hints = typing.get_type_hints(cls)
    return [
        Option(
            **describe_field(entry, hints[entry.name]),
            help=text,
            group=text.group,
            aliases=text.aliases,
            required=text.required,
            least=text.least,
        )
        for entry in dataclasses.fields(cls)
        if isinstance(text := entry.metadata.get("help"), Help)
    ]


@functools.cache
def training_options() -> list[Option]:
    """All training options: transformers' own, seq2seq's, and those of ``TrainingExtras``.

    A name that occurs in both keeps one entry, ours.

    Raises:
        UserError: transformers is not installed, or its settings cannot be read.
    """
    from s2s_scale.utils import package_version  # importlib.metadata would slow down every start

    by_name: dict[str, Option] = {}
    for fields in transformers_table(package_version("transformers")):
        name = fields["name"]
        choices = fields["choices"] and tuple(fields["choices"])
        if name == "lr_scheduler_type":
            choices = tuple(dict.fromkeys((*SCHEDULES, *choices)))
        elif name == "deepspeed":  # the file is named, so that messages about it can say where
            fields = {**fields, "type": "str"}
        groups = (
            group
            for group, patterns in GROUPS.items()
            if any(fnmatchcase(name, pattern) for pattern in patterns.split())
        )
        by_name[name] = Option(
            **{
                **fields,
                "choices": choices,
                "help": HELP_OVERRIDES.get(name, fields["help"]),
                "group": next(groups, "other"),
            }
        )
    by_name |= {entry.name: entry for entry in options_of(TrainingExtras)}
    return list(by_name.values())


def transformers_table(version: str | None) -> list[dict[str, Any]]:
    """The settings of transformers' seq2seq training arguments, one dict per field.

    Read from the table of this version. Where the package has none, a child process imports
    transformers, because here the import would come before the profile's environment is set.

    Raises:
        UserError: transformers is not installed, or cannot be imported.
    """
    if version is None:
        raise UserError("transformers is not installed here; install it: pip install transformers")
    table = Path(__file__).with_name(f"transformers-{version}.json")
    if table.is_file():
        text = table.read_text(encoding="utf-8")
    else:
        import subprocess

        quiet = {"USE_TORCH_XLA": "0", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        here = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "-m", "s2s_scale.settings.transformers_options"],
            env={**os.environ, **quiet, "PYTHONPATH": here.rstrip(os.pathsep)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"transformers {version}: cannot be imported: {reason}; reinstall it")
        text = done.stdout
    return list(json.loads(text))
