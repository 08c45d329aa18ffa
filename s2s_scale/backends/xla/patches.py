"""What this backend uses of the private parts of torch-xla, transformers and accelerate."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

from torch import Tensor, nn

from s2s_scale.compat import relies_on

TRANSFORMERS = ("5.17", "5.23")
TORCH_XLA = ("2.9", "2.9")


@relies_on(
    "torch-xla",
    checked=TORCH_XLA,
    reason="torch-xla has no public way to ask how a tensor is divided",
    uses={"torch_xla._XLAC._get_xla_sharding_spec": None},
)
def sharding_of(tensor: Tensor) -> str | None:
    """How a tensor on XLA devices is divided, in XLA's words; empty or None: not at all."""
    import torch_xla

    found: str | None = torch_xla._XLAC._get_xla_sharding_spec(tensor)
    return found


@relies_on(
    "transformers",
    checked=TRANSFORMERS,
    reason="where no position is a pad transformers leaves the attention mask out: to see that it "
    "waits for the device in each forward pass, and a batch without pads is another graph",
    uses={"transformers.masking_utils.is_tracing": ("tensor",)},
)
def always_build_masks() -> None:
    """Have transformers build attention masks of XLA tensors without looking into them.

    It does not look while it is traced.
    """
    masking_utils: Any = importlib.import_module("transformers.masking_utils")
    traced = masking_utils.is_tracing

    def is_tracing(tensor: Any = None) -> bool:
        on_xla = isinstance(tensor, Tensor) and tensor.device.type == "xla"
        return on_xla or bool(traced(tensor))

    if traced.__module__ != __name__:
        masking_utils.is_tracing = is_tracing


@relies_on(
    "transformers",
    checked=TRANSFORMERS,
    reason="XLA would merge the second forward pass of torch's gradient checkpointing with the "
    "first; torch-xla has one of its own",
    uses={"transformers.modeling_utils.PreTrainedModel._set_gradient_checkpointing": None},
)
def use_xla_checkpointing(model: nn.Module) -> None:
    """Let modules with gradient checkpointing use torch-xla's."""
    from torch_xla.utils.checkpoint import checkpoint

    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=True)  # type: ignore[assignment]


@relies_on(
    "accelerate",
    checked=("1.10", "1.15"),
    reason="accelerate knows no SPMD processes, and transformers lets process 0 alone write files "
    "and show progress",
    uses={"accelerate.PartialState": None},
)
def set_process_index(rank: int) -> None:
    """Tell accelerate, and transformers through it, this process's rank."""
    from accelerate import PartialState

    state: Any = PartialState()
    state.process_index = rank
