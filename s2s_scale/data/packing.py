"""Packed rows: several pairs in one row, all rows of an epoch nearly equally full.

The rows of an epoch are as many as the steps need, and the pairs are spread over them so that the
fullest is hardly fuller than the mean. Long pairs go first; always the emptiest rows get the next
ones, and of these a row that has more source than target gets a pair that has it the other way
round. Thousands of rows are served at once, so that a million pairs take tenths of a second.

How many rows there are, and how wide, depends on the lengths alone; which pairs share a row, on
seed and epoch.

The packed plan as a sampler: which packed rows each rank runs in which micro-batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from s2s_scale.config import DEFAULT_PACKED_TOKENS, DEFAULT_TOKENS_PER_ROW
from s2s_scale.data.batch_plan import EpochPlan, Lengths, Rows, random_state
from s2s_scale.data.buckets import Widths
from s2s_scale.data.samplers import EpochSampler, MicroBatch, ShapedExamples, ShapedRows
from s2s_scale.errors import UserError

ROWS_STEP = 8
"""Rows of a step are a multiple of this where they are as many, so that 2, 4, 8 ranks share them
evenly."""
CHUNK_PAIRS = 65_536
"""Pairs that are spread over rows together; memory and the cache's size want a bound."""
ATTEMPTS = 8
SPARE_TOKENS = 1
"""By so much rows are wider than the fullest of one epoch needs, for the sake of others."""
CLASS_BITS = 6
"""Pairs change places with those whose tokens have the same first so many binary digits: below 64
the same number, above within a thirty-second."""

_BASE = (0, 0)
"""Seed and epoch of the rows that decide the widths."""


@dataclass(frozen=True)
class PackedLayout:
    """How an epoch is cut, whatever its number.

    ``pairs``: int64 [pairs], all pairs from long to short, and ``cells``: int64 [cells + 1], where
    in them each class of like length ends. ``steps``, ``rows_per_step``: every step has as many
    rows. ``widths``: source and target tokens that no row exceeds, in any epoch.
    """

    lengths: Lengths
    pairs: Rows
    cells: Rows
    steps: int
    rows_per_step: int
    widths: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class PackedPlan(EpochPlan):
    """The pairs of every step of one epoch, by packed rows.

    ``row_offsets``: int64 [rows + 1] into ``order``; step ``s`` has the rows from
    ``s * rows_per_step`` on. A row may be empty where there are few pairs.
    """

    row_offsets: Rows
    rows_per_step: int

    def rows_of(self, step: int) -> list[Rows]:
        """The pairs of each packed row of a step."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of a plan with {self.steps} steps")
        first = step * self.rows_per_step
        ends = self.row_offsets[first : first + self.rows_per_step + 1]
        return [self.order[start:end] for start, end in itertools.pairwise(ends.tolist())]


def lay_out_packed(
    lengths: Lengths, *, tokens_per_step: int, tokens_per_row: int | None = None
) -> PackedLayout:
    """Steps of at most ``tokens_per_step`` real tokens, in rows of about ``tokens_per_row``.

    Steps are equal: there are as many as are needed, and what is left over is spread over all of
    them. Without a ``tokens_per_row`` rows are wide enough for the longest pair, and a step has 8
    of them or more if it can.

    Raises ``UserError`` where the longest pair fits into no step, or into no row.
    """
    n_pairs = len(lengths[0])
    if n_pairs == 0:
        none = np.zeros(1, np.int64)
        return PackedLayout(lengths, none[:0], none, 0, 1)
    totals = np.array([int(side.sum(dtype=np.int64)) for side in lengths])
    longest = np.array([int(side.max()) for side in lengths])
    _check_sizes(int((lengths[0] + lengths[1]).max()), longest, tokens_per_step, tokens_per_row)
    steps = -(-int(totals.sum()) // tokens_per_step)
    rows = _rows_per_step(totals / steps, longest, tokens_per_row)
    rows = max(1, min(rows, n_pairs // steps))
    classes = _classes(lengths)
    counts = np.bincount(classes)
    # From long to short; 16-bit keys: numpy sorts them by radix, in linear time.
    pairs = np.argsort(np.uint16(len(counts) - 1) - classes, kind="stable")
    cells = np.concatenate([[0], np.cumsum(counts[::-1][counts[::-1] > 0])])
    layout = PackedLayout(lengths, pairs, cells, int(steps), rows)
    chunks = _packed_chunks(layout, random_state(*_BASE))
    source, target = np.max([loads.max(axis=0) for _, _, loads in chunks], axis=0).tolist()
    return replace(layout, widths=(source + SPARE_TOKENS, target + SPARE_TOKENS))


def _check_sizes(
    pair: int, longest: Rows, tokens_per_step: int, tokens_per_row: int | None
) -> None:
    need = int(longest.sum())
    if tokens_per_row is not None and tokens_per_row < need:
        raise UserError(
            f"tokens_per_row={tokens_per_row}: expected at least {need}, the longest source and "
            f"the longest target ({longest[0]} and {longest[1]} tokens); raise --tokens_per_row, "
            "or lower --max_source_length or --max_target_length"
        )
    least = max(pair, tokens_per_row or 0)
    if tokens_per_step < least:
        what = "one row (--tokens_per_row)" if least > pair else "the longest pair"
        raise UserError(
            f"tokens_per_step={tokens_per_step}: expected at least {least}, {what}; raise "
            "--tokens_per_step, or lower --max_source_length or --max_target_length"
        )


def _rows_per_step(
    per_step: npt.NDArray[np.float64], longest: Rows, tokens_per_row: int | None
) -> int:
    """How many rows share ``per_step`` source and target tokens."""
    most = int(
        (per_step / np.maximum(longest, 1)).min()
    )  # more rows would be emptier than the longest pair
    if tokens_per_row is None:
        wanted = per_step.sum() / DEFAULT_TOKENS_PER_ROW
        wanted = max(wanted, min(most, ROWS_STEP))
    else:
        wanted = per_step.sum() / tokens_per_row
    rows = min(round(wanted), most)
    if rows >= ROWS_STEP:
        rows = min(round(wanted / ROWS_STEP), most // ROWS_STEP) * ROWS_STEP
    return max(1, rows)


def _classes(lengths: Lengths) -> npt.NDArray[np.uint16]:
    """Class of each pair by its source and target tokens; longer pairs have higher ones."""
    tokens = lengths[0] + lengths[1]
    values = np.arange(int(tokens.max()) + 1)
    bits = np.frexp(values)[1]  # exact, as a logarithm is not
    shift = np.maximum(bits - CLASS_BITS, 0)
    table = (shift << (CLASS_BITS - 1)) + (values >> shift)
    return table.astype(np.uint16)[tokens]


def plan_packed(layout: PackedLayout, *, seed: int, epoch: int) -> PackedPlan:
    """The plan of one epoch. Every pair is in exactly one row, every row in one step.

    Pairs of like length change places between epochs, rows always do.
    """
    random = random_state(seed, epoch)
    chunks = _chunks_within_widths(layout, random)
    if chunks is None:  # the pairs that decided the widths fit
        chunks = list(_packed_chunks(layout, random_state(*_BASE)))
    order, counts = [layout.pairs[:0]], [layout.pairs[:0]]
    for number in random.permutation(len(chunks)):
        pairs, rows, loads = chunks[number]
        n_rows = len(loads)
        rows = random.permutation(n_rows)[rows]
        order.append(pairs[_sorted_by(rows, n_rows)])
        counts.append(np.bincount(rows, minlength=n_rows))
    row_offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    offsets = row_offsets[:: layout.rows_per_step]
    return PackedPlan(np.concatenate(order), offsets, row_offsets, layout.rows_per_step)


def _sorted_by(numbers: Rows, count: int) -> Rows:
    """Stable order of ``numbers`` below ``count``: by radix, in linear time, where they are few."""
    keys = numbers.astype(np.uint16) if count <= 2**16 else numbers
    return np.argsort(keys, kind="stable")


_Chunk = tuple[Rows, Rows, Rows]
"""Pairs, the row of each (from 0), and source and target tokens of each row [rows, 2]."""


def _chunks_within_widths(
    layout: PackedLayout, random: np.random.RandomState
) -> list[_Chunk] | None:
    """The epoch's chunks; None where one did not fit in several attempts."""
    chunks = list(_packed_chunks(layout, random))
    for number, (pairs, _, loads) in enumerate(chunks):
        attempt = 0
        while (loads > layout.widths).any():
            attempt += 1
            if attempt == ATTEMPTS:
                return None
            pairs = random.permutation(pairs)
            chunks[number] = _packed(layout.lengths, pairs, len(loads))
            loads = chunks[number][2]
    return chunks


def _packed_chunks(layout: PackedLayout, random: np.random.RandomState) -> Iterator[_Chunk]:
    """Pairs in random order inside each class, dealt to chunks of steps, and spread over rows.

    Each chunk gets its share of every length, so that all of them are equally full.
    """
    if layout.steps == 0:
        return
    pairs = layout.pairs.copy()
    # Class by class, so that memory is read in order: one permutation of many takes longer.
    for start, end in zip(layout.cells[:-1].tolist(), layout.cells[1:].tolist(), strict=True):
        random.shuffle(pairs[start:end])
    lines = -(-len(pairs) // layout.steps)
    dealt = np.full(lines * layout.steps, -1, dtype=np.int64)
    dealt[: len(pairs)] = pairs
    columns = dealt.reshape(lines, layout.steps)
    n_chunks = min(layout.steps, -(-len(pairs) // CHUNK_PAIRS))
    for steps in np.array_split(np.arange(layout.steps), n_chunks):
        chunk = columns[:, steps[0] : steps[-1] + 1].reshape(-1)
        yield _packed(layout.lengths, chunk[chunk >= 0], len(steps) * layout.rows_per_step)


def _packed(lengths: Lengths, pairs: Rows, n_rows: int) -> _Chunk:
    sizes = np.stack([side[pairs] for side in lengths]).astype(np.float64)
    rows = spread(sizes, n_rows)
    loads = [np.bincount(rows, weights=side, minlength=n_rows) for side in sizes]
    return pairs, rows, np.stack(loads, axis=1).astype(np.int64)


def spread(sizes: npt.NDArray[np.float64], n_rows: int) -> Rows:
    """A row for each pair, int64 [pairs], so that all ``n_rows`` are about equally full.

    ``sizes``: source and target tokens, [2, pairs].
    """
    shares = sizes / np.maximum(sizes.sum(axis=1, keepdims=True), 1)
    size, tilt = shares.sum(axis=0), shares[0] - shares[1]
    longest_first = np.argsort(-size, kind="stable")
    load, tilted = np.zeros(n_rows), np.zeros(n_rows)
    rows = np.empty(len(size), dtype=np.int64)
    place = 0
    while place < len(size):
        fullest = load + np.abs(tilted)  # twice the fuller side
        by_load = np.argsort(fullest, kind="stable")
        # A row further up would get a pair only after the emptiest had got a second one.
        limit = fullest[by_load[0]] + size[longest_first[place]]
        count = int(np.searchsorted(fullest[by_load], limit, side="right"))
        pairs = longest_first[place : place + count]
        chosen = by_load[: len(pairs)]
        pairs = pairs[np.argsort(-tilt[pairs], kind="stable")]
        chosen = chosen[np.argsort(tilted[chosen], kind="stable")]
        rows[pairs] = chosen
        load[chosen] += size[pairs]
        tilted[chosen] += tilt[pairs]
        place += len(pairs)
    return rows


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
                filler_row=0,
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
