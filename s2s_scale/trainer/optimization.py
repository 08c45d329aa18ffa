"""The optimizer over its parameter groups, and the learning-rate schedule."""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from s2s_scale.errors import UserError
from s2s_scale.optim import build_schedule, decay_parameter_names, parameter_groups
from s2s_scale.trainer.loss import LossTrainer

logger = transformers.utils.logging.get_logger(__name__)


class OptimizationTrainer(LossTrainer):
    """Makes optimizer and schedule."""

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Make the optimizer and the schedule, unless they were passed in."""
        self.create_optimizer()
        self.create_scheduler(num_training_steps)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return decay_parameter_names(model)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """The optimizer of ``args.optim`` over groups with and without decay, by the backend."""
        if self.optimizer is not None:
            return self.optimizer
        target: Any = self.model if model is None else model
        groups = parameter_groups(target, self.args.weight_decay)
        if not groups:
            raise UserError(
                "the model has no parameter left to train: everything is frozen; drop "
                "--freeze_encoder or --freeze_embeds"
            )
        optimizer_class, options = self.optimizer_cls_and_kwargs or self._chosen_optimizer(target)
        # GaLore, LOMO and their like bring their own groups or are factories: transformers knows.
        own_groups = {"params", "model", "optimizer_dict"} & set(options)
        if own_groups or not issubclass(optimizer_class, Optimizer):
            return super().create_optimizer(model)
        self.optimizer = self.backend.build_optimizer(optimizer_class, groups, options)
        return self.optimizer

    def _chosen_optimizer(self, model: Any) -> tuple[Any, dict[str, Any]]:
        """Class and keywords of ``args.optim``; ``UserError`` where its package is missing."""
        try:
            return self.get_optimizer_cls_and_kwargs(self.args, model)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"optim={_plain(self.args.optim)}: {_first_line(error)}; expected an optimizer "
                "that is installed here; choose another --optim or install what it needs"
            ) from error

    def create_scheduler(
        self, num_training_steps: int, optimizer: Optimizer | None = None
    ) -> LRScheduler:
        """The schedule over ``num_training_steps`` optimizer steps, unless one was passed in."""
        # Model and optimizer have just been wrapped, and a checkpoint is read after this.
        self.backend.after_prepare(optimizer or self.optimizer)
        if self.lr_scheduler is not None:
            if not self._created_lr_scheduler:
                logger.warning(
                    "A schedule was passed in `optimizers`: lr_scheduler="
                    f"{self.args.schedule_name} and warmup_steps are unused."
                )
            return self.lr_scheduler
        if self.args.schedule_name is None:
            return self._stock_scheduler(num_training_steps, optimizer)
        self.lr_scheduler = self._get_lr_scheduler(num_training_steps, optimizer=optimizer)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _stock_scheduler(self, num_training_steps: int, optimizer: Optimizer | None) -> LRScheduler:
        """A schedule that only transformers knows; ``UserError`` where it lacks its options."""
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"lr_scheduler_type={_plain(self.args.lr_scheduler_type)}: {_first_line(error)}; "
                "give what it needs in --lr_scheduler_kwargs, or choose another --lr_scheduler"
            ) from error

    def _get_lr_scheduler(
        self, num_training_steps: int, *, optimizer: Optimizer | None = None
    ) -> LRScheduler:
        return build_schedule(
            str(self.args.schedule_name),
            optimizer or self.optimizer,
            num_warmup_steps=self.args.get_warmup_steps(num_training_steps),
            num_training_steps=num_training_steps,
            **self.args.schedule_options,
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _plain(choice: Any) -> str:
    """A choice as it is written; transformers keeps its own as enum members."""
    return str(getattr(choice, "value", choice))
