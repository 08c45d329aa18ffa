"""The batch plan as samplers for ``torch.utils.data.DataLoader``, one rank's share each."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    GroupedPlan,
    ShapeGrid,
    Widths,
    choose_shapes,
    lay_out_groups,
    plan_groups,
)
from s2s_scale.data.load_balancing import share_groups

LABEL_PAD = -100


class ShapedRows(list[int]):
    """Row ids of a micro-batch, and the widths (source, target) that it is padded to.

    ``widths`` is None where the longest rows decide.
    """

    def __init__(self, rows: Iterable[int], widths: Widths | None = None) -> None:
        super().__init__(rows)
        self.widths = widths

    def with_examples(self, examples: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The rows themselves, with what this list knows of the batch."""
        return examples if self.widths is None else ShapedExamples(examples, self.widths)


@dataclass(frozen=True)
class MicroBatch:
    """What all ranks do at once: ``parts[rank]`` are the row ids of that rank.

    ``rows`` and ``widths`` say what each rank's part is filled up and padded to; None where that
    is free. ``spare``: a row that stands, marked, where a rank has none.
    """

    parts: Sequence[Rows]
    filler_row: int
    rows: int | None = None
    widths: Widths | None = None

    def of_rank(self, rank: int) -> ShapedRows:
        """One rank's row ids, at least one."""
        ids: list[int] = self.parts[rank].tolist()
        last = ids[-1] if ids else self.filler_row
        missing = max(1, self.rows or 1) - len(ids)
        return ShapedRows(ids + [~last] * missing, self.widths)

    def shapes(self, lengths: Lengths) -> list[tuple[int, int, int]]:
        """Rows, source width and target width of each rank's part after padding."""
        found = []
        for part in self.parts:
            rows = part if len(part) else np.array([self.filler_row])
            source, target = self.widths or (int(side[rows].max()) for side in lengths)
            found.append((self.rows or len(rows), source, target))
        return found

    def padded_tokens(self, lengths: Lengths) -> list[int]:
        """Source and target tokens of each rank's part after padding."""
        return [rows * (source + target) for rows, source, target in self.shapes(lengths)]


class EpochSampler(Sampler[int]):
    """This rank's row ids of an epoch, in the order in which it trains on them.

    ``plan`` is the current epoch's plan, the same on every rank. An id below 0 is ``~row``: a row
    that carries no loss (see ``FillerRows``). It stands where a rank has no row left in a
    micro-batch, and where a micro-batch of fixed shape is filled up.
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
    def divided(self, step: int) -> Iterator[MicroBatch]:
        """The micro-batches of a step of the current plan, counted from 0."""

    @property
    @abc.abstractmethod
    def n_micro_batches(self) -> int:
        """Micro-batches of an epoch: the same on every rank and in every epoch."""

    @property
    def plan(self) -> EpochPlan:
        """The plan of the current epoch."""
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

    def micro_batches(self) -> Iterator[ShapedRows]:
        """This rank's row ids, micro-batch after micro-batch, none empty."""
        for step in range(self.plan.steps):
            for batch in self.divided(step):
                yield batch.of_rank(self.rank)

    def __iter__(self) -> Iterator[int]:
        for rows in self.micro_batches():
            yield from rows

    def __len__(self) -> int:
        """Row ids of this rank, marked ones included."""
        return sum(map(len, self.micro_batches()))


class PlanSampler(EpochSampler):
    """Steps of ``rows_per_device * accumulation * world_size`` rows.

    With a ``num_buckets`` every micro-batch has exactly ``rows_per_device`` rows and one of at
    most so many widths, the same on all ranks, chosen from those that the first epoch would have.
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

    def divided(self, step: int) -> Iterator[MicroBatch]:
        rows = self.plan.rows(step)
        for parts in divide_step(
            rows, world_size=self.world_size, rows_per_device=self.rows_per_device
        ):
            filler_row = int(rows[-1])  # in sortish the shortest row, so it costs the least
            if self.grid is None or self.lengths is None:
                yield MicroBatch(parts, filler_row)
                continue
            together = np.concatenate(parts)
            widths = self.grid.holding(*(int(side[together].max()) for side in self.lengths))
            yield MicroBatch(parts, filler_row, self.rows_per_device, widths)

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
        """Row ids of this rank, marked ones included; every step but the last one is full."""
        if self.steps == 0:
            return 0
        full = (self.steps - 1) * self.accumulation * self.rows_per_device
        return full + sum(len(b.of_rank(self.rank)) for b in self.divided(self.steps - 1))


class TokenSampler(EpochSampler):
    """Steps of about ``tokens_per_step`` real tokens, source and target, over all ranks.

    A step holds ``groups_per_step`` groups of rows of like length (see ``plan_groups``), each cut
    into the same number of micro-batches on every rank, none with more than ``max_tokens`` padded
    tokens. With a ``num_buckets`` the micro-batches have at most so many shapes, and their rows
    are multiples of ``rows_multiple``.

    Raises ``ValueError`` where the longest row does not fit into a group or a micro-batch.
    """

    plan: GroupedPlan
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
        self.layout = lay_out_groups(
            lengths,
            tokens_per_step=tokens_per_step,
            groups_per_step=groups_per_step,
            grid=self.grid,
        )
        self.sharing = share_groups(
            self.layout,
            lengths,
            world_size=world_size,
            max_tokens=max_tokens,
            rows_multiple=rows_multiple,
        )
        self.accumulation = self.sharing.parts * groups_per_step

    def _make_plan(self, epoch: int) -> EpochPlan:
        return plan_groups(
            self.layout,
            groups_per_step=self.groups_per_step,
            seed=self.seed,
            epoch=epoch,
            drop_last=self.drop_last,
        )

    def divided(self, step: int) -> Iterator[MicroBatch]:
        groups = self.plan.groups_of(step)
        for number, parts in enumerate(self.sharing.divide(groups)):
            group, rows = groups[number // self.sharing.parts]
            filler_row = int(rows[-1])
            if self.sharing.rows is None:
                yield MicroBatch(parts, filler_row)
                continue
            source, target = self.layout.widths[group].tolist()
            yield MicroBatch(parts, filler_row, int(self.sharing.rows[group]), (source, target))

    @property
    def n_micro_batches(self) -> int:
        return len(self.plan.groups) * self.sharing.parts


class PlanBatchSampler(Sampler[list[int]]):
    """A rank's micro-batches as lists of row ids, for ``DataLoader(batch_sampler=...)``.

    ``len`` is the number of micro-batches of an epoch, the same on every rank. No list is empty.
    """

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler
        # Read by accelerate and by transformers' trainer where they look at a loader; a number of
        # tokens makes no constant number of rows.
        self.batch_size = getattr(sampler, "rows_per_device", None)
        self.drop_last = sampler.drop_last

    def set_epoch(self, epoch: int) -> None:
        """Plan another epoch, counted from 0."""
        self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.sampler.micro_batches()

    def __len__(self) -> int:
        return self.sampler.n_micro_batches


class ShapedExamples(list[Mapping[str, Any]]):
    """The rows of a micro-batch, and the widths that it is padded to (see ``PadToWidths``)."""

    def __init__(self, rows: Iterable[Mapping[str, Any]], widths: Widths | None = None) -> None:
        super().__init__(rows)
        self.widths = widths


class FillerRows(Dataset[Mapping[str, Any]]):
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
        found = fetch(real) if fetch and real else [self.dataset[row] for row in real]
        examples = [
            value if row >= 0 else _without_loss(value)
            for row, value in zip(rows, found, strict=True)
        ]
        return rows.with_examples(examples) if isinstance(rows, ShapedRows) else examples

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
