"""What is asked of torch-xla, and what must be set in a process before it uses XLA devices."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2s_scale.backends.xla.patches import sharding_of
from s2s_scale.errors import UserError

CACHE_VARIABLE = "XLA_PERSISTENT_CACHE_PATH"
"""Folder of compiled graphs, read by torch-xla itself; empty: none are kept."""


def keep_compiled_graphs() -> None:
    """A restarted run finds its graphs in a folder of the cache."""
    if CACHE_VARIABLE not in os.environ:
        base = os.environ.get("S2S_SCALE_CACHE") or Path("~/.cache/s2s_scale").expanduser()
        os.environ[CACHE_VARIABLE] = str(Path(base, "xla"))
    if os.environ[CACHE_VARIABLE]:
        Path(os.environ[CACHE_VARIABLE]).mkdir(parents=True, exist_ok=True)
    else:
        del os.environ[CACHE_VARIABLE]


OWN_TORCH = "it is built for one exact torch, so give it an environment of its own"


def versions_apart() -> list[str]:
    """A problem where torch and torch-xla are not of one version."""
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


def without_effect(values: Mapping[str, Any]) -> list[str]:
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


AXES = ("data", "fsdp")
"""Batches are divided by rows over both axes; weights over the second, if at all."""


def mesh_lengths(wanted: Mapping[str, int], devices: int) -> tuple[int, int]:
    """Lengths of the axes data and fsdp; -1 stands for all devices that the other leaves.

    Raises:
        UserError: an unknown axis, or lengths whose product is not the number of devices.
    """
    unknown = sorted(set(wanted) - set(AXES))
    lengths = [wanted.get(axis, 1) for axis in AXES]
    open_axes = [n for n, length in enumerate(lengths) if length == -1]
    if len(open_axes) == 1:
        lengths[open_axes[0]] = devices // lengths[1 - open_axes[0]]
    if unknown or len(open_axes) > 1 or lengths[0] * lengths[1] != devices:
        raise UserError(
            f"mesh: {dict(wanted)} for {devices} devices: expected the axes data and fsdp, whose "
            "lengths multiply to the number of devices (-1 for one of them: all that are left); "
            "change it in the profile"
        )
    return lengths[0], lengths[1]


def divided_dimension(shape: tuple[int, ...], parts: int) -> int | None:
    """The longest dimension that divides evenly into ``parts``; None where none does."""
    fitting = [n for n, length in enumerate(shape) if length % parts == 0 and length >= parts]
    return max(fitting, key=lambda n: shape[n]) if fitting and parts > 1 else None


def rows_dimension(shape: tuple[int, ...], rows: int | None) -> int:
    """Which of a hidden state's first two dimensions counts the batch's ``rows``; 0 in doubt."""
    return 1 if rows is not None and shape[0] != rows == shape[1] else 0


def runtime() -> Any:
    import torch_xla.runtime

    return torch_xla.runtime


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


def by_rows(mesh: Any, dimensions: int, *, minibatch: bool) -> Any:
    """A tensor's first dimension divided over all devices; ``minibatch``: each host has a part."""
    return spmd().ShardingSpec(mesh, (AXES, *([None] * (dimensions - 1))), minibatch=minibatch)


def to_device(tensors: list[Tensor], device: torch.device, sharding: Any) -> list[Tensor]:
    """One transfer for all tensors of a like number of dimensions."""
    from torch_xla.core.xla_model import send_cpu_data_to_device

    placed = list(tensors)
    for dimensions in {tensor.dim() for tensor in tensors}:
        places = [n for n, tensor in enumerate(tensors) if tensor.dim() == dimensions]
        spec = sharding(dimensions) if sharding is not None and dimensions else None
        moved = send_cpu_data_to_device([tensors[n] for n in places], device, spec)
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


def whole_products() -> None:
    """fp32 means fp32: a TPU would round the factors of a product to bf16."""
    from torch_xla.backends import set_mat_mul_precision

    logging.getLogger("torch_xla.backends").setLevel(logging.ERROR)  # it warns at every call
    set_mat_mul_precision("highest")
