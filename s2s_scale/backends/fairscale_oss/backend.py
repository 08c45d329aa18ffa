"""FairScale OSS: data parallel, with the optimizer's state sharded over ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from s2s_scale.backends.base import Backend, ParameterState, ReadState, on_host
from s2s_scale.backends.fairscale_oss.patches import RECIPIENT, ShardedOptimizer
from s2s_scale.backends.fairscale_oss.transfer import pass_on


class FairScaleBackend(Backend):
    """Each rank keeps the optimizer state of its share of the parameters, and updates those."""

    name = "fairscale_oss"
    plain_backward = False

    def problems(self) -> Sequence[str]:
        if find_spec("fairscale"):
            return super().problems()
        return [
            "backend fairscale_oss: the package fairscale is not installed; "
            "pip install 's2s-scale[oss]', or pip install fairscale",
            *super().problems(),
        ]

    def prepare_process(self) -> None:
        super().prepare_process()
        if not dist.is_initialized():  # OSS asks its process group even where it is alone
            store = torch.distributed.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group("gloo", store=store, rank=0, world_size=1)

    def build_optimizer(
        self,
        optimizer_class: type[Optimizer],
        groups: list[dict[str, Any]],
        options: Mapping[str, Any],
    ) -> Optimizer:
        return ShardedOptimizer(groups, optim=optimizer_class, **options)

    def writers(self, model: nn.Module, optimizer: Any) -> dict[str, int]:
        if optimizer is None:
            return super().writers(model, optimizer)
        owners = sharded_optimizer(optimizer).owners()
        return {name: owners.get(id(p), RECIPIENT) for name, p in model.named_parameters()}

    def state(
        self, model: nn.Module, optimizer: Any, writers: Mapping[str, int] | None = None
    ) -> Iterator[ParameterState]:
        sharded = sharded_optimizer(optimizer) if optimizer is not None else None
        owners = sharded.owners() if sharded is not None else {}
        for name, parameter in model.named_parameters():
            writer = (writers or {}).get(name, RECIPIENT)
            owner = owners.get(id(parameter), writer)
            moments = {} if sharded is None else sharded.optim.state.get(parameter, {})
            if owner != writer:
                ranks = (self.collectives.rank, owner, writer)
                moments = pass_on(moments, ranks, device=parameter.device)
            if self.collectives.rank == writer:
                moments = {k: on_host(v) for k, v in moments.items() if v is not None}
                yield ParameterState(name, on_host(parameter), moments)
            else:
                yield ParameterState(name, None, {})

    def load_state(
        self, model: nn.Module, optimizer: Any, read: ReadState, *, moments: bool = True
    ) -> None:
        own_share = sharded_optimizer(optimizer).optim if moments else None
        super().load_state(model, own_share, read, moments=moments)


def sharded_optimizer(optimizer: Any) -> ShardedOptimizer:
    """The OSS optimizer inside what the trainer has wrapped it in."""
    while not isinstance(optimizer, ShardedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer
