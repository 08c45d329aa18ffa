"""The seam between core and hardware: what the core asks of a backend, and nothing more.

The core never reads a backend's name. An adapter receives values (a model, optimizer groups),
never the trainer.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

T = TypeVar("T")


class Backend(abc.ABC):
    """Carries a training run onto one kind of hardware."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    @abc.abstractmethod
    def problems(self) -> Sequence[str]:
        """What stops this backend on this machine, one line with its remedy each; empty if nothing.

        Called before data is read or a model is loaded.
        """

    @abc.abstractmethod
    def prepare_process(self) -> None:
        """Set environment switches and process groups. Every rank calls it once, first of all."""

    @abc.abstractmethod
    def training_overrides(self, values: Mapping[str, Any], *, trains: bool) -> dict[str, Any]:
        """The training arguments in ``values`` as this backend needs them, before the model loads.

        Args:
            values: name -> value of every training argument that was given.
            trains: whether an optimizer will be made; False where a model is only evaluated.

        Raises:
            UserError: values that contradict each other or this backend.
        """

    @property
    @abc.abstractmethod
    def data_rank(self) -> int:
        """Which share of each step's rows this process takes, from 0; 0 also writes the files."""

    @property
    @abc.abstractmethod
    def data_world_size(self) -> int:
        """Into how many shares each step's rows are divided."""

    @abc.abstractmethod
    def total(self, value: Tensor) -> Tensor:
        """``value`` summed over all ranks, on every rank. Every rank must call it."""

    @abc.abstractmethod
    def gather_rows(self, rows: Tensor, padding: int) -> Tensor:
        """All ranks' ``rows`` [B, T], rank after rank: [ranks * B, longest T], on every rank.

        Every rank must call it with the same B; T may differ, shorter rows are padded on the right.
        """

    @abc.abstractmethod
    def gather_objects(self, value: T) -> list[T]:
        """Every rank's ``value``, in the order of ranks, on every rank. Every rank must call it."""

    @abc.abstractmethod
    def main_first(self) -> AbstractContextManager[None]:
        """Context that rank 0 runs through before the others enter. Every rank must enter it."""

    @abc.abstractmethod
    def build_optimizer(
        self,
        optimizer_class: type[Optimizer],
        groups: list[dict[str, Any]],
        options: Mapping[str, Any],
    ) -> Optimizer:
        """The optimizer over ``groups``. Every rank calls it, with the same groups."""

    @abc.abstractmethod
    def after_prepare(self, optimizer: Optimizer) -> None:
        """Tie the ``optimizer`` of ``build_optimizer`` to what the trainer has wrapped it in.

        Called on every rank before the first step, and before a checkpoint is read.
        """

    @abc.abstractmethod
    def whole_state(self, optimizer: Any) -> AbstractContextManager[None]:
        """Context in which rank 0 can save ``optimizer.state_dict()``; every rank must enter it."""

    @abc.abstractmethod
    def full_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Name -> whole fp32 weight on the CPU, on rank 0; empty on the others.

        ``model`` is the trainer's, not what it was wrapped in. Every rank must call it.
        """

    @abc.abstractmethod
    def generation(self, model: nn.Module) -> AbstractContextManager[Mapping[str, Any]]:
        """Context in which ``model.generate`` may run; gives extra keywords for ``generate``.

        Every rank enters it for every batch.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Release process groups. Every rank calls it once, last of all, errors included."""
