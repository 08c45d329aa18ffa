"""FSDP2: parameters, gradients and optimizer state sharded over the ranks, layer by layer."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers.utils.import_utils import is_accelerate_available

from s2s_scale.backends.base import (
    Backend,
    ParameterState,
    ReadState,
    groups_by_parameter,
    innermost,
    on_host,
    placed,
)
from s2s_scale.backends.torch_fsdp.patches import (
    ACCELERATE,
    keep_class_name,
    mark_prepared,
)
from s2s_scale.errors import UserError, raise_problems
from s2s_scale.models.families import FAMILIES
from s2s_scale.utils import package_version

ELEMENTWISE = (torch.optim.Adagrad, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.SGD)
"""Optimizers whose update of an element depends on that element alone."""


class TorchFsdpBackend(Backend):
    """Every rank holds 1/world of each parameter, as DTensors sharded along their first dimension.

    A layer's parameters are all-gathered before it runs, in the forward and in the backward pass,
    and freed after it; its gradients are reduce-scattered. Embeddings, the output projection and
    whatever else is no layer form the root's group, so that tied weights stay one parameter.
    With ``bf16`` weights and activations are bf16 where the model computes; the sharded parameters,
    the reduction of gradients and the optimizer are fp32 (no autocast).
    """

    name = "torch_fsdp"
    plain_backward = False
    takes_cpu_functions = False

    def __init__(self, device: str, mesh: Mapping[str, int] | None = None) -> None:
        super().__init__(device, mesh)
        self._policy = MixedPrecisionPolicy()
        self._mesh: DeviceMesh | None = None
        self._generates = False

    def problems(self) -> Sequence[str]:
        if is_accelerate_available(min_version=ACCELERATE[0]):
            return super().problems()
        return [
            f"backend torch_fsdp: accelerate {package_version('accelerate')} would wrap the model "
            f"in DistributedDataParallel; expected {ACCELERATE[0]} or newer; "
            "pip install -U accelerate",
            *super().problems(),
        ]

    def prepare_process(self) -> None:
        super().prepare_process()
        if not dist.is_initialized():  # a device mesh needs a process group, even of one process
            dist.init_process_group(
                "nccl" if self.device == "cuda" else "gloo",
                store=dist.HashStore(),  # type: ignore[attr-defined]
                rank=0,
                world_size=1,
            )

    def training_overrides(self, values: Mapping[str, Any], *, trains: bool) -> dict[str, Any]:
        raise_problems(unsupported(values))
        self._policy = MixedPrecisionPolicy()
        if values.get("bf16"):
            self._policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16,
                reduce_dtype=torch.float32,
                output_dtype=torch.float32,  # logits, or the loss in their place
            )
        return dict(values)

    def place_model(self, model: nn.Module) -> None:
        if isinstance(model, FSDPModule):
            return
        if getattr(getattr(model, "config", None), "model_type", None) in FAMILIES:
            # The parity table shows that none of these changes a layer's output in place.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        name = type(model).__name__
        if self._mesh is None:
            self._mesh = init_device_mesh(self.device, (dist.get_world_size(),))
        for layer in separate_layers(model):
            fully_shard(layer, mesh=self._mesh, mp_policy=self._policy, reshard_after_forward=True)
        # The backward pass begins with the root's parameters: freeing them would not pay.
        fully_shard(model, mesh=self._mesh, mp_policy=self._policy, reshard_after_forward=False)
        keep_class_name(model, name)
        model.register_forward_hook(self._reshard_root)
        if hasattr(model, "generate"):  # it calls the encoder alone, before the model itself
            register_fsdp_forward_method(model, "generate")
        mark_prepared(model)

    def _reshard_root(self, model: Any, inputs: Any, output: Any) -> None:
        """Reshard the root explicitly: in evaluation no backward pass does so."""
        if not torch.is_grad_enabled() and not self._generates:
            model.reshard()

    def start_training(self, model: nn.Module, optimizer: Any, *, accumulation: int) -> None:
        for name in ("encoder_layerdrop", "decoder_layerdrop"):
            if value := getattr(getattr(model, "config", None), name, None):
                raise UserError(
                    f"{name}={value}: each rank would skip layers of its own choice, and all ranks "
                    f"take part in gathering a layer; give --{name} 0"
                )

    def build_optimizer(
        self,
        optimizer_class: type[Optimizer],
        groups: list[dict[str, Any]],
        options: Mapping[str, Any],
    ) -> Optimizer:
        if optimizer_class not in ELEMENTWISE:
            names = ", ".join(sorted(kind.__name__ for kind in ELEMENTWISE))
            raise UserError(
                f"optim: {optimizer_class.__name__} on matrices that FSDP2 has sharded would give "
                f"other numbers; expected one that works element by element ({names}); use --optim "
                "adamw_torch, or a profile such as cpu-oss or gpu-oss"
            )
        return super().build_optimizer(optimizer_class, groups, options)

    def skip_update_where(self, optimizer: Any, bad: Tensor) -> Tensor:
        # The norm of sharded gradients is a DTensor, and so is what was derived from it.
        return super().skip_update_where(optimizer, full(bad))

    def state(
        self, model: nn.Module, optimizer: Any, writers: Mapping[str, int] | None = None
    ) -> Iterator[ParameterState]:
        held = innermost(optimizer).state if optimizer is not None else {}
        for name, parameter in model.named_parameters():
            # All ranks take part in gathering, one parameter at a time; its writer keeps it.
            weight = full(parameter)
            moments = {k: full(v) for k, v in held.get(parameter, {}).items() if v is not None}
            if self.collectives.rank == (writers or {}).get(name, 0):
                moments = {moment: on_host(value) for moment, value in moments.items()}
                yield ParameterState(name, on_host(weight), moments)
            else:
                yield ParameterState(name, None, {})

    def load_state(
        self, model: nn.Module, optimizer: Any, read: ReadState, *, moments: bool = True
    ) -> None:
        inner = innermost(optimizer) if moments else None
        groups = groups_by_parameter(inner)
        for name, parameter in model.named_parameters():
            group = groups.get(id(parameter))
            found = read(name, moments=group is not None)
            if found.weight is not None:
                with torch.no_grad():
                    parameter.copy_(own_shard(found.weight, parameter))
            if inner is not None and group is not None and found.moments:
                state = placed(found.moments, parameter, group, inner)
                inner.state[parameter] = {
                    moment: own_shard(value, parameter) for moment, value in state.items()
                }

    def weights_to_save(self, model: nn.Module) -> dict[str, Tensor] | None:
        named = model.state_dict(keep_vars=True)
        copies: dict[int, Tensor] = {}
        for value in {id(value): value for value in named.values()}.values():
            gathered = full(value)
            if self.collectives.rank == 0:
                copies[id(value)] = on_host(gathered)
        return {name: copies[id(value)] for name, value in named.items() if id(value) in copies}

    @contextmanager
    def generation(self, model: nn.Module) -> Iterator[Mapping[str, Any]]:
        # Gathered once: ranks do not take equally many steps, and a step is short beside the
        # communication of a layer's weights.
        shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._generates = True
        for module in shards:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield {}
        finally:
            self._generates = False
            for module in shards:
                module.set_reshard_after_forward(module is not model, recurse=False)
                module.reshard()


def separate_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of the model's stacks that share no parameter with anything outside of them.

    A stack is an ``nn.ModuleList`` that is not part of another one's layer.
    """
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    found = []
    stacks = list(model.children())
    while stacks:
        module = stacks.pop(0)
        if not isinstance(module, nn.ModuleList):
            stacks += module.children()
            continue
        for layer in module:
            own = Counter(id(p) for _, p in layer.named_parameters(remove_duplicate=False))
            if all(uses[key] == count for key, count in own.items()):
                found.append(layer)
    return found


def full(value: Any) -> Any:
    """The full tensor of a DTensor, which is a collective; any other value unchanged."""
    return value.full_tensor().detach() if isinstance(value, DTensor) else value


def own_shard(value: Any, parameter: Tensor) -> Any:
    """This rank's shard of a whole tensor, laid out as ``parameter``; anything else as it is.

    Nothing is sent: each rank has the whole tensor and keeps its part.
    """
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or not value.dim():
        return value
    return distribute_tensor(
        value.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        src_data_rank=None,
    )


def unsupported(values: Mapping[str, Any]) -> list[str]:
    """Training arguments that cannot take effect under FSDP2, one line with its remedy each."""
    reasons = {
        "fp16": "FSDP2 trains in bf16 or fp32 here; give --bf16, or take a profile such as gpu-ddp",
        "fp16_full_eval": "the model is evaluated in the precision of training; leave it out",
        "bf16_full_eval": "the model is evaluated in the precision of training; give --bf16",
        "torch_compile": "layers are gathered by hooks, which are not compiled here; leave it out, "
        "or take a profile such as gpu-ddp",
        "deepspeed": "FSDP2 itself shards the model; leave it out, or take a profile such as "
        "gpu-zero3",
        "fsdp": "the profile shards the model layer by layer; leave it out",
        "fsdp_config": "the profile shards the model layer by layer; leave it out",
        "adafactor": "FSDP2 shards matrices over the ranks, and Adafactor needs whole ones; use "
        "--optim adamw_torch, or a profile such as cpu-oss or gpu-oss",
    }
    problems = [
        f"{name}={values[name]}: {reason}" for name, reason in reasons.items() if values.get(name)
    ]
    if str(getattr(values.get("optim"), "value", values.get("optim"))) == "adafactor":
        problems.append(f"optim=adafactor: {reasons['adafactor']}")
    if values.get("generation_engine") == "ctranslate2":
        problems.append(
            "generation_engine=ctranslate2: needs the whole model on each rank; leave it out, or "
            "evaluate under another profile"
        )
    return problems
