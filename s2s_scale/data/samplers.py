"""The batch plan as samplers for ``torch.utils.data.DataLoader``, one rank's share each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from s2s_scale.data.batching import (
    EpochPlan,
    Lengths,
    Mode,
    Rows,
    count_rows,
    divide_step,
    micro_batches_of_step,
    plan_epoch,
    steps_per_epoch,
)

LABEL_PAD = -100


class PlanSampler(Sampler[int]):
    """This rank's row ids of an epoch, in the order in which it trains on them.

    A step has ``rows_per_device * accumulation * world_size`` rows. ``plan`` is the current
    epoch's plan, the same on every rank. An id below 0 is ``~row``: a row that carries no loss,
    given to a rank for which the last micro-batch has no row left (see ``MarkedRows``). They
    appear only where ``world_size`` is above 1.
    """

    def __init__(
        self,
        lengths: Lengths | None = None,
        *,
        n_rows: int | None = None,
        rows_per_device: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        mode: Mode = "fixed",
        drop_last: bool = False,
    ) -> None:
        if min(rows_per_device, accumulation, world_size) < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"rows_per_device={rows_per_device}, accumulation={accumulation}, rank={rank}, "
                f"world_size={world_size}: expected sizes of at least 1 and a rank below them"
            )
        self.lengths = lengths
        self.n_rows = count_rows(lengths, n_rows)
        self.rows_per_device = rows_per_device
        self.accumulation = accumulation
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.mode: Mode = mode
        self.drop_last = drop_last
        self.epoch = 0
        self._plan: EpochPlan | None = None

    @property
    def rows_per_step(self) -> int:
        """Rows of a full optimizer step, over all ranks and micro-batches."""
        return self.rows_per_device * self.accumulation * self.world_size

    @property
    def plan(self) -> EpochPlan:
        """The plan of the current epoch."""
        if self._plan is None:
            self._plan = plan_epoch(
                self.lengths,
                n_rows=self.n_rows,
                rows_per_step=self.rows_per_step,
                seed=self.seed,
                epoch=self.epoch,
                mode=self.mode,
                drop_last=self.drop_last,
            )
        return self._plan

    def set_epoch(self, epoch: int) -> None:
        """Plan another epoch, counted from 0."""
        if epoch != self.epoch:
            self.epoch = epoch
            self._plan = None

    def micro_batches(self) -> Iterator[Rows]:
        """This rank's row ids, one int64 array a micro-batch, none empty."""
        for rows in self.plan:
            for parts in divide_step(
                rows, world_size=self.world_size, rows_per_device=self.rows_per_device
            ):
                mine = parts[self.rank]
                # The step's last row: in sortish its shortest one, so it costs the least.
                yield mine if len(mine) else ~rows[-1:]

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return steps_per_epoch(
            self.n_rows, rows_per_step=self.rows_per_step, drop_last=self.drop_last
        )

    @property
    def n_micro_batches(self) -> int:
        """Micro-batches of an epoch: the same on every rank and in every epoch."""
        if self.steps == 0:
            return 0
        last = micro_batches_of_step(
            len(self.plan.rows(self.steps - 1)),
            world_size=self.world_size,
            rows_per_device=self.rows_per_device,
        )
        return (self.steps - 1) * self.accumulation + last

    def __iter__(self) -> Iterator[int]:
        for rows in self.micro_batches():
            yield from rows.tolist()

    def __len__(self) -> int:
        """Row ids of this rank, marked ones included; every step but the last one is full."""
        if self.steps == 0:
            return 0
        last = divide_step(
            self.plan.rows(self.steps - 1),
            world_size=self.world_size,
            rows_per_device=self.rows_per_device,
        )
        full = (self.steps - 1) * self.accumulation * self.rows_per_device
        return full + sum(max(1, len(parts[self.rank])) for parts in last)


class PlanBatchSampler(Sampler[list[int]]):
    """A rank's micro-batches as lists of row ids, for ``DataLoader(batch_sampler=...)``.

    ``len`` is the number of micro-batches of an epoch, the same on every rank. No list is empty.
    """

    def __init__(self, sampler: PlanSampler) -> None:
        self.sampler = sampler
        # Read by accelerate and by transformers' trainer where they look at a loader.
        self.batch_size = sampler.rows_per_device
        self.drop_last = sampler.drop_last

    def set_epoch(self, epoch: int) -> None:
        """Plan another epoch, counted from 0."""
        self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        return (rows.tolist() for rows in self.sampler.micro_batches())

    def __len__(self) -> int:
        return self.sampler.n_micro_batches


class MarkedRows(Dataset[Mapping[str, Any]]):
    """A map-style data set in which ``~row`` is that row with all its labels at -100.

    Its tensors thus have real shapes, and its loss is zero. Ids from 0 on are the row itself.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        return self.dataset[row] if row >= 0 else _without_loss(self.dataset[~row])

    def __getitems__(self, rows: Sequence[int]) -> list[Mapping[str, Any]]:
        """Rows of a batch; one read where the data set offers it, as ``datasets`` does."""
        real = [row if row >= 0 else ~row for row in rows]
        fetch = getattr(self.dataset, "__getitems__", None)
        found = fetch(real) if fetch is not None else [self.dataset[row] for row in real]
        return [
            value if row >= 0 else _without_loss(value)
            for row, value in zip(rows, found, strict=True)
        ]

    @property
    def column_names(self) -> list[str]:
        """The data set's columns; ``AttributeError`` where it has no such attribute."""
        return list(self.dataset.column_names)


def _without_loss(row: Mapping[str, Any]) -> Mapping[str, Any]:
    labels = row.get("labels")
    if labels is None:
        return row
    marked: Any
    if isinstance(labels, torch.Tensor):
        marked = torch.full_like(labels, LABEL_PAD)
    elif isinstance(labels, np.ndarray):
        marked = np.full_like(labels, LABEL_PAD)
    else:
        marked = [LABEL_PAD] * len(labels)
    return {**row, "labels": marked}
