"""What this backend uses of the private parts of FairScale: an OSS of our own."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from s2s_scale.compat import relies_on

if TYPE_CHECKING:
    from fairscale.optim import OSS
else:
    try:
        from fairscale.optim import OSS
    except ImportError:  # reported by problems(), which is called before anything is built
        OSS = Optimizer

RECIPIENT = 0
"""The rank that receives the whole state and writes it."""


@relies_on(
    "fairscale",
    checked=("0.4.13", "0.4.13"),
    reason="OSS broadcasts stale buffers once accelerate has wrapped the model, shards "
    "parameters unevenly",
    uses={
        "fairscale.optim.OSS.partition_parameters": (),
        "fairscale.optim.OSS.refresh_trainable": (),
        "fairscale.optim.OSS._clear_cache": (),
        "fairscale.optim.OSS._sync_param_groups": ("source", "destination"),
    },
)
class ShardedOptimizer(OSS):
    """OSS that survives being wrapped by accelerate, shards evenly, and saves with little memory.

    Plain OSS goes wrong without an error once the model has been wrapped: its parameters are no
    longer views of OSS's broadcast buffers, and every rank keeps its own updates only.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, optim: type[Optimizer], **options: Any
    ) -> None:
        # OSS's own copy of the options grows by what torch puts into an optimizer's defaults.
        self._optimizer_class: Any = optim
        self._own_options = dict(options)
        super().__init__(groups, optim=optim, **options)

    def partition_parameters(self) -> list[list[dict[str, Any]]]:
        """Each rank's parameter groups: the largest state first, to the emptiest rank.

        Longest-processing-time rule (Graham 1969); OSS's own order can leave one rank with twice
        another's share.
        """
        if not self._partition_parameters:
            owner = self.owners()
            self._partition_parameters: list[list[dict[str, Any]]] = [
                [
                    {**group, "params": [p for p in group["params"] if owner[id(p)] == rank]}
                    for group in self.param_groups
                ]
                for rank in range(self.world_size)
            ]
        return self._partition_parameters

    def owners(self) -> dict[int, int]:
        """id of a parameter -> the rank that updates it."""
        sizes = [0] * self.world_size
        owner: dict[int, int] = {}
        parameters = list(chain.from_iterable(group["params"] for group in self.param_groups))
        state = {shape: self._state_size(shape) for shape in {p.shape for p in parameters}}
        # Stable, so that it is the same on all ranks.
        for parameter in sorted(parameters, key=lambda p: (-state[p.shape], -p.numel())):
            rank = sizes.index(min(sizes))
            owner[id(parameter)] = rank
            sizes[rank] += state[parameter.shape] if parameter.requires_grad else 1
        return owner

    def _state_size(self, shape: torch.Size) -> int:
        """Numbers that the optimizer keeps for a parameter of this shape.

        Found by a step on tensors without data: Adafactor keeps sums of rows and columns, so that
        its state is no multiple of the parameter. An optimizer that cannot step there counts as
        one that keeps a multiple.
        """
        parameter = nn.Parameter(torch.empty(shape, device="meta"))
        parameter.grad = torch.empty(shape, device="meta")
        try:
            probe = self._optimizer_class([parameter], **self._own_options)
            probe.step()
        except (RuntimeError, NotImplementedError, ValueError):
            return shape.numel()
        kept = (v for v in probe.state[parameter].values() if isinstance(v, Tensor) and v.dim())
        return sum(value.numel() for value in kept) or 1

    def step(self, closure: Callable[[], float] | None = None, **kwargs: Any) -> float | None:
        if not self._broadcasts_parameters():
            self._clear_cache()
            self.refresh_trainable()
        return super().step(closure, **kwargs)

    def _broadcasts_parameters(self) -> bool:
        """Whether each trainable parameter still is a view of the buffer that is broadcast."""
        buffers = {
            bucket.buffer.untyped_storage().data_ptr()
            for buckets in self.buckets.values()
            for bucket in buckets.values()
        }
        return all(
            parameter.untyped_storage().data_ptr() in buffers
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.requires_grad
        )

    def state_dict(self, all_ranks: bool = False) -> dict[str, Any]:
        """As OSS's own; empty before the first step, when accelerate asks for it."""
        if not self._all_states and not self.optim.state:
            return Optimizer.state_dict(self)
        return super().state_dict(all_ranks)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep this rank's share of a whole state; saved at any number of ranks."""
        Optimizer.load_state_dict(self, {**state_dict, "state": {}})
        self._sync_param_groups(self.param_groups, self.optim.param_groups)
        parameters = list(chain.from_iterable(group["params"] for group in self.param_groups))
        index = {id(parameter): place for place, parameter in enumerate(parameters)}
        mine = chain.from_iterable(group["params"] for group in self.optim.param_groups)
        shard = self.optim.state_dict()
        shard["state"] = {
            place: state_dict["state"][index[id(parameter)]]
            for place, parameter in enumerate(mine)
            if index[id(parameter)] in state_dict["state"]
        }
        self.optim.load_state_dict(shard)
