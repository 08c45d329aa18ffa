"""Optimizer state sent from rank to rank, one tensor at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _travels(value: Any) -> bool:
    """Whether a value is sent as a tensor of its own; step counters go with the description."""
    return isinstance(value, Tensor) and value.dim() > 0


def pass_on(
    moments: dict[str, Any], ranks: tuple[int, int, int], *, device: torch.device
) -> dict[str, Any]:
    """One parameter's state from its owner to the recipient, who gets it; others get nothing.

    ``ranks``: this one, the owner, and the recipient.
    """
    rank, owner, recipient = ranks
    if rank == owner:
        send({"state": {0: moments}}, recipient)
    if rank == recipient:
        return dict(receive(owner, device)["state"][0])
    return {}


def send(shard: dict[str, Any], recipient: int) -> None:
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


def receive(sender: int, device: torch.device) -> dict[str, Any]:
    """What ``send`` sent, on the CPU."""
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
