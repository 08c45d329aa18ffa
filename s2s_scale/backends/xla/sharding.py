"""Batches, weights and activations divided over the devices of a mesh."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor, nn

from s2s_scale.backends.xla.patches import sharding_of
from s2s_scale.backends.xla.runtime import runtime, spmd
from s2s_scale.errors import UserError

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


def by_rows(mesh: Any, dimensions: int, *, minibatch: bool) -> Any:
    """A tensor's first dimension divided over all devices; ``minibatch``: each host has a part."""
    return spmd().ShardingSpec(mesh, (AXES, *([None] * (dimensions - 1))), minibatch=minibatch)


class MeshSharding:
    """Divides tensors over all devices of a mesh with this shape, axis -> length or -1."""

    def __init__(self, shape: Mapping[str, int]) -> None:
        self._shape = shape
        self._rows: int | None = None  # of the batch that the model is called with

    @cached_property
    def mesh(self) -> Any:
        """torch-xla's mesh; made when first asked for, as devices are known then."""
        devices = runtime().global_runtime_device_count()
        return spmd().Mesh(np.arange(devices), mesh_lengths(self._shape, devices), AXES)

    def divide(self, tensors: Iterator[Tensor]) -> None:
        """Divide tensors over the axis ``fsdp``, each along one of its dimensions."""
        parts = mesh_lengths(self._shape, runtime().global_runtime_device_count())[1]
        for tensor in tensors:
            dimension = divided_dimension(tuple(tensor.shape), parts)
            if dimension is None or sharding_of(tensor):
                continue
            axes = [None if n != dimension else AXES[1] for n in range(tensor.dim())]
            spmd().mark_sharding(tensor, self.mesh, tuple(axes))

    def keep_activations_divided(self, model: nn.Module) -> None:
        """Keep hidden states sharded by rows: with sharded weights XLA would shard them by width.

        A layer's output, [B, T, d] or with its first two the other way round (FSMT), is divided by
        rows; so XLA gathers weights, as ZeRO 3 does.
        """
        if mesh_lengths(self._shape, runtime().global_runtime_device_count())[1] == 1:
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
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, Tensor) and hidden.dim() == 3:
            axes: list[Any] = [None, None, None]
            axes[rows_dimension(tuple(hidden.shape), self._rows)] = AXES
            spmd().mark_sharding(hidden, self.mesh, tuple(axes))
