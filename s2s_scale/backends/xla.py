"""torch-xla: TPU VMs and pods, and virtual XLA devices on a CPU.

With a mesh, one process a host drives all of its devices (SPMD): it sees one device, on which a
batch is divided by rows over all devices of the mesh and weights are whole on each (axis ``data``)
or divided too (axis ``fsdp``). Without a mesh there is one process a device, started by
``torch_xla.launch``.

transformers and accelerate are not told of torch-xla (``USE_TORCH_XLA=0``): they see one plain
device, and where a recorded graph ends is decided here alone.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from s2s_scale.backends.base import Batch, ParameterState, ReadState
from s2s_scale.backends.graph_adamw import GraphAdamW
from s2s_scale.backends.local import LocalBackend, innermost
from s2s_scale.backends.mesh import AXES, divided_dimension, mesh_lengths, rows_dimension
from s2s_scale.data.prefetch import ahead
from s2s_scale.errors import UserError, raise_problems

T = TypeVar("T")

CACHE_VARIABLE = "XLA_PERSISTENT_CACHE_PATH"
"""Folder of compiled graphs, read by torch-xla itself; empty: none are kept."""
OWN_TORCH = "it is built for one exact torch, so give it an environment of its own"


class XlaBackend(LocalBackend):
    """Training on XLA devices, in graphs that are compiled once for each shape of a batch."""

    _takes_own_functions = False

    def __init__(self, device: str = "tpu", mesh: Mapping[str, int] | None = None) -> None:
        super().__init__(device, mesh)
        self._bf16 = False
        self._accumulates = False
        self._rows: int | None = None  # of the batch that the model is called with

    def problems(self) -> Sequence[str]:
        if not find_spec("torch_xla"):
            return [
                f"backend xla: the package torch-xla is not installed; {OWN_TORCH}: "
                "pip install 's2s-scale[tpu]'"
            ]
        problems = [*_versions_apart(), *super().problems()]
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
        _keep_compiled_graphs()
        _masks_without_look()
        import torch_xla
        import torch_xla.runtime

        if self.mesh_shape:
            torch_xla.runtime.use_spmd()
            if torch_xla.runtime.process_count() > 1:
                import torch_xla.distributed.xla_backend  # knows the address "xla://"

                torch.distributed.init_process_group("gloo", init_method="xla://")
        # Read by accelerate, and by transformers through it.
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(torch_xla.device())
        if self.data_world_size > 1:
            _tell_rank(self.data_rank)
        torch_xla.manual_seed(0)

    def training_overrides(self, values: Mapping[str, Any], *, trains: bool) -> dict[str, Any]:
        raise_problems(_without_effect(values))
        values = dict(values)
        values.pop("use_cpu", None)
        self._bf16 = bool(values.pop("bf16", False))
        if not self._bf16 and self.device == "tpu":
            _whole_products()
        if not values.get("adafactor"):
            values.setdefault("optim", "adamw_torch")  # the fused one knows no XLA device
        # Both would read a value from the device at each step.
        values["logging_nan_inf_filter"] = False
        values["dataloader_pin_memory"] = False
        return values

    @cached_property
    def _mesh(self) -> Any:
        from torch_xla.distributed.spmd import Mesh

        devices = _runtime().global_runtime_device_count()
        return Mesh(np.arange(devices), mesh_lengths(self.mesh_shape, devices), AXES)

    @property
    def data_rank(self) -> int:
        runtime = _runtime()
        return int(runtime.process_index() if self.mesh_shape else runtime.global_ordinal())

    @property
    def data_world_size(self) -> int:
        runtime = _runtime()
        return int(runtime.process_count() if self.mesh_shape else runtime.world_size())

    @property
    def static_shapes(self) -> bool:
        return True

    @property
    def rows_multiple(self) -> int:
        return int(_runtime().addressable_runtime_device_count()) if self.mesh_shape else 1

    @property
    def averaged_ranks(self) -> int:
        return 1

    def total(self, value: Tensor) -> Tensor:
        # In a mesh every process sees the value of the whole batch.
        if self.mesh_shape or self.data_world_size == 1:
            return value
        summed: Tensor = _model().all_reduce("sum", value.detach().clone())
        return summed

    def total_count(self, count: int, device: torch.device) -> Tensor:
        if not self.mesh_shape:
            return self.total(torch.tensor(count).to(device))
        # One number for each device, of which each process knows its own: their sum is taken in
        # the graph of the step, so no process waits for another here.
        own = torch.zeros(self.rows_multiple, dtype=torch.int64)
        own[0] = count
        return self.place_batch({"count": own})["count"].sum()

    def anywhere(self, flag: bool) -> bool:
        # Between hosts, beside the devices, which go on with the step meanwhile.
        return flag if self.data_world_size == 1 else any(self.gather_objects(flag))

    def gather_rows(self, rows: Tensor, padding: int) -> Tensor:
        if self.mesh_shape or self.data_world_size == 1:
            return rows  # they are the whole batch's already
        widest = max(self.gather_objects(rows.shape[1]))
        padded = nn.functional.pad(rows, (0, widest - rows.shape[1]), value=padding)
        return _model().all_gather(padded, dim=0)

    def fetch_rows(self, rows: Tensor) -> Tensor:
        if self.mesh_shape and rows.device.type == "xla":
            from torch_xla.distributed.spmd import mark_sharding

            # A graph that is kept: torch-xla itself would compile the collection at each read.
            # A sum, because a copy keeps how the rows are divided.
            rows = rows + torch.zeros_like(rows)
            mark_sharding(rows, self._mesh, tuple([None] * rows.dim()))
        self.flush()
        return rows.cpu()

    def gather_objects(self, value: T) -> list[T]:
        if self.mesh_shape or self.data_world_size == 1:
            return super().gather_objects(value)
        return list(_model().mesh_reduce("s2s_scale objects", value, list))

    @contextmanager
    def main_first(self) -> Iterator[None]:
        if self.data_rank > 0:
            self.gather_objects(None)
        yield
        if self.data_rank == 0:
            self.gather_objects(None)

    def place_model(self, model: nn.Module) -> None:
        import torch_xla

        model.to(torch_xla.device())
        if hasattr(model, "tie_weights"):  # moving to an XLA device makes new parameters
            model.tie_weights()  # type: ignore[operator]
        if self.mesh_shape:
            self._divide(model.parameters())
            self._keep_activations_divided(model)
        self.flush()

    def place_batch(self, batch: Batch) -> Batch:
        import torch_xla

        names = [name for name, value in batch.items() if value.device.type == "cpu"]
        sharding = None
        if self.mesh_shape and names:
            self._check_rows(batch[names[0]])
            sharding = partial(_by_rows, self._mesh, minibatch=self.data_world_size > 1)
        placed = _to_device([batch[name] for name in names], torch_xla.device(), sharding)
        return {**batch, **dict(zip(names, placed, strict=True))}

    def _check_rows(self, tensor: Tensor) -> None:
        if tensor.shape[0] % self.rows_multiple:
            raise UserError(
                f"a batch of {tensor.shape[0]} rows for {self.rows_multiple} devices: expected a "
                f"multiple of {self.rows_multiple}; change --per_device_train_batch_size or "
                "--per_device_eval_batch_size"
            )

    def place_batches(self, batches: Iterator[tuple[int, Batch]]) -> Iterator[tuple[int, Batch]]:
        return ahead(((number, self.place_batch(batch)) for number, batch in batches))

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
        self._watch_saving(built)
        return built

    def start_training(self, model: nn.Module, optimizer: Any, *, accumulation: int) -> None:
        import torch_xla

        torch_xla.manual_seed(torch.initial_seed())
        self._accumulates = accumulation > 1
        _checkpoint_for_xla(model)
        _make_state(innermost(optimizer))
        if self.mesh_shape:
            tensors = _state_tensors(innermost(optimizer))
            self._divide(t for t in tensors if t.device.type == "xla")
        # As after every step: XLA then reuses the same buffers in the first step as in the others.
        inner = innermost(optimizer)
        self.drop_update_where(inner, torch.zeros((), dtype=torch.bool, device=torch_xla.device()))
        inner.step()
        self._fill_gradients(model)
        self.flush()

    def finish_micro_batch(self, model: nn.Module, *, last: bool) -> None:
        if last and not self.mesh_shape and self.data_world_size > 1:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            _model().all_reduce("sum", gradients)
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
        import torch_xla

        torch_xla.sync()

    def drop_update_where(self, optimizer: Any, bad: Tensor) -> Tensor:
        bad = self.total(bad.float()) > 0
        inner = innermost(optimizer)
        held = [p for group in inner.param_groups for p in group["params"] if p.requires_grad]
        held += [tensor for tensor in _state_tensors(inner) if tensor.device.type == "xla"]
        before = [tensor.detach().clone() for tensor in held]

        def restore(*_: Any) -> None:
            handle.remove()
            with torch.no_grad():
                for tensor, old in zip(held, before, strict=True):
                    tensor.copy_(torch.where(bad, old, tensor))

        handle = inner.register_step_post_hook(restore)
        return bad

    def forget_steps(self, optimizer: Any, count: int) -> None:
        for state in innermost(optimizer).state.values():
            on_device = isinstance(state.get("step"), Tensor)  # and undone there (GraphAdamW)
            if "step" in state and not on_device:
                state["step"] -= count

    def compilations(self) -> tuple[int, float]:
        import torch_xla.debug.metrics as metrics

        data = metrics.metric_data("CompileTime")  # (count, total nanoseconds, samples)
        return (int(data[0]), float(data[1]) / 1e9) if data else (0, 0.0)

    def whole_state(self, optimizer: Any) -> AbstractContextManager[None]:
        return nullcontext()  # see _watch_saving

    def _watch_saving(self, optimizer: Optimizer) -> None:
        """What is saved of the optimizer's state holds no device."""
        optimizer.register_state_dict_post_hook(
            lambda _, saved: {**saved, "state": _on_cpu(saved["state"])}
        )

    def full_weights(self, model: nn.Module) -> dict[str, Tensor]:
        self.flush()
        weights = {name: _fetch(value).float() for name, value in model.named_parameters()}
        return weights if self.data_rank == 0 else {}

    def state(
        self, model: nn.Module, optimizer: Any, writers: Mapping[str, int] | None = None
    ) -> Iterator[ParameterState]:
        self.flush()
        held = innermost(optimizer).state if optimizer is not None else {}
        for name, parameter in model.named_parameters():
            weight = _fetch(parameter)  # on every rank: parts may lie on several hosts
            moments = {moment: _on_cpu(value) for moment, value in held.get(parameter, {}).items()}
            mine = self._writes(name, writers)
            yield ParameterState(name, weight if mine else None, moments if mine else {})

    def load_state(
        self, model: nn.Module, optimizer: Any, read: ReadState, *, moments: bool = True
    ) -> None:
        super().load_state(model, optimizer, read, moments=moments)
        if self.mesh_shape:
            self._divide(model.parameters())
        self.flush()

    def seed(self, value: int) -> None:
        import torch_xla

        super().seed(value)
        torch_xla.manual_seed(value % 2**63)

    def weights_to_save(self, model: nn.Module) -> dict[str, Tensor] | None:
        self.flush()
        copies: dict[int, Tensor] = {}
        saved = {}
        for name, value in model.state_dict(keep_vars=True).items():
            if id(value) not in copies:
                copies[id(value)] = _fetch(value)
            saved[name] = copies[id(value)]
        return saved

    def _divide(self, tensors: Iterator[Tensor]) -> None:
        """Divide tensors over the axis ``fsdp``, each along one of its dimensions."""
        import torch_xla
        from torch_xla.distributed.spmd import mark_sharding

        parts = mesh_lengths(self.mesh_shape, _runtime().global_runtime_device_count())[1]
        for tensor in tensors:
            dimension = divided_dimension(tuple(tensor.shape), parts)
            if dimension is None or torch_xla._XLAC._get_xla_sharding_spec(tensor):
                continue
            axes = [None if n != dimension else AXES[1] for n in range(tensor.dim())]
            mark_sharding(tensor, self._mesh, tuple(axes))

    def _keep_activations_divided(self, model: nn.Module) -> None:
        """Divided weights must not make XLA divide hidden states by their width.

        A layer's output, [B, T, d] or with its first two the other way round (FSMT), is divided by
        rows; so XLA gathers weights, as ZeRO 3 does.
        """
        if mesh_lengths(self.mesh_shape, _runtime().global_runtime_device_count())[1] == 1:
            return
        model.register_forward_pre_hook(self._note_rows, with_kwargs=True)
        model.register_forward_hook(self._forget_rows)
        for module in model.modules():
            if isinstance(module, nn.ModuleList):
                for layer in module:
                    layer.register_forward_hook(self._divide_output)

    def _note_rows(self, model: nn.Module, inputs: Any, keywords: dict[str, Any]) -> None:
        tensors = [value for value in (*inputs, *keywords.values()) if isinstance(value, Tensor)]
        self._rows = tensors[0].shape[0] if tensors else None

    def _forget_rows(self, model: nn.Module, inputs: Any, output: Any) -> None:
        self._rows = None

    def _divide_output(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        from torch_xla.distributed.spmd import mark_sharding

        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, Tensor) and hidden.dim() == 3:
            axes: list[Any] = [None, None, None]
            axes[rows_dimension(tuple(hidden.shape), self._rows)] = AXES
            mark_sharding(hidden, self._mesh, tuple(axes))


def _runtime() -> Any:
    import torch_xla.runtime

    return torch_xla.runtime


def _model() -> Any:
    import torch_xla.core.xla_model

    return torch_xla.core.xla_model


def _by_rows(mesh: Any, dimensions: int, *, minibatch: bool) -> Any:
    """A tensor's first dimension divided over all devices; ``minibatch``: each host has a part."""
    from torch_xla.distributed.spmd import ShardingSpec

    return ShardingSpec(mesh, (AXES, *([None] * (dimensions - 1))), minibatch=minibatch)


def _to_device(tensors: list[Tensor], device: torch.device, sharding: Any) -> list[Tensor]:
    """One transfer for all tensors of a like number of dimensions."""
    placed = list(tensors)
    for dimensions in {tensor.dim() for tensor in tensors}:
        places = [n for n, tensor in enumerate(tensors) if tensor.dim() == dimensions]
        spec = sharding(dimensions) if sharding is not None and dimensions else None
        moved = _model().send_cpu_data_to_device([tensors[n] for n in places], device, spec)
        for n, tensor in zip(places, moved, strict=True):
            placed[n] = tensor
    return placed


def _state_tensors(optimizer: Any) -> list[Tensor]:
    """The state's tensors, each once."""
    values = chain.from_iterable(state.values() for state in optimizer.state.values())
    return list({id(value): value for value in values if isinstance(value, Tensor)}.values())


def _make_state(optimizer: Any) -> None:
    """Have the optimizer make its state now, by a step of length 0, and count that step as none.

    Made in the first step, it would be a graph of its own, as large as a step's
    (torch.distributed.checkpoint does the same).
    """
    if optimizer.state:
        if isinstance(optimizer, GraphAdamW):  # a checkpoint's counts come in CPU tensors
            for group in optimizer.param_groups:
                optimizer.count_of([p for p in group["params"] if p in optimizer.state])
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    rates = [group["lr"] for group in optimizer.param_groups]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] *= 0
    optimizer.zero_grad(set_to_none=True)


def _checkpoint_for_xla(model: nn.Module) -> None:
    """Gradient checkpointing as torch-xla has it: XLA would merge torch's second forward pass."""
    from torch_xla.utils.checkpoint import checkpoint

    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=True)  # type: ignore[assignment]


def _fetch(tensor: Tensor) -> Tensor:
    """A copy on the CPU. Parts that are all here are put together here.

    torch-xla would gather them on the devices first, by a graph for each shape.
    """
    import torch_xla
    from torch_xla.distributed.spmd import wrap_if_sharded

    divided = tensor.device.type == "xla" and "devices" in (
        torch_xla._XLAC._get_xla_sharding_spec(tensor) or ""
    )
    if not divided or _runtime().process_count() > 1:
        return tensor.detach().to("cpu", copy=True)
    made = torch.empty(tensor.shape, dtype=tensor.dtype)
    for shard in wrap_if_sharded(tensor.detach()).local_shards:
        made[tuple(shard.indices)] = shard.data
    return made


def _on_cpu(state: Any) -> Any:
    if isinstance(state, Tensor):
        made = _fetch(state)
        return made.float() if made.dtype == torch.float64 else made  # torch's counts are fp32
    return {k: _on_cpu(v) for k, v in state.items()} if isinstance(state, dict) else state


def _masks_without_look() -> None:
    """Have transformers build attention masks without looking into them.

    It leaves a mask out where no position is a pad: for that it waits for the device at each
    forward pass, and a batch without pads is another graph. It does not look where it is traced.
    """
    masking_utils: Any = importlib.import_module("transformers.masking_utils")
    looks_unless = masking_utils.is_tracing

    def is_tracing(tensor: Any = None) -> bool:
        on_xla = isinstance(tensor, Tensor) and tensor.device.type == "xla"
        return on_xla or bool(looks_unless(tensor))

    if looks_unless.__module__ != __name__:
        masking_utils.is_tracing = is_tracing


def _keep_compiled_graphs() -> None:
    """A restarted run finds its graphs in a folder of the cache."""
    if CACHE_VARIABLE not in os.environ:
        base = os.environ.get("S2S_SCALE_CACHE") or Path("~/.cache/s2s_scale").expanduser()
        os.environ[CACHE_VARIABLE] = str(Path(base, "xla"))
    if os.environ[CACHE_VARIABLE]:
        Path(os.environ[CACHE_VARIABLE]).mkdir(parents=True, exist_ok=True)
    else:
        del os.environ[CACHE_VARIABLE]


def _whole_products() -> None:
    """fp32 means fp32: a TPU would round the factors of a product to bf16."""
    from torch_xla.backends import set_mat_mul_precision

    logging.getLogger("torch_xla.backends").setLevel(logging.ERROR)  # it warns at every call
    set_mat_mul_precision("highest")


def _tell_rank(rank: int) -> None:
    """transformers lets process 0 alone write files and show progress."""
    from accelerate import PartialState

    state: Any = PartialState()
    state.process_index = rank


def _versions_apart() -> list[str]:
    try:
        ours, wanted = version("torch"), version("torch_xla")
    except PackageNotFoundError:
        return []
    if ours.split(".")[:2] == wanted.split(".")[:2]:
        return []
    return [
        f"backend xla: torch {ours} with torch_xla {wanted}: expected the same version of both; "
        f"{OWN_TORCH}: pip install 's2s-scale[tpu]'"
    ]


def _without_effect(values: Mapping[str, Any]) -> list[str]:
    """Training arguments that do nothing here, or the wrong thing."""
    instead = {
        "fp16": "XLA devices compute in bf16: give --bf16",
        "fp16_full_eval": "XLA devices compute in bf16: give --bf16",
        "torch_compile": "XLA compiles every graph anyway: leave it out",
        "deepspeed": "weights are divided by the profile's mesh: leave it out",
        "fsdp": "weights are divided by the profile's mesh, {fsdp: -1}: leave it out",
        "tf32": "it is for NVIDIA GPUs: leave it out",
    }
    problems = [
        f"{name}={values[name]}: has no effect on XLA devices; {remedy}"
        for name, remedy in instead.items()
        if values.get(name)
    ]
    if str(values.get("optim", "")).endswith("_fused"):
        problems.append(f"optim={values['optim']}: knows no XLA device; give --optim adamw_torch")
    return problems
