"""Private parts of accelerate and torch that the FSDP2 adapter relies on."""

from __future__ import annotations

from torch import nn

from s2s_scale.compat import relies_on

ACCELERATE = ("1.14", "1.15")
"""First and last minor version that ``mark_prepared`` was tested with; older ones ignore it."""


@relies_on(
    "accelerate",
    checked=ACCELERATE,
    reason="prepare_model would wrap the model in DistributedDataParallel, which takes no DTensor",
    uses={
        "accelerate.Accelerator.prepare_model": ("model", "device_placement", "evaluation_mode"),
    },
)
def mark_prepared(model: nn.Module) -> None:
    """Make accelerate take ``model`` as it is: neither wrapped nor autocast."""
    model._is_accelerate_prepared = True  # type: ignore[assignment]


@relies_on(
    "torch",
    checked=("2.9", "2.13"),
    reason="fully_shard gives the model a new class, whose name would end up in saved configs",
    uses={"torch.distributed.fsdp.FSDPModule": None},
)
def keep_class_name(model: nn.Module, name: str) -> None:
    """Call the class that ``fully_shard`` has made for ``model`` by ``name``, as it was before."""
    type(model).__name__ = name
