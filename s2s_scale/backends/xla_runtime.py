"""What is asked of torch-xla, which no other file imports; used by ``xla`` alone."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from s2s_scale.backends.mesh import AXES


def runtime() -> Any:
    import torch_xla.runtime

    return torch_xla.runtime


def xla_model() -> Any:
    import torch_xla.core.xla_model

    return torch_xla.core.xla_model


def spmd() -> Any:
    import torch_xla.distributed.spmd

    return torch_xla.distributed.spmd


def start_mesh() -> None:
    """One process drives all devices of its host; the hosts' processes form a group."""
    import torch_xla.runtime

    torch_xla.runtime.use_spmd()
    if torch_xla.runtime.process_count() > 1:
        import torch_xla.distributed.xla_backend  # knows the address "xla://"

        torch.distributed.init_process_group("gloo", init_method="xla://")


def xla_device() -> torch.device:
    """The XLA device of this process."""
    import torch_xla

    found: torch.device = torch_xla.device()
    return found


def seed_devices(value: int) -> None:
    """Seed what devices draw at random, such as dropout."""
    import torch_xla

    torch_xla.manual_seed(value)


def end_graph() -> None:
    """Run what was recorded until here."""
    import torch_xla

    torch_xla.sync()


def compilations() -> tuple[int, float]:
    """How many graphs were compiled, and the seconds that took."""
    import torch_xla.debug.metrics as metrics

    data = metrics.metric_data("CompileTime")  # (count, total nanoseconds, samples)
    return (int(data[0]), float(data[1]) / 1e9) if data else (0, 0.0)


def sharding_of(tensor: Tensor) -> str | None:
    """How a tensor on XLA devices is divided, in XLA's words; empty or None: not at all."""
    import torch_xla

    found: str | None = torch_xla._XLAC._get_xla_sharding_spec(tensor)
    return found


def by_rows(mesh: Any, dimensions: int, *, minibatch: bool) -> Any:
    """A tensor's first dimension divided over all devices; ``minibatch``: each host has a part."""
    return spmd().ShardingSpec(mesh, (AXES, *([None] * (dimensions - 1))), minibatch=minibatch)


def to_device(tensors: list[Tensor], device: torch.device, sharding: Any) -> list[Tensor]:
    """One transfer for all tensors of a like number of dimensions."""
    placed = list(tensors)
    for dimensions in {tensor.dim() for tensor in tensors}:
        places = [n for n, tensor in enumerate(tensors) if tensor.dim() == dimensions]
        spec = sharding(dimensions) if sharding is not None and dimensions else None
        moved = xla_model().send_cpu_data_to_device([tensors[n] for n in places], device, spec)
        for n, tensor in zip(places, moved, strict=True):
            placed[n] = tensor
    return placed


def fetch(tensor: Tensor) -> Tensor:
    """A copy on the CPU. Parts that are all here are put together here.

    torch-xla would gather them on the devices first, by a graph for each shape.
    """
    divided = tensor.device.type == "xla" and "devices" in (sharding_of(tensor) or "")
    if not divided or runtime().process_count() > 1:
        return tensor.detach().to("cpu", copy=True)
    made = torch.empty(tensor.shape, dtype=tensor.dtype)
    for shard in spmd().wrap_if_sharded(tensor.detach()).local_shards:
        made[tuple(shard.indices)] = shard.data
    return made


def on_cpu(state: Any) -> Any:
    """The tensors of an optimizer's state, in dicts of any depth, as copies on the CPU."""
    if isinstance(state, Tensor):
        made = fetch(state)
        return made.float() if made.dtype == torch.float64 else made  # torch's counts are fp32
    return {k: on_cpu(v) for k, v in state.items()} if isinstance(state, dict) else state


def checkpoint_for_xla(model: nn.Module) -> None:
    """Gradient checkpointing as torch-xla has it: XLA would merge torch's second forward pass."""
    from torch_xla.utils.checkpoint import checkpoint

    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=True)  # type: ignore[assignment]


def whole_products() -> None:
    """fp32 means fp32: a TPU would round the factors of a product to bf16."""
    from torch_xla.backends import set_mat_mul_precision

    logging.getLogger("torch_xla.backends").setLevel(logging.ERROR)  # it warns at every call
    set_mat_mul_precision("highest")
