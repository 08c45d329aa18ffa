"""The seam between core and hardware: what the core asks of a backend, and nothing more.

The core never reads a backend's name. An adapter receives values (a model, optimizer groups),
never the trainer.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from s2s_scale.backends.collectives import Collectives, TorchCollectives

T = TypeVar("T")
Batch = Mapping[str, Any]


class ParameterState(NamedTuple):
    """What training knows of one parameter, whole and in host memory.

    ``weight``: in fp32 where the optimizer updates it in fp32, else as the model holds it; None
    where it is not at hand. ``moments``: the optimizer's state, name -> tensor or number; empty
    for a frozen parameter and before the first step.
    """

    name: str
    weight: Tensor | None
    moments: Mapping[str, Tensor | int | float]


class ReadState(Protocol):
    """Reads the saved state of a parameter by its name; parts that are not wanted are not read."""

    def __call__(
        self, name: str, *, weight: bool = True, moments: bool = True
    ) -> ParameterState: ...


class Backend(abc.ABC):
    """Carries a training run onto one kind of hardware.

    Args:
        device: cpu, cuda or tpu.
        mesh: axis -> number of devices, for backends that lay devices out in a mesh.
    """

    def __init__(self, device: str = "cpu", mesh: Mapping[str, int] | None = None) -> None:
        self.device = device
        self.mesh_shape = dict(mesh or {})

    @property
    def collectives(self) -> Collectives:
        """Communication between the ranks, whose process group may be made at any time."""
        return TorchCollectives(self.device) if dist.is_initialized() else Collectives()

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
    def static_shapes(self) -> bool:
        """Whether batches should repeat a few shapes, because each new shape costs a compilation.

        Values on the device are then also costly to read: they are read where a log is due, and
        nowhere in between.
        """

    @property
    @abc.abstractmethod
    def rows_multiple(self) -> int:
        """Devices that divide one process's batch by rows; its rows are a multiple of this."""

    @property
    @abc.abstractmethod
    def averaged_ranks(self) -> int:
        """Over how many ranks gradients are averaged; 1 where they are summed."""

    @abc.abstractmethod
    def set_accumulation(self, args: Any, micro_batches: int) -> None:
        """Make ``micro_batches`` a step's number of them in the training arguments ``args``.

        Called on every rank once the data are known, before the model is wrapped.
        """

    @abc.abstractmethod
    def place_model(self, model: nn.Module) -> None:
        """Move ``model`` to the device and lay out its weights, where the trainer should not.

        Called once per trainer on every rank, before an optimizer is made.
        """

    @abc.abstractmethod
    def place_batch(self, batch: Batch) -> Batch:
        """The batch's tensors where the model needs them; rows as the backend divides them."""

    @abc.abstractmethod
    def place_batches(self, batches: Iterator[tuple[int, Batch]]) -> Iterator[tuple[int, Batch]]:
        """The same pairs of a number and a batch, each batch placed as by ``place_batch``.

        Reads ahead of the training step, in a thread of its own.
        """

    @abc.abstractmethod
    def autocast(self) -> AbstractContextManager[None]:
        """Context of the forward pass, where mixed precision is the backend's affair."""

    @property
    @abc.abstractmethod
    def tries_batches(self) -> bool:
        """Whether a forward and a backward pass before training tell what training will need."""

    @abc.abstractmethod
    def use_own_functions(self, wanted: bool, *, in_place: bool) -> None:
        """Let training's forward passes use functions of ours where those are faster.

        Called by each trainer before training; ``wanted`` False: the next one's use torch's.
        ``in_place``: gradients may be added to ``.grad`` as they are found, since nothing but the
        trainer asks for them.
        """

    @abc.abstractmethod
    def start_training(self, model: nn.Module, optimizer: Any, *, accumulation: int) -> None:
        """Called on every rank after weights and optimizer state are loaded, before a step.

        ``accumulation``: micro-batches per step.
        """

    @abc.abstractmethod
    def finish_micro_batch(self, model: nn.Module, *, last: bool) -> None:
        """Called on every rank after a backward pass; ``last``: the step's last one."""

    @abc.abstractmethod
    def finish_step(self, model: nn.Module) -> None:
        """Called on every rank after the optimizer's step and the clearing of gradients."""

    @abc.abstractmethod
    def flush(self) -> None:
        """Run what was recorded and not yet run, so that later operations begin anew."""

    @property
    @abc.abstractmethod
    def can_skip_update(self) -> bool:
        """Whether an update is made after ``skip_update_where``, which then can keep it away."""

    @abc.abstractmethod
    def skip_update_where(self, optimizer: Any, bad: Tensor) -> Tensor:
        """Make the next ``optimizer.step`` change nothing if ``bad`` is true on any rank.

        ``bad`` is a bool scalar. Returns the same for all ranks. Every rank must call it.
        """

    @abc.abstractmethod
    def revert_step_count(self, optimizer: Any, count: int) -> None:
        """Take back ``count`` steps that were dropped from what the optimizer counts itself.

        Only where ``skip_update_where`` cannot keep it from counting.
        """

    @abc.abstractmethod
    def compilations(self) -> tuple[int, float]:
        """Graphs compiled by this process so far and the seconds that took; (0, 0.0) if none."""

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
    def consolidated_state(self, optimizer: Any) -> AbstractContextManager[None]:
        """Context in which rank 0 can save ``optimizer.state_dict()``; every rank must enter it."""

    @abc.abstractmethod
    def whole_shapes(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape of the whole parameter, on every rank."""

    @abc.abstractmethod
    def writers(self, model: nn.Module, optimizer: Any) -> dict[str, int]:
        """Parameter name -> rank that has least to fetch for saving it, or else equal shares.

        The same on every rank.
        """

    @abc.abstractmethod
    def state(
        self, model: nn.Module, optimizer: Any, writers: Mapping[str, int] | None = None
    ) -> Iterator[ParameterState]:
        """The state of every parameter, one after the other, in the order of the model.

        On the rank that ``writers`` say for it, rank 0 where they do not; on the others each item
        has the name alone. Without an ``optimizer`` there are weights alone. ``model`` is the
        trainer's, not what it was wrapped in. Tensors are valid until training goes on. Every rank
        must read the stream to its end.
        """

    @abc.abstractmethod
    def load_state(
        self, model: nn.Module, optimizer: Any, read: ReadState, *, moments: bool = True
    ) -> None:
        """Put what ``read`` gives into ``model`` and ``optimizer``; any backend may have saved it.

        Called on every rank after ``after_prepare``; each rank reads what it needs. With
        ``moments=False`` only weights are loaded. Learning rates are left as they are.

        Raises:
            UserError: this backend cannot hold the saved state.
        """

    @abc.abstractmethod
    def loss_scale(self, optimizer: Any, scaler: Any) -> dict[str, float] | None:
        """``scale`` and ``good_steps`` (since it last changed) of fp16's loss scaler, if any.

        ``scaler``: the trainer's gradient scaler, or None.
        """

    @abc.abstractmethod
    def load_loss_scale(self, optimizer: Any, scaler: Any, values: Mapping[str, float]) -> None:
        """Put back what ``loss_scale`` gave, under this or another backend."""

    @abc.abstractmethod
    def seed(self, value: int) -> None:
        """Seed every random generator that a training step draws from; ``value`` is below 2**63."""

    @abc.abstractmethod
    def full_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Name -> whole fp32 weight on the CPU, on rank 0; empty on the others.

        ``model`` is the trainer's, not what it was wrapped in. Every rank must call it.
        """

    @abc.abstractmethod
    def weights_to_save(self, model: nn.Module) -> dict[str, Tensor] | None:
        """``model.state_dict()`` in CPU tensors; None where the trainer's own way will do.

        Tied weights stay one tensor. Every rank must call it.
        """

    @abc.abstractmethod
    def generation(self, model: nn.Module) -> AbstractContextManager[Mapping[str, Any]]:
        """Context in which ``model.generate`` may run; gives extra keywords for ``generate``.

        Every rank enters it for every batch.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Release process groups. Every rank calls it once, last of all, errors included."""
