"""Buckets: rows of like length with near-equal numbers of tokens, several of which make a step.

The layout of an epoch (number, sizes and widths of its buckets) depends on the lengths alone; seed
and epoch decide which rows are in which bucket. So every epoch has the same number of steps, and
load balancing is decided once.

On devices that compile a graph for each shape, the padded widths of all buckets come from a short
list of shapes, a ``ShapeGrid``, which is chosen from the data so that pads are few.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from s2s_scale.config import DEFAULT_BUCKETS
from s2s_scale.data.batch_plan import EpochPlan, Lengths, Rows, random_state
from s2s_scale.errors import UserError

MAX_LEVELS = 48
"""Lengths per side among which shapes are chosen; more change the share of pads by under 0.5 %."""
ATTENTION_TOKENS = 2048
"""Length at which a token's attention costs as much as its other matmuls, at width 512."""
MAX_BANDS = 64
MAX_TARGETS = 1000  # bands x targets must fit into uint16
POOL_ROWS, POOLS = 64, 64
"""Rows that are shuffled among each other between epochs: about ``POOL_ROWS``, but never more than
one of ``POOLS`` equal parts of the data."""
ROWS_STEP = 8
"""Rows of a bucket of fixed shape are a multiple of this, so that 2, 4 or 8 devices share them."""

Widths = tuple[int, int]
"""Padded source and target tokens of a row."""
Array = npt.NDArray[Any]
Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ShapeGrid:
    """Shapes in ascending order of both widths; a row belongs to the first that holds it."""

    widths: tuple[Widths, ...]

    def __len__(self) -> int:
        return len(self.widths)

    @property
    def largest(self) -> Widths:
        """The shape that holds every row."""
        return self.widths[-1]

    @cached_property
    def _tables(self) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16]]:
        """For each side: number of the first shape that holds a length."""
        sides = np.array(self.widths)
        source, target = (
            np.searchsorted(side, np.arange(side[-1] + 1)).astype(np.uint16) for side in sides.T
        )
        return source, target

    def fit(self, lengths: Lengths) -> npt.NDArray[np.uint16]:
        """The number of each row's shape: uint16 [rows]; ``ValueError`` if a row is too long."""
        source, target = lengths
        longest = (int(source.max(initial=0)), int(target.max(initial=0)))
        if longest[0] > self.largest[0] or longest[1] > self.largest[1]:
            raise ValueError(
                f"the longest source and target have {longest[0]} and {longest[1]} tokens; "
                f"expected at most {self.largest[0]} and {self.largest[1]}, the largest shape"
            )
        by_source, by_target = self._tables
        return np.maximum(by_source[source], by_target[target])

    def holding(self, source: int, target: int) -> Widths:
        """The smallest shape that holds both lengths; ``ValueError`` if none does."""
        sides = (np.array([source], np.int32), np.array([target], np.int32))
        return self.widths[int(self.fit(sides)[0])]

    def real_share(self, lengths: Lengths) -> float:
        """Share of real tokens if each row is padded to its shape."""
        padded = np.array(self.widths).sum(1)[self.fit(lengths)].sum()
        return float((_tokens(lengths[0]) + _tokens(lengths[1])) / padded)


def choose_shapes(lengths: Lengths, *, num_buckets: int = DEFAULT_BUCKETS) -> ShapeGrid:
    """The at most ``num_buckets`` shapes that need the fewest pads, source and target together.

    Dynamic programming over the joint distribution of both lengths finds the best chain: the best
    k shapes of which the largest is (S, T) are the best k-1 up to some (S', T') inside it, with the
    rows between the two padded to (S, T). Lengths are rounded up to ``MAX_LEVELS`` levels per side.
    Time and memory are linear in the number of rows, which are only counted.

    Raises:
        ValueError: there are no rows, or ``num_buckets`` is less than 1.
    """
    if num_buckets < 1:
        raise ValueError(f"num_buckets={num_buckets}: expected at least 1")
    if len(lengths[0]) == 0:
        raise ValueError("cannot choose shapes for no rows")
    source, target = (spread_levels(side, MAX_LEVELS) for side in lengths)
    cell = np.zeros(len(lengths[0]), dtype=np.int32)
    for side, levels, stride in ((lengths[0], source, len(target)), (lengths[1], target, 1)):
        table = np.searchsorted(levels, np.arange(levels[-1] + 1)).astype(np.int32)
        cell += table[side] * np.int32(stride)
    rows = np.bincount(cell, minlength=len(source) * len(target))
    counts = rows.reshape(len(source), len(target)).astype(np.float64)
    chain = _best_chain(counts, source, target, num_buckets=num_buckets)
    widths = [(int(source[i]), int(target[j])) for i, j in chain]
    return ShapeGrid(tuple(dict.fromkeys(widths)))


def spread_levels(side: npt.NDArray[np.int32], count: int) -> npt.NDArray[np.int64]:
    """Up to ``count`` of the lengths that occur, the largest included, dense where rows are many.

    They are spaced by the square root of the density of rows, as the best levels are in the limit.
    """
    counts = np.bincount(np.maximum(side, 1))
    found = np.flatnonzero(counts)
    if len(found) <= count:
        return found
    mass = np.cumsum(np.sqrt(counts[found]))
    marks = np.linspace(0, mass[-1], count + 1)[1:]
    places = np.minimum(np.searchsorted(mass, marks - 1e-9 * mass[-1]), len(found) - 1)
    return found[np.unique(places)]


def row_cost(widths: Counts) -> Floats:
    """Cost of rows of source and target widths [..., 2], in tokens: linear part plus attention.

    Encoder, decoder and cross attention grow with S², T² and S·T.
    """
    source, target = np.moveaxis(np.asarray(widths, dtype=np.float64), -1, 0)
    attention = source**2 + target**2 + source * target
    return source + target + attention / ATTENTION_TOKENS


def _best_chain(
    counts: Floats, source: Array, target: Array, *, num_buckets: int
) -> list[tuple[int, int]]:
    """Level indices (i, j) of the shapes, smallest first, without shapes that hold no rows.

    ``counts``: rows at each pair of levels, [source levels, target levels].
    """
    inside = counts.cumsum(0).cumsum(1)  # rows that fit into (i, j)
    tokens = (source[:, None] + target[None, :]).astype(np.float64)
    best = inside * tokens
    steps = []
    for _ in range(1, num_buckets):
        best, step = _one_more_shape(best, inside, tokens)
        steps.append(step)
    corner = (len(source) - 1, len(target) - 1)
    chain = [corner]
    for step in reversed(steps):
        corner = divmod(int(step[corner]), len(target))
        if inside[corner] < inside[chain[-1]]:
            chain.append(corner)
    return [corner for corner in reversed(chain) if inside[corner] > 0]


def _one_more_shape(best: Floats, inside: Floats, tokens: Floats) -> tuple[Floats, Counts]:
    """Fewest padded tokens [i, j] with one more shape, and the flat index of the one before it.

    The shape (i, j) is charged for the rows that the smaller shape (a, b) does not hold:
    ``best[a, b] + (inside[i, j] - inside[a, b]) * tokens[i, j]``.
    """
    width = best.shape[1]
    result = np.empty_like(best)
    before = np.empty(best.shape, dtype=np.int64)
    for i, j in np.ndindex(*best.shape):
        smaller = best[: i + 1, : j + 1] - inside[: i + 1, : j + 1] * tokens[i, j]
        a, b = divmod(int(smaller.argmin()), j + 1)
        before[i, j] = a * width + b
        result[i, j] = smaller[a, b] + inside[i, j] * tokens[i, j]
    return result, before


def padded_to_longest(lengths: Lengths) -> float:
    """Share of real tokens if every row is padded to the longest of each side."""
    source, target = lengths
    padded = len(source) * (int(source.max()) + int(target.max()))
    return (_tokens(source) + _tokens(target)) / padded


def padded_to_powers(lengths: Lengths) -> tuple[float, int]:
    """Share of real tokens, and number of shapes, if each side is padded to a power of two."""
    powers = [2 ** np.ceil(np.log2(np.maximum(side, 1))).astype(np.int64) for side in lengths]
    shapes = np.unique(powers[0] * 2**32 + powers[1])
    padded = int(powers[0].sum() + powers[1].sum())
    return (_tokens(lengths[0]) + _tokens(lengths[1])) / padded, len(shapes)


def _tokens(side: npt.NDArray[np.int32]) -> int:
    return int(side.sum(dtype=np.int64))


@dataclass(frozen=True)
class BucketLayout:
    """The buckets of every epoch, as cuts of the rows once these are sorted by cell.

    A cell is a class of like lengths, or a pool of several small ones; an epoch shuffles the rows
    of each cell.

    ``rows``: int64 [rows], all row ids by cell. ``cells``: int64 [cells + 1], offsets of the cells
    in ``rows``. ``offsets``: int64 [buckets + 1], offsets of the buckets. ``widths``: int64
    [buckets, 2], source and target widths that hold every row of a bucket in any epoch.
    ``shapes``: int64 [buckets], the number of each bucket's shape in the grid, or None if widths
    are free.
    """

    rows: Rows
    cells: Counts
    offsets: Counts
    widths: Counts
    shapes: Counts | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def sizes(self) -> Counts:
        """Rows of each bucket: int64 [buckets]."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class BucketPlan(EpochPlan):
    """The rows of every step of one epoch, by buckets.

    ``bucket_offsets``: int64 [buckets + 1] into ``order``. ``buckets``: int64 [buckets], numbers in
    the layout. ``first_buckets``: int64 [steps + 1]; step ``s`` has the buckets
    ``first_buckets[s]`` to ``first_buckets[s + 1] - 1``, longest rows first.
    """

    bucket_offsets: Rows
    buckets: Rows
    first_buckets: Rows

    def buckets_of(self, step: int) -> list[tuple[int, Rows]]:
        """Number in the layout, and row ids, of each bucket of a step."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of a plan with {self.steps} steps")
        return [
            (int(self.buckets[b]), self.order[self.bucket_offsets[b] : self.bucket_offsets[b + 1]])
            for b in range(self.first_buckets[step], self.first_buckets[step + 1])
        ]


def make_buckets(
    lengths: Lengths, *, tokens_per_step: int, groups_per_step: int, grid: ShapeGrid | None = None
) -> BucketLayout:
    """Buckets of about ``tokens_per_step / groups_per_step`` real tokens.

    With a ``grid`` every bucket has one of its shapes, and all buckets of a shape but the last have
    the same number of rows. Without one, rows are sorted by bands of source length, by target
    length within a band, and cut at equal numbers of tokens.

    Raises:
        UserError: the longest row has more tokens than a bucket.
    """
    longest = int((lengths[0] + lengths[1]).max(initial=1))
    if tokens_per_step < longest * groups_per_step:
        raise UserError(
            f"tokens_per_step={tokens_per_step}: expected at least {longest * groups_per_step}, so "
            f"that each of the {groups_per_step} buckets of a step can hold the longest row "
            f"({longest} source and target tokens); raise --tokens_per_step, or lower "
            "--groups_per_step, --max_source_length or --max_target_length"
        )
    if len(lengths[0]) == 0:
        none = np.zeros(1, np.int64)
        return BucketLayout(none[:0], none, none, np.empty((0, 2), np.int64))
    if grid is None:
        return _cut_by_tokens(lengths, tokens_per_step, groups_per_step)
    return _cut_by_shape(lengths, tokens_per_step // groups_per_step, grid)


def _cut_by_shape(lengths: Lengths, tokens: int, grid: ShapeGrid) -> BucketLayout:
    cells = grid.fit(lengths)
    counts = np.bincount(cells, minlength=len(grid))
    real = _sums(cells, lengths, len(grid))
    offsets, shapes = [0], []
    for shape in np.flatnonzero(counts):
        rows = int(counts[shape])
        size = max(1, round(tokens / (real[shape] / rows)))
        step = ROWS_STEP if size >= ROWS_STEP else 1
        size = max(1, round(size / step)) * step
        buckets = -(-rows // size)
        size = -(-rows // (buckets * step)) * step  # no more than these buckets need
        ends = np.minimum(np.arange(size, rows + size, size), rows)
        offsets += (offsets[-1] + ends).tolist()
        shapes += [int(shape)] * len(ends)
    widths = np.array(grid.widths, dtype=np.int64)[shapes]
    return BucketLayout(
        _sorted_by_cell(cells), _cell_offsets(counts), np.array(offsets), widths, np.array(shapes)
    )


def _sorted_by_cell(cells: npt.NDArray[np.uint16]) -> Rows:
    return np.argsort(cells, kind="stable")  # 16-bit keys: numpy's radix sort, in linear time


def _cell_offsets(counts: Counts) -> Counts:
    """Offsets of the cells that have rows."""
    return np.concatenate([[0], np.cumsum(counts[counts > 0])])


def _cut_by_tokens(lengths: Lengths, tokens_per_step: int, groups_per_step: int) -> BucketLayout:
    source, target = lengths
    real = source.sum(dtype=np.int64) + target.sum(dtype=np.int64)
    longest = int((source + target).max())
    # No more steps than leave each bucket at least as large as the longest row.
    steps = min(-(-real // tokens_per_step), real // (groups_per_step * longest))
    buckets = int(steps) * groups_per_step if steps else max(1, int(real // max(1, longest)))
    bands = spread_levels(source, min(MAX_BANDS, max(1, round((3 * buckets) ** 0.5))))
    targets = spread_levels(target, MAX_TARGETS)
    cells = _snake(lengths, bands, targets)
    n_cells = len(bands) * len(targets)
    counts = np.bincount(cells, minlength=n_cells)
    tokens = _sums(cells, lengths, n_cells)
    offsets = _token_offsets(counts, tokens, buckets)
    pools = _pools(counts, tokens, most=min(POOL_ROWS, len(cells) // POOLS))
    widths = _widths(counts, offsets, pools, bands, targets)
    return BucketLayout(_sorted_by_cell(cells), _cell_offsets(counts)[pools], offsets, widths)


def _pools(counts: Counts, tokens: Floats, *, most: int) -> Counts:
    """Join small cells to pools of about ``most`` rows of like length: int64 [pools + 1].

    ``counts``, ``tokens``: of each cell. The result is the number of each pool's first cell among
    those that have rows, followed by how many of these there are. Rows of a pool are shuffled
    between epochs; in cells of one or two rows the same rows would share a bucket in every epoch.
    """
    filled = counts > 0
    before = (np.cumsum(counts) - counts)[filled]
    fraction, exponent = np.frexp(tokens[filled] / counts[filled])
    length = exponent * 8 + (fraction * 16).astype(np.int64)  # steps of a sixteenth to an eighth
    other = np.diff(before // max(1, most), prepend=-1) | np.diff(length, prepend=-1)
    return np.append(np.flatnonzero(other), len(before))


def _snake(lengths: Lengths, bands: Counts, targets: Counts) -> npt.NDArray[np.uint16]:
    """Cell of each row: bands of source length, with targets ascending in one, descending in the
    next, so that neighbours have like lengths across the border of two bands, too."""
    source, target = (
        np.searchsorted(levels, np.arange(levels[-1] + 1)).astype(np.uint16)
        for levels in (bands, targets)
    )
    band, place = source[lengths[0]], target[lengths[1]]
    last = np.uint16(len(targets) - 1)
    return band * np.uint16(len(targets)) + np.where(band % 2, last - place, place)


def _sums(cells: npt.NDArray[np.uint16], lengths: Lengths, count: int) -> Floats:
    """Real tokens, source and target, of the rows of each cell."""
    source, target = (np.bincount(cells, weights=side, minlength=count) for side in lengths)
    return (source + target).astype(np.float64)


def _token_offsets(rows: Counts, real: Floats, buckets: int) -> Counts:
    """Cuts at equal numbers of tokens, each row taken at its cell's mean; no bucket is empty."""
    filled = np.flatnonzero(rows)
    mean = real[filled] / rows[filled]
    tokens = np.concatenate([[0.0], np.cumsum(real[filled])])
    rows_before = np.concatenate([[0], np.cumsum(rows[filled])])
    marks = tokens[-1] * np.arange(1, buckets) / buckets
    cell = np.minimum(np.searchsorted(tokens, marks, side="right") - 1, len(filled) - 1)
    inside = np.round((marks - tokens[cell]) / mean[cell]).astype(np.int64)
    cuts = np.minimum(rows_before[cell] + inside, rows_before[cell + 1])
    offsets = np.concatenate([[0], cuts, [rows_before[-1]]])
    return np.unique(offsets).astype(np.int64)


def _widths(
    counts: Counts, offsets: Counts, pools: Counts, bands: Counts, targets: Counts
) -> Counts:
    """The widest source and target of the pools that each bucket touches: int64 [buckets, 2]."""
    filled = np.flatnonzero(counts)
    band, place = np.divmod(filled, len(targets))
    place = np.where(band % 2, len(targets) - 1 - place, place)
    ends = np.cumsum(counts[filled])[pools[1:] - 1]
    first = np.searchsorted(ends, offsets[:-1], side="right")
    last = np.searchsorted(ends, offsets[1:] - 1, side="right")
    spans = np.stack([first, last + 1], axis=1).reshape(-1)
    widths = []
    for side in (bands[band], targets[place]):
        of_pools = np.append(np.maximum.reduceat(side, pools[:-1]), 0)  # the last span ends there
        widths.append(np.maximum.reduceat(of_pools, spans)[::2])
    return np.stack(widths, axis=1)


def plan_buckets(
    layout: BucketLayout, *, groups_per_step: int, seed: int, epoch: int, drop_last: bool = False
) -> BucketPlan:
    """The plan of one epoch: every row is in exactly one bucket, every bucket in one step.

    The buckets, sorted by the length of their rows, are split into ``groups_per_step`` strata, and
    a step takes a random one from each, so every step has short and long rows. The step with the
    longest bucket comes first. The last step may have fewer buckets (``drop_last`` leaves it out).
    """
    random = random_state(seed, epoch)
    rows = layout.rows.copy()
    # Cell by cell, so that memory is read in order: one permutation of many rows takes longer.
    for start, end in zip(layout.cells[:-1].tolist(), layout.cells[1:].tolist(), strict=True):
        random.shuffle(rows[start:end])
    table = _strata(layout, groups_per_step, random)
    if drop_last and len(table) and (table[-1] < 0).any():
        table = table[:-1]
    buckets = table.reshape(-1)
    counts = (table >= 0).sum(axis=1)
    buckets = buckets[buckets >= 0]
    offsets = np.concatenate([[0], np.cumsum(layout.sizes[buckets])])
    order = np.concatenate(
        [rows[:0], *(rows[layout.offsets[b] : layout.offsets[b + 1]] for b in buckets)]
    )
    first_buckets = np.concatenate([[0], np.cumsum(counts)])
    return BucketPlan(order, offsets[first_buckets], offsets, buckets, first_buckets)


def _strata(layout: BucketLayout, groups_per_step: int, random: np.random.RandomState) -> Rows:
    """Bucket numbers [steps, groups_per_step]; -1 if the last step has none."""
    longest_first = np.argsort(-row_cost(layout.widths), kind="stable")
    steps = -(-len(layout) // groups_per_step)
    missing = steps * groups_per_step - len(layout)
    table = np.full((steps, groups_per_step), -1, dtype=np.int64)
    start = 0
    for column in range(groups_per_step):
        size = steps - (column >= groups_per_step - missing)
        table[:size, column] = random.permutation(longest_first[start : start + size])
        start += size
    if len(layout):
        place = int(np.flatnonzero(table[:, 0] == longest_first[0])[0])
        table[[0, place], 0] = table[[place, 0], 0]
    return table
