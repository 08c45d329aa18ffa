"""Cuts rows of like length into groups of near-equal tokens; several groups make a step.

How an epoch is cut (sizes, widths, number of groups) depends on the lengths alone; which rows
stand where, on seed and epoch. So every epoch has as many steps, and whatever the rows are divided
among is decided once.

A few padded shapes for rows of many lengths, chosen from the data so that pads are few.

A compiled graph serves one shape only, so the shapes of all batches must come from a short list.
Shapes are widths (source, target) in tokens; how many rows go with each is decided elsewhere.
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
"""Different lengths per side that are looked at; more change the share of pads by under 0.5 %."""

ATTENTION_TOKENS = 2048
"""Length at which a token's attention costs as much as its matrix products, width 512."""

Widths = tuple[int, int]
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ShapeGrid:
    """Widths (source, target), each at least as large as the one before in both.

    A row belongs to the first that holds both its sides.
    """

    widths: tuple[Widths, ...]

    def __len__(self) -> int:
        return len(self.widths)

    @property
    def largest(self) -> Widths:
        """The widths that hold every row."""
        return self.widths[-1]

    @cached_property
    def _tables(self) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16]]:
        """For each side: length -> number of the first shape that holds it."""
        sides = np.array(self.widths)
        source, target = (
            np.searchsorted(side, np.arange(side[-1] + 1)).astype(np.uint16) for side in sides.T
        )
        return source, target

    def fit(self, lengths: Lengths) -> npt.NDArray[np.uint16]:
        """The number of each row's shape: uint16 [rows]. ``ValueError`` for a row that is too long.

        Takes one table look-up per side.
        """
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
        """The smallest widths that hold both; ``ValueError`` where none do."""
        sides = (np.array([source], np.int32), np.array([target], np.int32))
        return self.widths[int(self.fit(sides)[0])]

    def real_share(self, lengths: Lengths) -> float:
        """Real source and target tokens over those after padding each row to its shape."""
        padded = np.array(self.widths).sum(1)[self.fit(lengths)].sum()
        return float((_total(lengths[0]) + _total(lengths[1])) / padded)


def choose_shapes(lengths: Lengths, *, num_buckets: int = DEFAULT_BUCKETS) -> ShapeGrid:
    """At most ``num_buckets`` shapes with the fewest pads for these rows (source + target tokens).

    Dynamic programming over the joint distribution of both lengths finds the best chain: the best
    k shapes of which the largest is (S, T) are the best k-1 up to some (S', T') inside it, and the
    rows between the two padded to (S, T). The lengths are taken at up to ``MAX_LEVELS`` levels per
    side. Time and memory are linear in the rows, which are only counted.

    Raises ``ValueError`` for no rows and for fewer than one bucket.
    """
    if num_buckets < 1:
        raise ValueError(f"num_buckets={num_buckets}: expected at least 1")
    if len(lengths[0]) == 0:
        raise ValueError("cannot choose shapes for no rows")
    source, target = (spread_levels(side, MAX_LEVELS) for side in lengths)
    counts = _joint_counts(lengths, source, target)
    chain = _best_chain(counts, source, target, num_buckets=num_buckets)
    widths = [(int(source[i]), int(target[j])) for i, j in chain]
    return ShapeGrid(tuple(dict.fromkeys(widths)))


def spread_levels(side: npt.NDArray[np.int32], count: int) -> npt.NDArray[np.int64]:
    """Up to ``count`` lengths, the largest one among them, close together where rows are many.

    The steps are spaced by the square root of the density, which is what the best levels follow
    when they are many.
    """
    counts = np.bincount(np.maximum(side, 1))
    found = np.flatnonzero(counts)
    if len(found) <= count:
        return found
    mass = np.cumsum(np.sqrt(counts[found]))
    marks = np.linspace(0, mass[-1], count + 1)[1:]
    places = np.minimum(np.searchsorted(mass, marks - 1e-9 * mass[-1]), len(found) - 1)
    return found[np.unique(places)]


def row_cost(widths: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """What a row of source and target widths [..., 2] costs, in tokens: linear part + attention.

    Attention of the encoder, the decoder and across grows with S², T² and S·T.
    """
    source, target = np.moveaxis(np.asarray(widths, dtype=np.float64), -1, 0)
    attention = source**2 + target**2 + source * target
    return source + target + attention / ATTENTION_TOKENS


def _joint_counts(
    lengths: Lengths, source: npt.NDArray[np.int64], target: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Rows at each pair of levels: [source levels, target levels]."""
    cell = np.zeros(len(lengths[0]), dtype=np.int32)
    for side, levels, stride in ((lengths[0], source, len(target)), (lengths[1], target, 1)):
        table = np.searchsorted(levels, np.arange(levels[-1] + 1)).astype(np.int32)
        cell += table[side] * np.int32(stride)
    counts = np.bincount(cell, minlength=len(source) * len(target))
    return counts.reshape(len(source), len(target)).astype(np.float64)


def _best_chain(
    counts: npt.NDArray[np.float64], source: Array, target: Array, *, num_buckets: int
) -> list[tuple[int, int]]:
    """Level indices (i, j) of the shapes, smallest first; shapes without rows are left out."""
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


def _one_more_shape(
    best: npt.NDArray[np.float64], inside: npt.NDArray[np.float64], tokens: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Fewest padded tokens [i, j] with one shape more, and the flat index of the one before.

    The shape (i, j) is paid for the rows that the smaller shape (a, b) does not hold:
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
    """Share of real tokens where every row is padded to the longest of its side."""
    source, target = lengths
    padded = len(source) * (int(source.max()) + int(target.max()))
    return (_total(source) + _total(target)) / padded


def padded_to_powers(lengths: Lengths) -> tuple[float, int]:
    """Share of real tokens, and number of shapes, where each side goes to a power of two."""
    powers = [2 ** np.ceil(np.log2(np.maximum(side, 1))).astype(np.int64) for side in lengths]
    shapes = np.unique(powers[0] * 2**32 + powers[1])
    padded = int(powers[0].sum() + powers[1].sum())
    return (_total(lengths[0]) + _total(lengths[1])) / padded, len(shapes)


def _total(side: npt.NDArray[np.int32]) -> int:
    return int(side.sum(dtype=np.int64))


MAX_BANDS = 64
MAX_TARGETS = 1000  # bands x targets must fit into uint16
POOL_ROWS, POOLS = 64, 64
"""Rows that change places with each other between epochs: about so many, but no larger a part of
all than this."""
ROWS_STEP = 8
"""Rows of a group of fixed shape are a multiple of this, so that 2, 4 or 8 devices share them."""

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class GroupLayout:
    """Where an epoch's rows are cut, once they are sorted by cell, a class of lengths.

    ``rows``: int64 [rows], all row ids by cell. ``cells``: int64 [cells + 1], where each cell ends
    in them, or each pool of several small ones. ``offsets``: int64 [groups + 1], where each group
    does. ``widths``: int64 [groups, 2], source and target widths that hold every row of a group,
    whatever the epoch. ``shapes``: int64 [groups], the number of the group's shape in the grid, or
    None where widths are free.
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
        """Rows of each group: int64 [groups]."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class GroupedPlan(EpochPlan):
    """The rows of every step of one epoch, by groups of like length.

    ``group_offsets``: int64 [groups + 1] into ``order``. ``groups``: int64 [groups], the group's
    number in the layout. ``first_groups``: int64 [steps + 1]; step ``s`` has the groups
    ``first_groups[s]`` to ``first_groups[s + 1] - 1``, longest rows first.
    """

    group_offsets: Rows
    groups: Rows
    first_groups: Rows

    def groups_of(self, step: int) -> list[tuple[int, Rows]]:
        """Number in the layout, and row ids, of each group of a step."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of a plan with {self.steps} steps")
        return [
            (int(self.groups[g]), self.order[self.group_offsets[g] : self.group_offsets[g + 1]])
            for g in range(self.first_groups[step], self.first_groups[step + 1])
        ]


def lay_out_groups(
    lengths: Lengths, *, tokens_per_step: int, groups_per_step: int, grid: ShapeGrid | None = None
) -> GroupLayout:
    """Cut the rows into groups of about ``tokens_per_step / groups_per_step`` real tokens.

    With a ``grid`` no group crosses a shape's border, and all groups of a shape have the same
    number of rows but the last. Without one, rows are sorted by bands of source length, by target
    length inside a band, and cut where the tokens are full.

    Raises ``UserError`` where the longest row has more tokens than a group.
    """
    longest = int((lengths[0] + lengths[1]).max(initial=1))
    if tokens_per_step < longest * groups_per_step:
        raise UserError(
            f"tokens_per_step={tokens_per_step}: expected at least {longest * groups_per_step}, so "
            f"that each of the {groups_per_step} groups of a step can hold the longest row "
            f"({longest} source and target tokens); raise --tokens_per_step, or lower "
            "--groups_per_step, --max_source_length or --max_target_length"
        )
    if len(lengths[0]) == 0:
        none = np.zeros(1, np.int64)
        return GroupLayout(none[:0], none, none, np.empty((0, 2), np.int64))
    if grid is None:
        return _cut_by_tokens(lengths, tokens_per_step, groups_per_step)
    return _cut_by_shape(lengths, tokens_per_step // groups_per_step, grid)


def _cut_by_shape(lengths: Lengths, tokens: int, grid: ShapeGrid) -> GroupLayout:
    cells = grid.fit(lengths)
    rows = np.bincount(cells, minlength=len(grid))
    real = _sums(cells, lengths, len(grid))
    offsets, shapes = [0], []
    for shape in np.flatnonzero(rows):
        size = _rows_of_group(int(rows[shape]), mean=real[shape] / rows[shape], tokens=tokens)
        ends = np.minimum(np.arange(size, rows[shape] + size, size), rows[shape])
        offsets += (offsets[-1] + ends).tolist()
        shapes += [int(shape)] * len(ends)
    widths = np.array(grid.widths, dtype=np.int64)
    return _layout(cells, rows, np.array(offsets), widths[shapes], np.array(shapes))


def _layout(
    cells: npt.NDArray[np.uint16],
    counts: Counts,
    offsets: Counts,
    widths: Counts,
    shapes: Counts | None = None,
) -> GroupLayout:
    rows = np.argsort(
        cells, kind="stable"
    )  # 16-bit keys: numpy sorts them by radix, in linear time
    ends = np.concatenate([[0], np.cumsum(counts[counts > 0])])
    return GroupLayout(rows, ends, offsets, widths, shapes)


def _rows_of_group(rows: int, *, mean: float, tokens: int) -> int:
    """Rows of every group but the last of a shape that has so many rows of so many tokens."""
    wanted = max(1, round(tokens / mean))
    step = ROWS_STEP if wanted >= ROWS_STEP else 1
    wanted = max(1, round(wanted / step)) * step
    groups = -(-rows // wanted)
    return -(-rows // (groups * step)) * step  # no more than the groups need, if they are few


def _cut_by_tokens(lengths: Lengths, tokens_per_step: int, groups_per_step: int) -> GroupLayout:
    source, target = lengths
    real = source.sum(dtype=np.int64) + target.sum(dtype=np.int64)
    longest = int((source + target).max())
    # No more steps than leave each group at least as large as the longest row.
    steps = min(-(-real // tokens_per_step), real // (groups_per_step * longest))
    groups = int(steps) * groups_per_step if steps else max(1, int(real // max(1, longest)))
    bands = spread_levels(source, min(MAX_BANDS, max(1, round((3 * groups) ** 0.5))))
    targets = spread_levels(target, MAX_TARGETS)
    cells = _snake(lengths, bands, targets)
    n_cells = len(bands) * len(targets)
    counts = np.bincount(cells, minlength=n_cells)
    tokens = _sums(cells, lengths, n_cells)
    offsets = _token_offsets(counts, tokens, groups)
    pools = _pools(counts, tokens, most=min(POOL_ROWS, len(cells) // POOLS))
    # 16-bit keys: numpy sorts them by radix, in linear time
    rows = np.argsort(cells, kind="stable")
    widths = _widths(counts, offsets, pools, bands, targets)
    ends = np.concatenate([[0], np.cumsum(counts[counts > 0])])
    return GroupLayout(rows, ends[pools], offsets, widths)


def _pools(counts: Counts, tokens: npt.NDArray[np.float64], *, most: int) -> Counts:
    """Join small cells to pools of about ``most`` rows of like length: int64 [pools + 1].

    The first of the filled cells of each pool, and the number of these cells. ``counts``,
    ``tokens``: of each cell. A pool's rows change places with each other between epochs; where
    cells have a row or two, the same rows would share a group in every epoch.
    """
    filled = counts > 0
    before = (np.cumsum(counts) - counts)[filled]
    fraction, exponent = np.frexp(tokens[filled] / counts[filled])
    length = exponent * 8 + (fraction * 16).astype(np.int64)  # steps of a sixteenth to an eighth
    other = np.diff(before // max(1, most), prepend=-1) | np.diff(length, prepend=-1)
    return np.append(np.flatnonzero(other), len(before))


def _snake(lengths: Lengths, bands: Counts, targets: Counts) -> npt.NDArray[np.uint16]:
    """Cell of each row: bands of source length, targets upwards in one and downwards in the next.

    So that neighbours are of like length across the border of two bands, too.
    """
    source, target = (
        np.searchsorted(levels, np.arange(levels[-1] + 1)).astype(np.uint16)
        for levels in (bands, targets)
    )
    band, place = source[lengths[0]], target[lengths[1]]
    last = np.uint16(len(targets) - 1)
    return band * np.uint16(len(targets)) + np.where(band % 2, last - place, place)


def _sums(cells: npt.NDArray[np.uint16], lengths: Lengths, count: int) -> npt.NDArray[np.float64]:
    """Real tokens, source and target, of the rows of each cell."""
    source, target = (np.bincount(cells, weights=side, minlength=count) for side in lengths)
    return (source + target).astype(np.float64)


def _token_offsets(rows: Counts, real: npt.NDArray[np.float64], groups: int) -> Counts:
    """Cuts at equal numbers of tokens, each row taken at its cell's mean; no group is empty."""
    filled = np.flatnonzero(rows)
    mean = real[filled] / rows[filled]
    tokens = np.concatenate([[0.0], np.cumsum(real[filled])])
    rows_before = np.concatenate([[0], np.cumsum(rows[filled])])
    marks = tokens[-1] * np.arange(1, groups) / groups
    cell = np.minimum(np.searchsorted(tokens, marks, side="right") - 1, len(filled) - 1)
    inside = np.round((marks - tokens[cell]) / mean[cell]).astype(np.int64)
    cuts = np.minimum(rows_before[cell] + inside, rows_before[cell + 1])
    offsets = np.concatenate([[0], cuts, [rows_before[-1]]])
    offsets = np.unique(offsets)
    return offsets.astype(np.int64)


def _widths(
    counts: Counts, offsets: Counts, pools: Counts, bands: Counts, targets: Counts
) -> Counts:
    """The widest source and target of the pools that each group touches: int64 [groups, 2]."""
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


def plan_groups(
    layout: GroupLayout, *, groups_per_step: int, seed: int, epoch: int, drop_last: bool = False
) -> GroupedPlan:
    """The plan of one epoch: every row is in exactly one group, every group in one step.

    The groups, sorted by the length of their rows, are cut into ``groups_per_step`` strata, and a
    step takes one at random from each, so every step holds short and long rows. The step with the
    longest group comes first. The last step may have fewer groups (``drop_last`` leaves it out).
    """
    random = random_state(seed, epoch)
    rows = layout.rows.copy()
    # Cell by cell, so that memory is read in order: one permutation of many rows takes longer.
    for start, end in zip(layout.cells[:-1].tolist(), layout.cells[1:].tolist(), strict=True):
        random.shuffle(rows[start:end])
    table = _strata(layout, groups_per_step, random)
    if drop_last and len(table) and (table[-1] < 0).any():
        table = table[:-1]
    groups = table.reshape(-1)
    counts = (table >= 0).sum(axis=1)
    groups = groups[groups >= 0]
    offsets = np.concatenate([[0], np.cumsum(layout.sizes[groups])])
    order = np.concatenate(
        [rows[:0], *(rows[layout.offsets[g] : layout.offsets[g + 1]] for g in groups)]
    )
    first_groups = np.concatenate([[0], np.cumsum(counts)])
    return GroupedPlan(order, offsets[first_groups], offsets, groups, first_groups)


def _strata(layout: GroupLayout, groups_per_step: int, random: np.random.RandomState) -> Rows:
    """Group numbers [steps, groups_per_step]; -1 where the last step has none."""
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
