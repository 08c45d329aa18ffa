"""What is asked of torch-xla, and what must be set in a process before it uses XLA devices."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2s_scale.backends.xla.patches import sharding_of
from s2s_scale.utils import package_version

CACHE_VARIABLE = "XLA_PERSISTENT_CACHE_PATH"
"""Folder of compiled graphs, read by torch-xla itself; empty: none are kept."""


def keep_compiled_graphs() -> None:
    """Let torch-xla keep compiled graphs in our cache folder, where a restarted run finds them."""
    if CACHE_VARIABLE not in os.environ:
        base = os.environ.get("S2S_SCALE_CACHE") or Path("~/.cache/s2s_scale").expanduser()
        os.environ[CACHE_VARIABLE] = str(Path(base, "xla"))
    if os.environ[CACHE_VARIABLE]:
        Path(os.environ[CACHE_VARIABLE]).mkdir(parents=True, exist_ok=True)
    else:
        del os.environ[CACHE_VARIABLE]


OWN_TORCH = "it is built for one exact torch, so give it an environment of its own"


def versions_apart() -> list[str]:
    """A problem where torch and torch-xla are of different versions."""
    ours, wanted = package_version("torch"), package_version("torch-xla")
    if ours is None or wanted is None or ours.split(".")[:2] == wanted.split(".")[:2]:
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
        problems.append(
            f"optim={values['optim']}: does not support XLA devices; give --optim adamw_torch"
        )
    return problems


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
    """Run what was recorded so far."""
    import torch_xla

    torch_xla.sync()


def compilations() -> tuple[int, float]:
    """How many graphs were compiled, and the seconds it took."""
    import torch_xla.debug.metrics as metrics

    data = metrics.metric_data("CompileTime")  # (count, total nanoseconds, samples)
    return (int(data[0]), float(data[1]) / 1e9) if data else (0, 0.0)


def to_device(tensors: list[Tensor], device: torch.device, sharding: Any) -> list[Tensor]:
    """Copy to ``device``, in one transfer for all tensors of the same number of dimensions."""
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
    """A copy on the CPU; where every shard is on this host, they are assembled here.

    torch-xla would gather them on the devices first, with a graph for each shape.
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


def use_exact_matmul() -> None:
    """fp32 means fp32: a TPU would round the operands of a matmul to bf16."""
    from torch_xla.backends import set_mat_mul_precision

    logging.getLogger("torch_xla.backends").setLevel(logging.ERROR)  # it warns at every call
    set_mat_mul_precision("highest")
