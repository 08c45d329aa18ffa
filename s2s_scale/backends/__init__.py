"""Backends: how a training step reaches the hardware; each is loaded only when it is chosen."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from s2s_scale.backends.base import Backend
from s2s_scale.errors import unknown_name

# Name in a launcher profile -> "module:class". The module is imported when the backend is chosen,
# so that a library that is not installed costs nothing until then.
BACKENDS: dict[str, str] = {
    "local": "s2s_scale.backends.base:Backend",
    "fairscale_oss": "s2s_scale.backends.fairscale_oss.backend:FairScaleBackend",
    "torch_fsdp": "s2s_scale.backends.torch_fsdp.backend:TorchFsdpBackend",
    "deepspeed": "s2s_scale.backends.deepspeed.backend:DeepSpeedBackend",
    "xla": "s2s_scale.backends.xla.backend:XlaBackend",
}


def make_backend(name: str, device: str, mesh: Mapping[str, int] | None = None) -> Backend:
    """The backend called ``name`` for ``device`` (cpu, cuda or tpu) and a profile's ``mesh``.

    Raises:
        UserError: no backend has that name.
    """
    if name not in BACKENDS:
        raise unknown_name("backend", name, BACKENDS)
    module, _, attribute = BACKENDS[name].partition(":")
    backend: Backend = getattr(importlib.import_module(module), attribute)(device, mesh)
    return backend


__all__ = ["BACKENDS", "Backend", "make_backend"]
