"""torch-xla: TPU VMs and pods, and virtual XLA devices on a CPU.

One process per host drives all of its devices (SPMD): it sees one device, on which a batch is
divided by rows over all devices of the mesh, and weights are whole on each (axis ``data``) or
divided too (axis ``fsdp``).

torch-xla is hidden from transformers and accelerate (``USE_TORCH_XLA=0``): they see one plain
device, and this backend alone decides where a graph ends.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from s2s_scale.backends.base import Backend, Batch, ParameterState, ReadState, innermost
from s2s_scale.backends.collectives import Collectives, TorchCollectives
from s2s_scale.backends.xla.adamw import GraphAdamW, make_state, state_tensors
from s2s_scale.backends.xla.patches import (
    always_build_masks,
    set_process_index,
    use_xla_checkpointing,
)
from s2s_scale.backends.xla.runtime import (
    OWN_TORCH,
    compilations,
    end_graph,
    fetch,
    keep_compiled_graphs,
    on_cpu,
    runtime,
    seed_devices,
    spmd,
    start_mesh,
    to_device,
    use_exact_matmul,
    versions_apart,
    without_effect,
    xla_device,
)
from s2s_scale.backends.xla.sharding import MeshSharding, by_rows
from s2s_scale.errors import UserError, raise_problems

T = TypeVar("T")


class XlaCollectives(Collectives):
    """Between the processes of a mesh, each of which drives all devices of its host."""

    def __init__(self, backend: XlaBackend) -> None:
        self._backend = backend

    @property
    def rank(self) -> int:
        return int(runtime().process_index())

    @property
    def world_size(self) -> int:
        return int(runtime().process_count())

    def sum_counts(self, count: int, device: torch.device) -> Tensor:
        # One number for each device, of which each process knows its own: their sum is taken in
        # the graph of the step, so no process waits for another here.
        own = torch.zeros(self._backend.rows_multiple, dtype=torch.int64)
        own[0] = count
        return self._backend.place_batch({"count": own})["count"].sum()

    def any_rank(self, flag: bool) -> bool:
        # Between hosts, beside the devices, which go on with the step meanwhile.
        return flag if self.world_size == 1 else any(self.gather_objects(flag))

    def to_host(self, rows: Tensor) -> Tensor:
        if rows.device.type == "xla" and self.world_size * self._backend.rows_multiple > 1:
            # A graph that is kept: torch-xla itself would compile the collection at each read.
            # A sum, because a copy keeps how the rows are divided.
            rows = rows + torch.zeros_like(rows)
            spmd().mark_sharding(rows, self._backend.device_mesh, tuple([None] * rows.dim()))
        self._backend.flush()
        return rows.cpu()

    def gather_objects(self, value: T) -> list[T]:
        return TorchCollectives("cpu").gather_objects(value) if dist.is_initialized() else [value]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        if self.rank > 0:
            self.gather_objects(None)
        yield
        if self.rank == 0:
            self.gather_objects(None)


class XlaBackend(Backend):
    """Training on XLA devices, in graphs that are compiled once for each shape of a batch.

    Args:
        mesh: lengths of the axes ``data`` and ``fsdp``; by default all devices are on the first.
    """

    name = "xla"
    static_shapes = True
    plain_backward = False
    takes_cpu_functions = False

    def __init__(self, device: str, mesh: Mapping[str, int] | None = None) -> None:
        super().__init__(device, mesh or {"data": -1})
        self._bf16 = False
        self._accumulates = False
        self._sharding = MeshSharding(self.mesh_shape)

    @property
    def collectives(self) -> Collectives:
        return XlaCollectives(self)

    @property
    def averaged_ranks(self) -> int:
        return 1

    @cached_property
    def rows_multiple(self) -> int:  # type: ignore[override]
        return int(runtime().addressable_runtime_device_count())

    @property
    def device_mesh(self) -> Any:
        return self._sharding.mesh

    def problems(self) -> Sequence[str]:
        if not find_spec("torch_xla"):
            return [
                f"backend xla: the package torch-xla is not installed; {OWN_TORCH}: "
                "pip install 's2s-scale[tpu]'"
            ]
        problems = [*versions_apart(), *super().problems()]
        utils = sys.modules.get("transformers.utils")
        if utils is not None and utils.is_torch_xla_available():
            problems.append(
                "backend xla: transformers was imported before and has taken XLA for itself; set "
                "USE_TORCH_XLA=0 in the environment, as the profiles do"
            )
        return problems

    def prepare_process(self) -> None:
        os.environ["USE_TORCH_XLA"] = "0"
        os.environ.setdefault("PJRT_DEVICE", self.device.upper())
        # Else a learning rate of 0 or 1 is a constant of the graph, which is compiled anew for it.
        os.environ["XLA_NO_SPECIAL_SCALARS"] = "1"
        keep_compiled_graphs()
        always_build_masks()
        start_mesh()
        # Read by accelerate, and by transformers through it.
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(xla_device())
        if self.collectives.world_size > 1:
            set_process_index(self.collectives.rank)
        seed_devices(0)

    def training_overrides(self, values: Mapping[str, Any], *, trains: bool) -> dict[str, Any]:
        raise_problems(without_effect(values))
        values = dict(values)
        values.pop("use_cpu", None)
        self._bf16 = bool(values.pop("bf16", False))
        if not self._bf16 and self.device == "tpu":
            use_exact_matmul()
        if not values.get("adafactor"):
            values.setdefault("optim", "adamw_torch")  # the fused one knows no XLA device
        # Both would read a value from the device at each step.
        values["logging_nan_inf_filter"] = False
        values["dataloader_pin_memory"] = False
        return values

    def place_model(self, model: nn.Module) -> None:
        model.to(xla_device())
        if hasattr(model, "tie_weights"):  # moving to an XLA device makes new parameters
            model.tie_weights()  # type: ignore[operator]
        self._sharding.divide(model.parameters())
        self._sharding.keep_activations_divided(model)
        self.flush()

    def place_batch(self, batch: Batch) -> Batch:
        names = [name for name, value in batch.items() if value.device.type == "cpu"]
        if not names:
            return batch
        rows = batch[names[0]].shape[0]
        if rows % self.rows_multiple:
            raise UserError(
                f"a batch of {rows} rows for {self.rows_multiple} devices: expected a multiple of "
                f"{self.rows_multiple}; change --per_device_train_batch_size or "
                "--per_device_eval_batch_size"
            )
        hosts = self.collectives.world_size
        sharding = partial(by_rows, self._sharding.mesh, minibatch=hosts > 1)
        placed = to_device([batch[name] for name in names], xla_device(), sharding)
        return {**batch, **dict(zip(names, placed, strict=True))}

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast("xla", dtype=torch.bfloat16) if self._bf16 else nullcontext()

    def build_optimizer(
        self,
        optimizer_class: type[Optimizer],
        groups: list[dict[str, Any]],
        options: Mapping[str, Any],
    ) -> Optimizer:
        if optimizer_class is torch.optim.AdamW and not options.get("amsgrad"):
            optimizer_class = GraphAdamW
        built = super().build_optimizer(optimizer_class, groups, options)
        # What is saved of the state names no device.
        built.register_state_dict_post_hook(
            lambda _, saved: {**saved, "state": on_cpu(saved["state"])}
        )
        return built

    def start_training(self, model: nn.Module, optimizer: Any, *, accumulation: int) -> None:
        seed_devices(torch.initial_seed())
        self._accumulates = accumulation > 1
        use_xla_checkpointing(model)
        inner = innermost(optimizer)
        make_state(inner)
        self._sharding.divide(t for t in state_tensors(inner) if t.device.type == "xla")
        # As after every step: XLA then reuses the same buffers in the first step as in the others.
        self.skip_update_where(inner, torch.zeros((), dtype=torch.bool, device=xla_device()))
        inner.step()
        self._fill_gradients(model)
        self.flush()

    def finish_micro_batch(self, model: nn.Module, *, last: bool) -> None:
        if self._accumulates:
            self.flush()

    def finish_step(self, model: nn.Module) -> None:
        self._fill_gradients(model)
        self.flush()

    def _fill_gradients(self, model: nn.Module) -> None:
        """With accumulation: the first micro-batch of a step then adds like every other one.

        Without gradients it would be another graph, for every shape.
        """
        if self._accumulates:
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def flush(self) -> None:
        end_graph()

    def skip_update_where(self, optimizer: Any, bad: Tensor) -> Tensor:
        bad = self.collectives.all_reduce_sum(bad.float()) > 0
        inner = innermost(optimizer)
        held = [p for group in inner.param_groups for p in group["params"] if p.requires_grad]
        held += [tensor for tensor in state_tensors(inner) if tensor.device.type == "xla"]
        before = [tensor.detach().clone() for tensor in held]

        def restore(*_: Any) -> None:
            handle.remove()
            with torch.no_grad():
                for tensor, old in zip(held, before, strict=True):
                    tensor.copy_(torch.where(bad, old, tensor))

        handle = inner.register_step_post_hook(restore)
        return bad

    def revert_step_count(self, optimizer: Any, count: int) -> None:
        for state in innermost(optimizer).state.values():
            on_device = isinstance(state.get("step"), Tensor)  # and undone there (GraphAdamW)
            if "step" in state and not on_device:
                state["step"] -= count

    def compilations(self) -> tuple[int, float]:
        return compilations()

    def state(
        self, model: nn.Module, optimizer: Any, writers: Mapping[str, int] | None = None
    ) -> Iterator[ParameterState]:
        self.flush()
        held = innermost(optimizer).state if optimizer is not None else {}
        for name, parameter in model.named_parameters():
            weight = fetch(parameter)  # on every rank: parts may lie on several hosts
            moments = {moment: on_cpu(value) for moment, value in held.get(parameter, {}).items()}
            mine = self.collectives.rank == (writers or {}).get(name, 0)
            yield ParameterState(name, weight if mine else None, moments if mine else {})

    def load_state(
        self, model: nn.Module, optimizer: Any, read: ReadState, *, moments: bool = True
    ) -> None:
        super().load_state(model, optimizer, read, moments=moments)
        self._sharding.divide(model.parameters())
        self.flush()

    def seed(self, value: int) -> None:
        super().seed(value)
        seed_devices(value % 2**63)

    def weights_to_save(self, model: nn.Module) -> dict[str, Tensor] | None:
        self.flush()
        copies: dict[int, Tensor] = {}
        saved = {}
        for name, value in model.state_dict(keep_vars=True).items():
            if id(value) not in copies:
                copies[id(value)] = fetch(value)
            saved[name] = copies[id(value)]
        return saved
