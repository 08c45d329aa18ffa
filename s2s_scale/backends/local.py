"""Plain torch: one process on a CPU or GPU, or one per device under DistributedDataParallel.

Dividing things of different sizes evenly over ranks.
"""

from __future__ import annotations

import math
import os
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from s2s_scale.backends.base import Backend, Batch, ParameterState, ReadState
from s2s_scale.cpu import CpuFunctions, keep_freed_memory
from s2s_scale.data.prefetch import prefetch


def equal_shares(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Name -> rank, so that the ranks' sums of sizes are near each other.

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


T = TypeVar("T")

_LAST_COLLECTIVES_SECONDS = 0.2

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher sets for each rank; torch reads them to form the process group."""


class LocalBackend(Backend):
    """Adds nothing to what torch does; collectives are the identity in a single process.

    On a CPU it does some of it by functions of our own; see ``s2s_scale.cpu``.
    """

    _takes_own_functions = True
    _functions: CpuFunctions | None = None

    def problems(self) -> Sequence[str]:
        there = [name for name in RANK_VARIABLES if os.environ.get(name)]
        missing = [name for name in RANK_VARIABLES if name not in there]
        single = os.environ.get("WORLD_SIZE") == "1"
        # MASTER_ADDR and MASTER_PORT alone are left by many a job script and mean nothing.
        launched = any("RANK" in name or name == "WORLD_SIZE" for name in there)
        return [_half_launched(there, missing)] if launched and missing and not single else []

    def prepare_process(self) -> None:
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
        return dict(values)

    @property
    def static_shapes(self) -> bool:
        return False

    @property
    def rows_multiple(self) -> int:
        return 1

    @property
    def averaged_ranks(self) -> int:
        return self.collectives.world_size

    def set_accumulation(self, args: Any, micro_batches: int) -> None:
        args.gradient_accumulation_steps = micro_batches

    def place_model(self, model: nn.Module) -> None:
        return None

    def place_batch(self, batch: Batch) -> Batch:
        return batch

    def place_batches(self, batches: Iterator[tuple[int, Batch]]) -> Iterator[tuple[int, Batch]]:
        return prefetch(batches)

    def autocast(self) -> AbstractContextManager[None]:
        trains = self._functions is not None and torch.is_grad_enabled()
        return self._functions if trains else nullcontext()  # type: ignore[return-value]

    @property
    def tries_batches(self) -> bool:
        return type(self) is LocalBackend

    def use_own_functions(self, wanted: bool, *, in_place: bool) -> None:
        self._functions = None  # a trainer before this one may have wanted others
        if wanted and self.device == "cpu" and self._takes_own_functions:
            self._functions = CpuFunctions(in_place=in_place and self._alone)

    @property
    def _alone(self) -> bool:
        """Whether gradients of this process stay with it: nothing waits for them to arrive."""
        return type(self) is LocalBackend and self.collectives.world_size == 1

    def start_training(self, model: nn.Module, optimizer: Any, *, accumulation: int) -> None:
        return None

    def finish_micro_batch(self, model: nn.Module, *, last: bool) -> None:
        return None

    def finish_step(self, model: nn.Module) -> None:
        if self._functions is not None:
            self._functions.clear()

    def flush(self) -> None:
        return None

    @property
    def can_skip_update(self) -> bool:
        return True

    def skip_update_where(self, optimizer: Any, bad: Tensor) -> Tensor:
        anywhere = self.collectives.all_reduce_sum(bad.float()) > 0
        if anywhere:
            # Without gradients the optimizer skips every parameter: weights and moments stay.
            optimizer.zero_grad(set_to_none=True)
        return anywhere

    def revert_step_count(self, optimizer: Any, count: int) -> None:
        return None

    def compilations(self) -> tuple[int, float]:
        # transformers has imported it; where nothing was compiled, it has counted nothing.
        counted = sys.modules.get("torch._dynamo.utils")
        if counted is None:
            return 0, 0.0
        seconds = counted.compilation_time_metrics.get("_compile.compile_inner", ())
        return int(counted.counters["stats"]["unique_graphs"]), float(sum(seconds))

    def weights_to_save(self, model: nn.Module) -> dict[str, Tensor] | None:
        return None

    def build_optimizer(
        self,
        optimizer_class: type[Optimizer],
        groups: list[dict[str, Any]],
        options: Mapping[str, Any],
    ) -> Optimizer:
        return optimizer_class(groups, **options)

    def after_prepare(self, optimizer: Optimizer) -> None:
        return None

    def consolidated_state(self, optimizer: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def whole_shapes(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def writers(self, model: nn.Module, optimizer: Any) -> dict[str, int]:
        sizes = {name: math.prod(shape) for name, shape in self.whole_shapes(model).items()}
        return equal_shares(sizes, self.collectives.world_size)

    def _writes(self, name: str, writers: Mapping[str, int] | None) -> bool:
        """Whether ``state`` gives this parameter to this rank."""
        return self.collectives.rank == (writers or {}).get(name, 0)

    def state(
        self, model: nn.Module, optimizer: Any, writers: Mapping[str, int] | None = None
    ) -> Iterator[ParameterState]:
        held = innermost(optimizer).state if optimizer is not None else {}
        for name, parameter in model.named_parameters():
            if not self._writes(name, writers):
                yield ParameterState(name, None, {})
                continue
            moments = {k: on_host(v) for k, v in held.get(parameter, {}).items() if v is not None}
            yield ParameterState(name, on_host(parameter), moments)

    def _state_holder(self, optimizer: Any) -> Any:
        """The optimizer that holds the state of this rank's parameters."""
        return innermost(optimizer)

    def load_state(
        self, model: nn.Module, optimizer: Any, read: ReadState, *, moments: bool = True
    ) -> None:
        inner = self._state_holder(optimizer) if moments else None
        groups = groups_by_parameter(inner)
        for name, parameter in model.named_parameters():
            group = groups.get(id(parameter))
            found = read(name, moments=group is not None)
            if found.weight is not None:
                with torch.no_grad():
                    parameter.copy_(found.weight)
            if inner is not None and group is not None and found.moments:
                inner.state[parameter] = placed(found.moments, parameter, group, inner)

    def loss_scale(self, optimizer: Any, scaler: Any) -> dict[str, float] | None:
        state = scaler.state_dict() if scaler is not None else {}
        if not state:
            return None
        return {"scale": float(state["scale"]), "good_steps": int(state["_growth_tracker"])}

    def load_loss_scale(self, optimizer: Any, scaler: Any, values: Mapping[str, float]) -> None:
        if scaler is not None and scaler.is_enabled():
            state = scaler.state_dict()
            good = int(values["good_steps"])
            scaler.load_state_dict({**state, "scale": values["scale"], "_growth_tracker": good})

    def seed(self, value: int) -> None:
        random.seed(value)
        np.random.seed(value % 2**32)
        torch.manual_seed(value)

    def full_weights(self, model: nn.Module) -> dict[str, Tensor]:
        if self.collectives.rank > 0:
            return {}
        return {name: whole(parameter) for name, parameter in model.named_parameters()}

    def generation(self, model: nn.Module) -> AbstractContextManager[Mapping[str, Any]]:
        return _no_extra_keywords()

    def close(self) -> None:
        if dist.is_initialized():
            # gloo's threads free the tensors of the last collectives and need Python's lock for
            # that, but torch holds the lock while it waits for those threads to end: without this
            # pause the two wait for each other for ever, about once in fifty runs.
            time.sleep(_LAST_COLLECTIVES_SECONDS)
            dist.destroy_process_group()


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
    """A tensor in host memory, itself where it lies there; a number as it is."""
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


def whole(parameter: Tensor) -> Tensor:
    """A copy of a weight in fp32 on the CPU."""
    return parameter.detach().to(device="cpu", dtype=torch.float32, copy=True)


@contextmanager
def _no_extra_keywords() -> Iterator[Mapping[str, Any]]:
    yield {}


def _half_launched(there: Sequence[str], missing: Sequence[str]) -> str:
    return (
        f"{', '.join(f'{name}={os.environ[name]}' for name in there)} set, but "
        f"{', '.join(missing)} not: a launcher sets all of them; start with torchrun or "
        "--profile cpu-ddp, or unset them for a single process"
    )
