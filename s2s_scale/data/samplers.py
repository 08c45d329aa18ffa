"""Samplers: the batch plan as micro-batches of one rank, for ``torch.utils.data.DataLoader``."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from s2s_scale.data.batch_plan import (
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
from s2s_scale.data.buckets import (
    BucketPlan,
    ShapeGrid,
    Widths,
    choose_shapes,
    make_buckets,
    plan_buckets,
)
from s2s_scale.data.load_balancing import balance_loads
from s2s_scale.utils import IGNORE_INDEX


class MicroBatch(list[Any]):
    """One rank's micro-batch: row ids, or the examples themselves once they have been fetched.

    An id below 0 is ``~row``, a filler row: one that carries no loss (see ``FillerRows``).

    Args:
        items: row ids or examples. In a packed micro-batch these are pairs, row after row.
        widths: source and target width that every row is padded to; None: to its longest row.
        counts: in a packed micro-batch the number of pairs in each row, 0 in a filler row.
    """

    def __init__(
        self,
        items: Iterable[Any] = (),
        widths: Widths | None = None,
        counts: Sequence[int] | None = None,
    ) -> None:
        super().__init__(items)
        self.widths = widths
        self.counts = None if counts is None else list(counts)

    def with_items(self, items: Iterable[Any]) -> MicroBatch:
        """The same micro-batch with examples in place of ids."""
        return MicroBatch(items, self.widths, self.counts)

    @property
    def rows(self) -> Rows:
        """The ids of the rows that carry loss: int64 [rows]."""
        ids = np.array(self, dtype=np.int64)
        return ids[ids >= 0]

    def shape(self, lengths: Lengths) -> tuple[int, int, int]:
        """Rows, source width and target width after padding. Only for a micro-batch of ids."""
        ids = np.array(self, dtype=np.int64)
        ids = np.where(ids < 0, ~ids, ids)
        if self.counts is None:
            source, target = self.widths or (int(side[ids].max()) for side in lengths)
            return len(self), source, target
        row_of_pair = np.repeat(np.arange(len(self.counts)), self.counts)
        source, target = self.widths or (
            max(1, int(np.bincount(row_of_pair, weights=side[ids]).max(initial=0)))
            for side in lengths
        )
        return len(self.counts), source, target

    def padded_tokens(self, lengths: Lengths) -> int:
        """Source and target tokens after padding."""
        rows, source, target = self.shape(lengths)
        return rows * (source + target)


def fill(
    parts: Sequence[Rows], filler: int, *, rows: int | None = None, widths: Widths | None = None
) -> list[MicroBatch]:
    """The micro-batches of all ranks, each completed to ``rows`` rows, or else to at least one.

    ``parts``: row ids of each rank. Fillers are copies of a rank's last row, or of row ``filler``
    for a rank without rows.
    """
    batches = []
    for part in parts:
        ids: list[int] = part.tolist()
        last = ids[-1] if ids else filler
        batches.append(MicroBatch(ids + [~last] * (max(1, rows or 1) - len(ids)), widths))
    return batches


class EpochSampler(Sampler[int]):
    """This rank's row ids of an epoch, in training order.

    Ids below 0 are filler rows (see ``FillerRows``). They complete micro-batches of fixed shape,
    and stand in on a rank that has no row in a micro-batch.
    """

    accumulation: int
    """Micro-batches of a full step, on every rank."""
    drop_last: bool
    lengths: Lengths | None

    def __init__(self, *, rank: int, world_size: int, seed: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.epoch = 0
        self._plan: EpochPlan | None = None

    @abc.abstractmethod
    def _make_plan(self, epoch: int) -> EpochPlan:
        """The plan of an epoch."""

    @abc.abstractmethod
    def divide(self, step: int) -> Iterator[list[MicroBatch]]:
        """The micro-batches of a step, counted from 0, each as a list with one per rank."""

    @property
    @abc.abstractmethod
    def n_micro_batches(self) -> int:
        """Micro-batches of an epoch: the same on every rank and in every epoch."""

    @property
    def plan(self) -> EpochPlan:
        """The plan of the current epoch, the same on every rank."""
        if self._plan is None:
            self._plan = self._make_plan(self.epoch)
        return self._plan

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch, the same in every epoch."""
        return self.plan.steps

    def set_epoch(self, epoch: int) -> None:
        """Plan another epoch, counted from 0."""
        if epoch != self.epoch:
            self.epoch = epoch
            self._plan = None

    def micro_batches(self) -> Iterator[MicroBatch]:
        """This rank's micro-batches of the epoch. None is empty."""
        for step in range(self.plan.steps):
            for batches in self.divide(step):
                yield batches[self.rank]

    def __iter__(self) -> Iterator[int]:
        for rows in self.micro_batches():
            yield from rows

    def __len__(self) -> int:
        """Row ids of this rank, fillers included."""
        return sum(map(len, self.micro_batches()))


class PlanSampler(EpochSampler):
    """Steps of ``rows_per_device * accumulation * world_size`` rows.

    With ``num_buckets`` every micro-batch has exactly ``rows_per_device`` rows and one of at most
    that many shapes, the same on all ranks. They are chosen from those that the micro-batches of
    the first epoch would have.

    Raises:
        ValueError: a size or rank is out of range, or lengths are missing.
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
        num_buckets: int | None = None,
    ) -> None:
        super().__init__(rank=rank, world_size=world_size, seed=seed)
        if min(rows_per_device, accumulation, world_size) < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"rows_per_device={rows_per_device}, accumulation={accumulation}, rank={rank}, "
                f"world_size={world_size}: expected sizes of at least 1 and a rank below them"
            )
        self.lengths = lengths
        self.n_rows = count_rows(lengths, n_rows)
        self.rows_per_device = rows_per_device
        self.accumulation = accumulation
        self.mode: Mode = mode
        self.drop_last = drop_last
        self.grid = None if num_buckets is None else self._choose_grid(num_buckets)

    @property
    def rows_per_step(self) -> int:
        """Rows of a full optimizer step, over all ranks and micro-batches."""
        return self.rows_per_device * self.accumulation * self.world_size

    def _make_plan(self, epoch: int) -> EpochPlan:
        return plan_epoch(
            self.lengths,
            n_rows=self.n_rows,
            rows_per_step=self.rows_per_step,
            seed=self.seed,
            epoch=epoch,
            mode=self.mode,
            drop_last=self.drop_last,
        )

    def _choose_grid(self, num_buckets: int) -> ShapeGrid:
        """Shapes for the widest source and target of each micro-batch of the first epoch."""
        if self.lengths is None:
            raise ValueError(f"num_buckets={num_buckets}: needs the lengths of the rows")
        if self.n_rows == 0:
            return ShapeGrid(((1, 1),))
        order = self._make_plan(0).order
        starts = np.arange(0, len(order), self.rows_per_device * self.world_size)
        # Other epochs may put any rows together: the last shape holds the longest of both sides.
        source, target = (
            np.append(np.maximum.reduceat(side[order], starts) if len(order) else [], side.max())
            for side in self.lengths
        )
        widest = (source.astype(np.int32), target.astype(np.int32))
        return choose_shapes(widest, num_buckets=num_buckets)

    def divide(self, step: int) -> Iterator[list[MicroBatch]]:
        rows = self.plan.rows(step)
        filler = int(rows[-1])  # in sortish the shortest row, so it costs the least
        for parts in divide_step(
            rows, world_size=self.world_size, rows_per_device=self.rows_per_device
        ):
            if self.grid is None or self.lengths is None:
                yield fill(parts, filler)
                continue
            together = np.concatenate(parts)
            widths = self.grid.holding(*(int(side[together].max()) for side in self.lengths))
            yield fill(parts, filler, rows=self.rows_per_device, widths=widths)

    @property
    def steps(self) -> int:
        return steps_per_epoch(
            self.n_rows, rows_per_step=self.rows_per_step, drop_last=self.drop_last
        )

    @property
    def n_micro_batches(self) -> int:
        if self.steps == 0:
            return 0
        last = micro_batches_of_step(
            len(self.plan.rows(self.steps - 1)),
            world_size=self.world_size,
            rows_per_device=self.rows_per_device,
        )
        return (self.steps - 1) * self.accumulation + last

    def __len__(self) -> int:
        """Row ids of this rank, fillers included."""
        if self.steps == 0:
            return 0
        full = (self.steps - 1) * self.accumulation * self.rows_per_device  # all but the last
        return full + sum(len(batches[self.rank]) for batches in self.divide(self.steps - 1))


class TokenSampler(EpochSampler):
    """Steps of about ``tokens_per_step`` real tokens, source and target, over all ranks.

    A step has ``groups_per_step`` buckets (see ``plan_buckets``), each divided into the same number
    of micro-batches on every rank, none with more than ``max_tokens`` padded tokens. With
    ``num_buckets`` the micro-batches have at most that many shapes, and their rows are multiples of
    ``rows_multiple``.

    Raises:
        UserError: the longest row does not fit into a bucket or a micro-batch.
    """

    plan: BucketPlan
    lengths: Lengths

    def __init__(
        self,
        lengths: Lengths,
        *,
        tokens_per_step: int,
        groups_per_step: int,
        max_tokens: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        drop_last: bool = False,
        num_buckets: int | None = None,
        rows_multiple: int = 1,
    ) -> None:
        super().__init__(rank=rank, world_size=world_size, seed=seed)
        self.lengths = lengths
        self.drop_last = drop_last
        self.tokens_per_step = tokens_per_step
        self.groups_per_step = groups_per_step
        self.grid = None
        if num_buckets is not None and len(lengths[0]):
            self.grid = choose_shapes(lengths, num_buckets=num_buckets)
        self.layout = make_buckets(
            lengths,
            tokens_per_step=tokens_per_step,
            groups_per_step=groups_per_step,
            grid=self.grid,
        )
        self.balancer = balance_loads(
            self.layout,
            lengths,
            world_size=world_size,
            max_tokens=max_tokens,
            rows_multiple=rows_multiple,
        )
        self.accumulation = self.balancer.parts * groups_per_step

    def _make_plan(self, epoch: int) -> EpochPlan:
        return plan_buckets(
            self.layout,
            groups_per_step=self.groups_per_step,
            seed=self.seed,
            epoch=epoch,
            drop_last=self.drop_last,
        )

    def divide(self, step: int) -> Iterator[list[MicroBatch]]:
        buckets = self.plan.buckets_of(step)
        for number, parts in enumerate(self.balancer.divide(buckets)):
            bucket, rows = buckets[number // self.balancer.parts]
            filler = int(rows[-1])
            if self.balancer.rows is None:
                yield fill(parts, filler)
                continue
            source, target = self.layout.widths[bucket].tolist()
            size = int(self.balancer.rows[bucket])
            yield fill(parts, filler, rows=size, widths=(source, target))

    @property
    def n_micro_batches(self) -> int:
        return len(self.plan.buckets) * self.balancer.parts


class PlanBatchSampler(Sampler[list[int]]):
    """A rank's micro-batches, for ``DataLoader(batch_sampler=...)``.

    ``len`` is the number of micro-batches of an epoch, the same on every rank.
    """

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler
        # accelerate and transformers' trainer read both attributes. The number of rows is not
        # constant where tokens are counted.
        self.batch_size = getattr(sampler, "rows_per_device", None)
        self.drop_last = sampler.drop_last

    def set_epoch(self, epoch: int) -> None:
        """Plan another epoch, counted from 0."""
        self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[MicroBatch]:
        yield from self.sampler.micro_batches()

    def __len__(self) -> int:
        return self.sampler.n_micro_batches


class FillerRows(Dataset[Mapping[str, Any]]):
    """A map-style data set in which ``~row`` is a filler row: that row without any loss.

    All of its labels are ``IGNORE_INDEX``. Its tensors have real shapes, and its loss is zero.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        return self.dataset[row] if row >= 0 else _without_loss(self.dataset[~row])

    def __getitems__(self, rows: Sequence[int]) -> list[Mapping[str, Any]]:
        """The rows of a batch, as a ``MicroBatch`` if ``rows`` is one."""
        real = [row if row >= 0 else ~row for row in rows]
        fetch = getattr(self.dataset, "__getitems__", None)
        found = fetch(real) if fetch and real else [self.dataset[row] for row in real]
        examples = [
            value if row >= 0 else _without_loss(value)
            for row, value in zip(rows, found, strict=True)
        ]
        return rows.with_items(examples) if isinstance(rows, MicroBatch) else examples

    @property
    def column_names(self) -> list[str]:
        """The columns of the data set; ``AttributeError`` if it has no such attribute."""
        return list(self.dataset.column_names)


def _without_loss(row: Mapping[str, Any]) -> Mapping[str, Any]:
    labels = row.get("labels")
    if labels is None:
        return row
    ignored: Any
    if isinstance(labels, torch.Tensor):
        ignored = torch.full_like(labels, IGNORE_INDEX)
    elif isinstance(labels, np.ndarray):
        ignored = np.full_like(labels, IGNORE_INDEX)
    else:
        ignored = [IGNORE_INDEX] * len(labels)
    return {**row, "labels": ignored}
