"""The seam between core and hardware: what the core asks of a backend, and nothing more.

The core never reads a backend's name. An adapter receives values (a model, optimizer groups),
never the trainer.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torch.optim import Optimizer


class Backend(abc.ABC):
    """Carries a training run onto one kind of hardware."""

    @abc.abstractmethod
    def problems(self) -> Sequence[str]:
        """What stops this backend on this machine, one line with its remedy each; empty if nothing.

        Called before data is read or a model is loaded.
        """

    @abc.abstractmethod
    def prepare_process(self) -> None:
        """Set environment switches and process groups. Every rank calls it once, first of all."""

    @property
    @abc.abstractmethod
    def data_rank(self) -> int:
        """Which share of each step's rows this process takes, from 0."""

    @property
    @abc.abstractmethod
    def data_world_size(self) -> int:
        """Into how many shares each step's rows are divided."""

    @abc.abstractmethod
    def build_optimizer(
        self,
        optimizer_class: type[Optimizer],
        groups: list[dict[str, Any]],
        options: Mapping[str, Any],
    ) -> Optimizer:
        """The optimizer over ``groups``. Every rank calls it, with the same groups."""

    @abc.abstractmethod
    def generation(self, model: nn.Module) -> AbstractContextManager[Mapping[str, Any]]:
        """Context in which ``model.generate`` may run; gives extra keywords for ``generate``.

        Every rank enters it for every batch.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Release process groups. Every rank calls it once, last of all, errors included."""
