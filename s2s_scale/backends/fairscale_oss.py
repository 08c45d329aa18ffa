"""FairScale OSS: data parallel as in ``local``, the optimizer's state shared out over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from s2s_scale.backends.base import ParameterState
from s2s_scale.backends.local import LocalBackend, on_host

if TYPE_CHECKING:
    from fairscale.optim import OSS
else:
    try:
        from fairscale.optim import OSS
    except ImportError:  # said by problems(), which comes before anything is built
        OSS = Optimizer

RECIPIENT = 0
"""The rank that receives the whole state and writes it."""


class FairScaleBackend(LocalBackend):
    """Each rank keeps the optimizer state of its share of the parameters, and updates those."""

    def problems(self) -> Sequence[str]:
        missing = (
            []
            if find_spec("fairscale")
            else [
                "backend fairscale_oss: the package fairscale is not installed; "
                "pip install 's2s-scale[oss]', or pip install fairscale"
            ]
        )
        return [*missing, *super().problems()]

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

    @contextmanager
    def consolidated_state(self, optimizer: Any) -> Iterator[None]:
        sharded = sharded_optimizer(optimizer)
        sharded.consolidate_state_dict(RECIPIENT)
        try:
            yield
        finally:
            sharded.forget_whole_state()

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
                moments = _pass_on(moments, ranks, device=parameter.device)
            if self.collectives.rank == writer:
                moments = {k: on_host(v) for k, v in moments.items() if v is not None}
                yield ParameterState(name, on_host(parameter), moments)
            else:
                yield ParameterState(name, None, {})

    def _state_holder(self, optimizer: Any) -> Any:
        return sharded_optimizer(optimizer).optim


def sharded_optimizer(optimizer: Any) -> ShardedOptimizer:
    """The OSS optimizer inside what the trainer has wrapped it in."""
    while not isinstance(optimizer, ShardedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


class ShardedOptimizer(OSS):
    """OSS that survives being wrapped by accelerate, shares out evenly, and saves frugally.

    Plain OSS goes wrong there without an error: after the model has been wrapped, its parameters
    are no longer views of OSS's broadcast buffers, and every rank keeps only its own updates.
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

    def consolidate_state_dict(self, recipient_rank: int = RECIPIENT) -> None:
        """Bring every rank's state to the recipient's host memory, one tensor at a time.

        Every rank must call it. OSS's own way sends each rank's whole share to all ranks at once.
        """
        self._sync_param_groups(self.param_groups, self.optim.param_groups)
        self._all_states = []
        for rank in range(self.world_size):
            if self.rank == recipient_rank == rank:
                self._all_states.append(_on_host(self.optim.state_dict()))
            elif self.rank == rank:
                _send(self.optim.state_dict(), recipient_rank)
            elif self.rank == recipient_rank:
                self._all_states.append(_receive(rank, self._default_device))

    def forget_whole_state(self) -> None:
        """Free what ``consolidate_state_dict`` collected."""
        self._all_states = []

    def state_dict(self, all_ranks: bool = False) -> dict[str, Any]:
        """The whole state, as the unsharded optimizer would give it.

        Before the first step there is none; accelerate asks for it then.

        Raises:
            RuntimeError: ``consolidate_state_dict`` has not brought the state to this rank.
        """
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


def _on_host(shard: dict[str, Any]) -> dict[str, Any]:
    state = {
        place: {k: v.cpu() if isinstance(v, Tensor) else v for k, v in values.items()}
        for place, values in shard["state"].items()
    }
    return {**shard, "state": state}


def _travels(value: Any) -> bool:
    """Whether a value is sent as a tensor of its own; step counters go with the description."""
    return isinstance(value, Tensor) and value.dim() > 0


def _pass_on(
    moments: dict[str, Any], ranks: tuple[int, int, int], *, device: torch.device
) -> dict[str, Any]:
    """One parameter's state from its owner to the recipient, who gets it; others get nothing.

    ``ranks``: this one, the owner, and the recipient.
    """
    rank, owner, recipient = ranks
    if rank == owner:
        _send({"state": {0: moments}}, recipient)
    if rank == recipient:
        return dict(_receive(owner, device)["state"][0])
    return {}


def _send(shard: dict[str, Any], recipient: int) -> None:
    """Send a rank's optimizer state: what it consists of, then tensor after tensor."""
    description = {
        place: {
            k: (tuple(v.shape), v.dtype) if _travels(v) else v.cpu() if isinstance(v, Tensor) else v
            for k, v in values.items()
        }
        for place, values in shard["state"].items()
    }
    sent = {place: [k for k, v in s.items() if _travels(v)] for place, s in shard["state"].items()}
    dist.send_object_list([{**shard, "state": description}, sent], dst=recipient)
    for place, names in sent.items():
        for name in names:
            dist.send(shard["state"][place][name].contiguous(), dst=recipient)


def _receive(sender: int, device: torch.device) -> dict[str, Any]:
    """What ``_send`` sent, on the CPU."""
    received: list[Any] = [None, None]
    dist.recv_object_list(received, src=sender)
    shard, sent = received
    for place, names in sent.items():
        for name in names:
            shape, dtype = shard["state"][place][name]
            buffer = torch.empty(shape, dtype=dtype, device=device)
            dist.recv(buffer, src=sender)
            shard["state"][place][name] = buffer.cpu()
    return dict(shard)
