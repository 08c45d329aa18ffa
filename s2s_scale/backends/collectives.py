"""Communication between the ranks of a run, as a value that the core asks a backend for.

``Collectives`` is the version for one process, in which nothing needs to be sent; fairseq2's
``Gang`` and ``FakeGang`` are the model. Each method is a collective: every rank must call it, in
the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


class Collectives:
    """The collectives of a single process: the identity."""

    @property
    def rank(self) -> int:
        """Which share of each step's rows this process takes, from 0; rank 0 writes the files."""
        return 0

    @property
    def world_size(self) -> int:
        """Number of shares into which the rows of each step are divided."""
        return 1

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """``value`` summed over all ranks, on every rank."""
        return value

    def sum_counts(self, count: int, device: torch.device) -> Tensor:
        """``count`` of this process summed over all processes, an int64 scalar on ``device``."""
        return self.all_reduce_sum(torch.tensor(count, device=device))

    def any_rank(self, flag: bool) -> bool:
        """Whether ``flag`` is true on any rank. Called at each step, so it must be cheap."""
        return flag

    def gather_rows(self, rows: Tensor, padding: int) -> Tensor:
        """All ranks' ``rows`` [B, T], rank after rank: [ranks * B, longest T], on every rank.

        B must be the same on all ranks; T may differ, shorter rows are padded on the right.
        """
        return rows

    def to_host(self, rows: Tensor) -> Tensor:
        """``rows`` [B, ...] of this process's batch in host memory.

        Where a process drives several devices, the rows of all of them.
        """
        return rows.cpu()

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's ``value``, in the order of ranks, on every rank."""
        return [value]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Context that rank 0 runs through before the other ranks enter."""
        yield


class TorchCollectives(Collectives):
    """The collectives of ``torch.distributed``'s default process group.

    Args:
        device: device type on which the group communicates tensors that are made here.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device("cuda" if device == "cuda" else "cpu")

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        if self.world_size == 1:
            return value
        summed = value.detach().clone()
        dist.all_reduce(summed)
        return summed

    def any_rank(self, flag: bool) -> bool:
        if self.world_size == 1:
            return flag
        # A value is read at each step anyhow (``skip_update_where``): one more costs little.
        value = torch.tensor(int(flag), dtype=torch.int32, device=self._device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def gather_rows(self, rows: Tensor, padding: int) -> Tensor:
        if self.world_size == 1:
            return rows
        width = torch.tensor(rows.shape[1], device=rows.device)
        dist.all_reduce(width, op=dist.ReduceOp.MAX)
        missing = int(width) - rows.shape[1]
        padded = nn.functional.pad(rows, (0, missing), value=padding).contiguous()
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded)
        return torch.cat(parts)

    def gather_objects(self, value: T) -> list[T]:
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    @contextmanager
    def main_first(self) -> Iterator[None]:
        if self.rank > 0:
            dist.barrier()
        yield
        if self.rank == 0 and self.world_size > 1:
            dist.barrier()
