"""The packed plan as a sampler: which packed rows each rank runs in which micro-batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from s2s_scale.config import DEFAULT_PACKED_TOKENS
from s2s_scale.data.batching import Rows
from s2s_scale.data.lengths import Lengths
from s2s_scale.data.packing import PackedPlan, lay_out_packed, plan_packed
from s2s_scale.data.samplers import EpochSampler, MicroBatch, ShapedExamples, ShapedRows
from s2s_scale.data.shapes import Widths
from s2s_scale.errors import UserError


class PackedRows(ShapedRows):
    """Pair ids of a micro-batch, packed row after packed row.

    ``counts``: pairs of each row, 0 for one that only fills up.
    """

    def __init__(
        self, pairs: Iterable[int], widths: Widths | None = None, counts: Sequence[int] = ()
    ) -> None:
        super().__init__(pairs, widths)
        self.counts = list(counts)

    def with_examples(self, examples: list[Mapping[str, Any]]) -> PackedExamples:
        return PackedExamples(examples, self.widths, self.counts)


class PackedExamples(ShapedExamples):
    """The pairs of a micro-batch, packed row after packed row; see ``PackedRows``."""

    def __init__(
        self,
        pairs: Iterable[Mapping[str, Any]],
        widths: Widths | None = None,
        counts: Sequence[int] = (),
    ) -> None:
        super().__init__(pairs, widths)
        self.counts = list(counts)


@dataclass(frozen=True)
class PackedBatch(MicroBatch):
    """What all ranks do at once: ``parts[rank]`` are that rank's pairs, row after row.

    ``counts[rank]``: pairs of each of its packed rows.
    """

    counts: Sequence[Rows] = ()

    def of_rank(self, rank: int) -> PackedRows:
        counts: list[int] = self.counts[rank].tolist()
        missing = max(1, self.rows or 1) - len(counts)
        return PackedRows(self.parts[rank].tolist(), self.widths, counts + [0] * missing)

    def shapes(self, lengths: Lengths) -> list[tuple[int, int, int]]:
        found = []
        for pairs, counts in zip(self.parts, self.counts, strict=True):
            source, target = self.widths or (
                max(1, int(_row_sums(side[pairs], counts).max(initial=0))) for side in lengths
            )
            found.append((self.rows or max(1, len(counts)), source, target))
        return found


def _row_sums(values: npt.NDArray[np.int32], counts: Rows) -> Rows:
    """Sums of as many values as each row has: int64 [rows]."""
    before = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return np.diff(before[np.cumsum(counts)], prepend=0)


class PackedSampler(EpochSampler):
    """Steps of about ``tokens_per_step`` real tokens in packed rows (see ``plan_packed``).

    The rows of a step are dealt out evenly to ranks, and each rank's to equally many micro-batches
    of at most ``max_tokens`` padded tokens. With ``one_shape`` every micro-batch has the same
    number of rows, a multiple of ``rows_multiple``, and the same widths; rows without pairs fill
    it up.

    Raises ``UserError`` where the longest pair fits into no step or row, or a row into no
    micro-batch.
    """

    plan: PackedPlan
    lengths: Lengths

    def __init__(
        self,
        lengths: Lengths,
        *,
        tokens_per_step: int,
        tokens_per_row: int | None = None,
        max_tokens: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        drop_last: bool = False,
        one_shape: bool = False,
        rows_multiple: int = 1,
    ) -> None:
        super().__init__(rank=rank, world_size=world_size, seed=seed)
        self.lengths = lengths
        self.tokens_per_step = tokens_per_step
        self.tokens_per_row = tokens_per_row
        self.drop_last = drop_last  # no step is shorter than the others
        self.layout = lay_out_packed(
            lengths, tokens_per_step=tokens_per_step, tokens_per_row=tokens_per_row
        )
        most = _rows_within(sum(self.layout.widths), max_tokens, rows_multiple)
        each = -(-self.layout.rows_per_step // world_size)
        multiple = rows_multiple if one_shape else 1
        self.accumulation, rows = _cut_evenly(each, most=most, multiple=multiple)
        self.rows = rows if one_shape else None

    def _make_plan(self, epoch: int) -> PackedPlan:
        return plan_packed(self.layout, seed=self.seed, epoch=epoch)

    def divided(self, step: int) -> Iterator[PackedBatch]:
        rows = self.plan.rows_of(step)
        shares = [
            np.array_split(np.array(share, dtype=np.int64), self.accumulation)
            for share in np.array_split(np.arange(len(rows)), self.world_size)
        ]
        for numbers in zip(*shares, strict=True):
            groups = [[rows[number] for number in part] for part in numbers]
            yield PackedBatch(
                [np.concatenate([self.plan.order[:0], *group]) for group in groups],
                spare=0,
                rows=self.rows,
                widths=None if self.rows is None else self.layout.widths,
                counts=[np.array([len(row) for row in group], dtype=np.int64) for group in groups],
            )

    @property
    def steps(self) -> int:
        return self.layout.steps

    @property
    def n_micro_batches(self) -> int:
        return self.layout.steps * self.accumulation


def _cut_evenly(rows: int, *, most: int, multiple: int) -> tuple[int, int]:
    """Parts, and rows of each, that hold so many rows with the least left empty.

    As few parts as possible, but up to twice as many where that leaves less empty.
    """
    fewest = -(-rows // most)
    sizes = {parts: -(-rows // (parts * multiple)) * multiple for parts in range(1, 2 * fewest + 1)}
    parts = min(range(fewest, 2 * fewest + 1), key=lambda parts: parts * sizes[parts])
    return parts, sizes[parts]


def _rows_within(width: int, max_tokens: int | None, rows_multiple: int) -> int:
    """Rows that a rank's micro-batch may have; a multiple of ``rows_multiple``."""
    need = max(1, width) * rows_multiple
    if max_tokens is None:
        max_tokens = max(need, DEFAULT_PACKED_TOKENS * rows_multiple)
    if max_tokens < need:
        raise UserError(
            f"max_tokens_per_device={max_tokens // rows_multiple}: expected at least {width}, one "
            "packed row; raise --max_tokens_per_device, or lower --tokens_per_row"
        )
    return max_tokens // need * rows_multiple
