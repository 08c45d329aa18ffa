"""The seam between the core and the hardware: what the core asks of a backend, and nothing more.

``Backend`` itself is plain torch: one process on a CPU or GPU, or one per device under
DistributedDataParallel. An adapter for other hardware or another library overrides what differs.
The core never reads a backend's name; an adapter receives values (a model, optimizer groups),
never the trainer.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from s2s_scale.backends.collectives import Collectives, TorchCollectives
from s2s_scale.backends.compat import dynamo_compilations
from s2s_scale.cpu import CpuFunctions, keep_freed_memory
from s2s_scale.data.prefetch import prefetch

Batch = Mapping[str, Any]

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher sets for each rank; torch reads them to form the process group."""

LAST_COLLECTIVES_SECONDS = 0.2


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


class Backend:
    """Base class of all backends; runs training with plain PyTorch, alone or under DDP.

    Args:
        device: type of the devices, such as cpu, cuda or tpu.
        mesh: axis -> number of devices, for backends that lay devices out in a mesh.
    """

    name = "local"
    """As profiles name it; for records alone."""

    static_shapes = False
    """Whether batches should repeat a few shapes, because each new shape costs a compilation.

    Values on the device are then also costly to read: they are read where a log is due, and nowhere
    in between.
    """

    rows_multiple = 1
    """Devices that divide one process's batch by rows; its rows are a multiple of this."""

    can_skip_update = True
    """Whether the update is made after ``skip_update_where``, which can then prevent it.

    Known once ``training_overrides`` has been called.
    """

    plain_backward = True
    """Whether the backward pass is torch's own, on a model whose memory is laid out when it begins.

    Batches can then be tried out before training, and in a single process gradients can be added
    to ``.grad`` while they are computed.
    """

    takes_cpu_functions = True
    """Whether ``cpu_functions`` may stand in for torch's functions, where the device is a CPU."""

    def __init__(self, device: str, mesh: Mapping[str, int] | None = None) -> None:
        self.device = device
        self.mesh_shape = dict(mesh or {})
        self.cpu_functions: CpuFunctions | None = None
        """Stands in for torch's functions in the forward passes of training; set by each trainer
        before it trains, to None where it wants torch's own."""

    @property
    def collectives(self) -> Collectives:
        """Communication between the ranks, whose process group may be made at any time."""
        return TorchCollectives(self.device) if dist.is_initialized() else Collectives()

    @property
    def averaged_ranks(self) -> int:
        """Over how many ranks gradients are averaged; 1 where they are summed."""
        return self.collectives.world_size

    # Process

    def problems(self) -> Sequence[str]:
        """What stops this backend on this machine, one line with its remedy each; empty if nothing.

        Called before data is read or a model is loaded.
        """
        given = [name for name in RANK_VARIABLES if os.environ.get(name)]
        missing = [name for name in RANK_VARIABLES if name not in given]
        # MASTER_ADDR and MASTER_PORT alone are left over by many a job script and mean nothing.
        launched = any("RANK" in name or name == "WORLD_SIZE" for name in given)
        if not launched or not missing or os.environ.get("WORLD_SIZE") == "1":
            return []
        return [
            f"{', '.join(f'{name}={os.environ[name]}' for name in given)} set, but "
            f"{', '.join(missing)} not: a launcher sets all of them; start with torchrun or "
            "--profile cpu-ddp, or unset them for a single process"
        ]

    def prepare_process(self) -> None:
        """Set environment switches and process groups. Every rank calls it once, first of all."""
        # An installed torch-xla would pull transformers and accelerate onto XLA code paths even
        # for a CPU or GPU run.
        os.environ.setdefault("USE_TORCH_XLA", "0")
        if self.device == "cpu":
            keep_freed_memory()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            if self.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if self.device == "cuda" else "gloo")

    def training_overrides(self, values: Mapping[str, Any], *, trains: bool) -> dict[str, Any]:
        """The training arguments in ``values`` as this backend needs them, before the model loads.

        Args:
            values: name -> value of every training argument that was given.
            trains: whether an optimizer will be made; False where a model is only evaluated.

        Raises:
            UserError: values that contradict each other or this backend.
        """
        return dict(values)

    def close(self) -> None:
        """Release process groups. Every rank calls it once, last of all, errors included."""
        if dist.is_initialized():
            # gloo's threads free the tensors of the last collectives and need Python's lock for
            # that, but torch holds the lock while it waits for those threads to end: without this
            # pause the two wait for each other forever, about once in fifty runs.
            time.sleep(LAST_COLLECTIVES_SECONDS)
            dist.destroy_process_group()

    # Placement

    def place_model(self, model: nn.Module) -> None:
        """Move ``model`` to the device and lay out its weights, where the trainer should not.

        Called once per trainer on every rank, before an optimizer is made.
        """

    def place_batch(self, batch: Batch) -> Batch:
        """The batch's tensors where the model needs them; rows as the backend divides them."""
        return batch

    def place_batches(self, batches: Iterator[tuple[int, Batch]]) -> Iterator[tuple[int, Batch]]:
        """The same pairs of a number and a batch, each batch placed as by ``place_batch``.

        Prefetched by a thread of their own while the training step runs.
        """
        return prefetch((number, self.place_batch(batch)) for number, batch in batches)

    def autocast(self) -> AbstractContextManager[None]:
        """Context of the forward pass: mixed precision where that is up to the backend."""
        trains = self.cpu_functions is not None and torch.is_grad_enabled()
        return self.cpu_functions if trains else nullcontext()  # type: ignore[return-value]

    def after_prepare(self, optimizer: Optimizer) -> None:
        """Tie the ``optimizer`` of ``build_optimizer`` to what the trainer has wrapped it in.

        Called on every rank before the first step, and before a checkpoint is read.
        """

    def start_training(self, model: nn.Module, optimizer: Any, *, accumulation: int) -> None:
        """Called on every rank after weights and optimizer state are loaded, before a step.

        ``accumulation``: micro-batches per step.
        """

    def finish_micro_batch(self, model: nn.Module, *, last: bool) -> None:
        """Called on every rank after a backward pass; ``last``: the step's last one."""

    def finish_step(self, model: nn.Module) -> None:
        """Called on every rank after the optimizer's step and the clearing of gradients."""
        if self.cpu_functions is not None:
            self.cpu_functions.clear()

    def flush(self) -> None:
        """Execute all pending lazy operations, so that later ones begin a new graph."""

    def compilations(self) -> tuple[int, float]:
        """Graphs compiled by this process so far and the seconds it took; (0, 0.0) if none."""
        return dynamo_compilations()

    # Optimizer and state

    def build_optimizer(
        self,
        optimizer_class: type[Optimizer],
        groups: list[dict[str, Any]],
        options: Mapping[str, Any],
    ) -> Optimizer:
        """The optimizer over ``groups``. Every rank calls it, with the same groups."""
        return optimizer_class(groups, **options)

    def skip_update_where(self, optimizer: Any, bad: Tensor) -> Tensor:
        """Make the next ``optimizer.step`` change nothing if ``bad`` is true on any rank.

        ``bad`` is a bool scalar. Returns the same for all ranks. Every rank must call it.
        """
        bad_anywhere = self.collectives.all_reduce_sum(bad.float()) > 0
        if bad_anywhere:
            # Without gradients the optimizer skips every parameter: weights and moments stay.
            optimizer.zero_grad(set_to_none=True)
        return bad_anywhere

    def revert_step_count(self, optimizer: Any, count: int) -> None:
        """Subtract ``count`` skipped steps from the number that the optimizer itself keeps.

        Only where ``skip_update_where`` cannot keep it from counting.
        """

    def whole_shapes(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape of the whole parameter, on every rank."""
        return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def writers(self, model: nn.Module, optimizer: Any) -> dict[str, int]:
        """Parameter name -> rank that saves it: the one with least to fetch, else equal shares.

        The same on every rank.
        """
        sizes = {name: math.prod(shape) for name, shape in self.whole_shapes(model).items()}
        return equal_shares(sizes, self.collectives.world_size)

    def state(
        self, model: nn.Module, optimizer: Any, writers: Mapping[str, int] | None = None
    ) -> Iterator[ParameterState]:
        """The state of every parameter, one after the other, in the order of the model.

        On the rank that ``writers`` name for it, by default rank 0; on the others each item has the
        name alone. Without an ``optimizer`` there are weights alone. ``model`` is the trainer's,
        not what it was wrapped in. Tensors are valid only until training resumes. Every rank must
        read the stream to its end.
        """
        held = innermost(optimizer).state if optimizer is not None else {}
        for name, parameter in model.named_parameters():
            if self.collectives.rank == (writers or {}).get(name, 0):
                moments = held.get(parameter, {})
                moments = {key: on_host(v) for key, v in moments.items() if v is not None}
                yield ParameterState(name, on_host(parameter), moments)
            else:
                yield ParameterState(name, None, {})

    def load_state(
        self, model: nn.Module, optimizer: Any, read: ReadState, *, moments: bool = True
    ) -> None:
        """Put what ``read`` gives into ``model`` and ``optimizer``; any backend may have saved it.

        Called on every rank after ``after_prepare``; each rank reads what it needs. With
        ``moments=False`` only weights are loaded. Learning rates are left as they are.

        Raises:
            UserError: this backend cannot hold the saved state.
        """
        inner = innermost(optimizer) if moments else None
        groups = groups_by_parameter(inner)
        for name, parameter in model.named_parameters():
            group = groups.get(id(parameter))
            found = read(name, moments=group is not None)
            if found.weight is not None:
                with torch.no_grad():
                    parameter.copy_(found.weight)
            if inner is not None and group is not None and found.moments:
                inner.state[parameter] = placed(found.moments, parameter, group, inner)

    def full_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Parameter name -> copy of the whole fp32 weight on the CPU, on rank 0; empty on others.

        ``model`` is the trainer's, not what it was wrapped in. Every rank must call it.
        """
        return {
            name: weight.to(torch.float32, copy=True)
            for name, weight, _ in self.state(model, None)
            if weight is not None
        }

    def weights_to_save(self, model: nn.Module) -> dict[str, Tensor] | None:
        """``model.state_dict()`` in whole CPU tensors, on rank 0 at least; None where it is so.

        Tied weights stay one tensor. Every rank must call it.
        """
        return None

    def loss_scale(self, optimizer: Any, scaler: Any) -> dict[str, float] | None:
        """``scale`` and ``good_steps`` (since it last changed) of fp16's loss scaler, if any.

        ``scaler``: the trainer's gradient scaler, or None.
        """
        state = scaler.state_dict() if scaler is not None else {}
        if not state:
            return None
        return {"scale": float(state["scale"]), "good_steps": int(state["_growth_tracker"])}

    def load_loss_scale(self, optimizer: Any, scaler: Any, values: Mapping[str, float]) -> None:
        """Put back what ``loss_scale`` gave, under this or another backend."""
        if scaler is not None and scaler.is_enabled():
            state = scaler.state_dict()
            good = int(values["good_steps"])
            scaler.load_state_dict({**state, "scale": values["scale"], "_growth_tracker": good})

    def seed(self, value: int) -> None:
        """Seed every random generator that a training step draws from; ``value`` is below 2**63."""
        random.seed(value)
        np.random.seed(value % 2**32)
        torch.manual_seed(value)

    # Generation

    @contextmanager
    def generation(self, model: nn.Module) -> Iterator[Mapping[str, Any]]:
        """Context in which ``model.generate`` may run; gives extra keywords for ``generate``.

        Every rank enters it for every batch.
        """
        yield {}


def innermost(optimizer: Any) -> Any:
    """The optimizer that holds the state, inside what the trainer has wrapped it in."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def groups_by_parameter(optimizer: Any) -> dict[int, dict[str, Any]]:
    """id of a parameter -> the optimizer's group that it is in; empty without an optimizer."""
    groups = optimizer.param_groups if optimizer is not None else []
    return {id(parameter): group for group in groups for parameter in group["params"]}


def on_host(value: Any) -> Any:
    """A tensor moved to the CPU, without a copy if it is there already; numbers are unchanged."""
    return value.detach().to("cpu") if isinstance(value, Tensor) else value


def placed(
    moments: Mapping[str, Any], parameter: Tensor, group: Mapping[str, Any], optimizer: Any
) -> dict[str, Any]:
    """A parameter's optimizer state where and as the optimizer keeps it.

    torch's optimizers count steps in an fp32 tensor, on the parameter's device if they are fused or
    capturable, else on the CPU; others in a Python number.
    """
    kinds = set(type(optimizer).__mro__) - set(Optimizer.__mro__)
    torchs_own = any(kind.__module__.startswith("torch.optim.") for kind in kinds)
    state: dict[str, Any] = {}
    for name, value in moments.items():
        if name == "step":
            device = parameter.device if group.get("fused") or group.get("capturable") else "cpu"
            state[name] = (
                torch.tensor(float(value), dtype=torch.float32, device=device)
                if torchs_own
                else int(value)
            )
        elif isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0:
            state[name] = value.to(device=parameter.device, dtype=parameter.dtype)
        else:
            state[name] = value.to(parameter.device) if isinstance(value, Tensor) else value
    return state


def equal_shares(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Name -> rank, so that the ranks' sums of sizes are close to each other.

    Largest first, to the emptiest rank (longest-processing-time rule, Graham 1969). The same for
    the same sizes, wherever it is called.
    """
    totals = [0] * ranks
    rank_of = {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        rank = totals.index(min(totals))
        rank_of[name] = rank
        totals[rank] += sizes[name]
    return rank_of
