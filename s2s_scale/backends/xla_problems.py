"""Versions and training arguments that do not go with XLA devices; used by ``xla`` alone."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

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
