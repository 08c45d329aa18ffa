"""A few padded shapes for rows of many lengths, chosen from the data so that pads are few.

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
from s2s_scale.data.lengths import Lengths

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
