"""Private parts of transformers and torch that the trainer relies on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from s2s_scale.compat import relies_on

TRANSFORMERS = ("5.17", "5.23")
TORCH = ("2.9", "2.13")
_TRAINER = "transformers.Seq2SeqTrainer"

_HOOKS: Mapping[str, Sequence[str]] = {
    "_finalize_training": ("trial", "num_train_samples", "start_time"),
    "_get_grad_norm": ("model", "grad_norm"),
    "_get_num_items_in_batch": ("batch_samples", "device"),
    "_get_train_sampler": ("train_dataset",),
    "_load_best_model": (),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_maybe_log_save_evaluate": (
        *("tr_loss", "grad_norm", "model", "trial", "epoch", "ignore_keys_for_eval"),
        *("start_time", "learning_rate"),
    ),
    "_move_model_to_device": ("model", "device"),
    "_pad_tensors_to_max_len": ("tensor", "max_length"),
    "_prepare_for_training": ("max_steps", "train_dataloader", "resume_from_checkpoint"),
    "_prepare_inputs": ("inputs",),
    "_run_epoch": (
        *("model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch"),
        *("trial", "ignore_keys_for_eval", "start_time", "resume_from_checkpoint"),
        *("epochs_trained", "steps_trained_in_current_epoch"),
    ),
    "_save": ("output_dir", "state_dict"),
    "_save_checkpoint": ("model", "trial"),
}


@relies_on(
    "transformers",
    checked=TRANSFORMERS,
    reason="The training loop has no public hooks at these points.",
    uses={f"{_TRAINER}.{name}": parameters for name, parameters in _HOOKS.items()},
)
def overridden_hooks() -> frozenset[str]:
    """Names of transformers' private methods that ``Seq2SeqTrainer`` overrides."""
    return frozenset(_HOOKS)


@relies_on(
    "transformers",
    checked=TRANSFORMERS,
    reason="The batch size is lowered here by auto_find_batch_size, not in the arguments.",
    uses={f"{_TRAINER}._update_auto_batch_size": ("batch_size",)},
)
def rows_per_micro_batch(trainer: Any) -> int:
    """Rows of this process's micro-batches, where the batching mode counts rows."""
    return int(trainer._train_batch_size)


@relies_on(
    "transformers",
    checked=TRANSFORMERS,
    reason="The loop adds each loss to this tensor in place; a new tensor each time records the "
    "same graph at every step.",
    uses={f"{_TRAINER}._run_epoch": _HOOKS["_run_epoch"]},
)
def renew_loss_sum(trainer: Any) -> None:
    """Replace the sum of losses since the last log by a copy."""
    trainer._tr_loss = trainer._tr_loss.clone()


@relies_on(
    "transformers",
    checked=TRANSFORMERS,
    reason="The hook after a step takes the sum of losses, and the caller must hand it over.",
    uses={f"{_TRAINER}._maybe_log_save_evaluate": _HOOKS["_maybe_log_save_evaluate"]},
)
def loss_sum(trainer: Any) -> torch.Tensor:
    """The sum of losses since the last log, a scalar."""
    found: torch.Tensor = trainer._tr_loss
    return found


@relies_on(
    "transformers",
    checked=TRANSFORMERS,
    reason="A schedule made by the trainer is made anew by each call of train, one passed in "
    "is kept; this flag tells them apart.",
    uses={f"{_TRAINER}.create_scheduler": ("num_training_steps", "optimizer")},
)
def scheduler_is_ours(trainer: Any, made: bool | None = None) -> bool:
    """Whether the trainer made its schedule itself; ``made`` sets it."""
    if made is not None:
        trainer._created_lr_scheduler = made
    return bool(trainer._created_lr_scheduler)


@relies_on(
    "transformers",
    checked=TRANSFORMERS,
    reason="evaluate and predict keep the keywords for generate here, not in the step's arguments.",
    uses={f"{_TRAINER}.evaluate": None, f"{_TRAINER}.predict": None},
)
def generation_keywords(trainer: Any) -> dict[str, Any]:
    """The keywords for ``generate`` of the evaluation that is running; empty outside of one."""
    return dict(getattr(trainer, "_gen_kwargs", {}))


@relies_on(
    "transformers",
    checked=TRANSFORMERS,
    reason="Which columns a model takes depends on label_names and remove_unused_columns.",
    uses={f"{_TRAINER}._remove_unused_columns": ("dataset", "description")},
)
def without_unused_columns(trainer: Any, dataset: Any, use: str) -> Any:
    """A ``datasets.Dataset`` without the columns that the model's forward does not take."""
    return trainer._remove_unused_columns(dataset, description=use)


@relies_on(
    "transformers",
    checked=TRANSFORMERS,
    reason="As above, for data sets that are not a ``datasets.Dataset``.",
    uses={f"{_TRAINER}._get_collator_with_removed_columns": ("data_collator", "description")},
)
def dropping_unused_columns(trainer: Any, collate: Any, use: str) -> Any:
    """A collator that drops what the model's forward does not take from each row first."""
    return trainer._get_collator_with_removed_columns(collate, use)


@relies_on(
    "transformers",
    checked=TRANSFORMERS,
    reason="A hyperparameter search gives each trial a folder of its own.",
    uses={f"{_TRAINER}._get_output_dir": ("trial",)},
)
def checkpoint_dir(trainer: Any, trial: Any) -> Path:
    """Where the checkpoint of this step goes, in the folder of the run or of this trial."""
    return Path(trainer._get_output_dir(trial=trial)) / f"checkpoint-{trainer.state.global_step}"


@relies_on(
    "transformers",
    checked=TRANSFORMERS,
    reason="Pushing a checkpoint to the hub has no public method.",
    uses={f"{_TRAINER}._push_from_checkpoint": ("checkpoint_folder",)},
)
def push_checkpoint(trainer: Any, folder: str) -> None:
    """Push a checkpoint to the hub as ``hub_strategy`` says; rank 0 alone."""
    trainer._push_from_checkpoint(folder)


@relies_on(
    "torch",
    checked=TORCH,
    reason="A schedule can be entered at a step in no other way than by making all steps before.",
    uses={"torch.optim.lr_scheduler.LambdaLR": None},
)
def enter_schedule(schedule: Any, step: int) -> None:
    """Set a ``LambdaLR`` to ``step``, without the optimizer taking any."""
    schedule.last_epoch = step
    schedule._step_count = step + 1
    parts = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    schedule._last_lr = [base * rate(step) for base, rate in parts]


@relies_on(
    "torch",
    checked=TORCH,
    reason="torch.compile runs a function uncompiled past this number of graphs; the setting has "
    "no public name.",
    uses={"torch._dynamo.config.recompile_limit": None},
)
def allow_graphs(count: int) -> None:
    """Let torch.compile keep at least ``count`` graphs of each function."""
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, count)
