"""Weights and activations divided over the devices of a mesh; used by ``xla`` alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor, nn

from s2s_scale.backends.xla.patches import sharding_of
from s2s_scale.backends.xla.runtime import (
    AXES,
    divided_dimension,
    mesh_lengths,
    rows_dimension,
    runtime,
    spmd,
)


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
        """Divided weights must not make XLA divide hidden states by their width.

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
