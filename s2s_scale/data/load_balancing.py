"""Divides the groups of a step over ranks and micro-batches, within a budget of padded tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from s2s_scale.data.batch_plan import Lengths, Rows
from s2s_scale.data.buckets import GroupLayout, row_cost
from s2s_scale.errors import UserError

LEVELLING_ROUNDS = 8
LEVEL_ENOUGH = 0.01
"""Difference between the largest and the smallest load, as a share of their mean."""

Counts = npt.NDArray[np.int64]
Costs = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sharing:
    """How groups are divided: over ``world_size`` ranks, in ``parts`` micro-batches each.

    ``parts`` is the same for every group, so that every rank has as many micro-batches in every
    step. ``rows``: int64 [groups], with fixed shapes the rows that a micro-batch of the group is
    filled up to; None with free ones. ``max_tokens``: bound on the padded tokens of a micro-batch.
    """

    lengths: Lengths
    world_size: int
    parts: int
    rows: Counts | None
    max_tokens: int | None

    def divide(self, groups: list[tuple[int, Rows]]) -> list[list[Rows]]:
        """``result[micro_batch][rank]``: row ids of a step's groups, ``parts`` for each group.

        Every row is in one of them; a rank's part is empty where a group has too few rows. With
        fixed shapes a group is divided evenly, since filled-up micro-batches cost the same. With
        free ones the loads of the ranks, after padding and attention included, are kept level:
        who got more of the long rows gets less of the short ones.
        """
        loads = np.zeros(self.world_size)
        result = []
        for _, rows in groups:
            if self.rows is not None:
                parts = np.array_split(rows, self.parts)
                result += [np.array_split(part, self.world_size) for part in parts]
                continue
            split = [np.array_split(share, self.parts) for share in self._level(rows, loads)]
            result += [list(parts) for parts in zip(*split, strict=True)]
        return result

    def _level(self, rows: Rows, loads: Costs) -> list[Rows]:
        """Each rank's rows, longest first; adds their costs to ``loads``.

        Neighbours in length stay together. A row costs what its share is padded to, which is
        known once the shares are: hence several rounds.
        """
        widths = np.stack([side[rows] for side in self.lengths], axis=1).astype(np.int64)
        costs = row_cost(widths)
        longest_first = np.argsort(-costs, kind="stable")
        rows, widths, costs = rows[longest_first], widths[longest_first], costs[longest_first]
        if self.world_size == 1:
            return [rows]
        room = self._room(widths)
        ranks = np.argsort(loads, kind="stable")
        least, best, after = np.inf, np.zeros(0, np.int64), loads
        for _ in range(LEVELLING_ROUNDS):
            ends = _within(_level_ends(loads[ranks], costs), room)
            counts = np.diff(ends, prepend=0)
            padded = _padded_costs(widths, counts, parts=self.parts)
            reached = loads[ranks] + padded
            spread = float(reached.max() - reached.min())
            if spread < least:
                least, best, after = spread, ends, reached
            if spread < LEVEL_ENOUGH * reached.mean():
                break
            costs = np.repeat(padded / np.maximum(counts, 1), counts)
        loads[ranks] = after
        shares: list[Rows] = [rows[:0]] * self.world_size
        for rank, share in zip(ranks, np.split(rows, best[:-1]), strict=True):
            shares[rank] = share
        return shares

    def _room(self, widths: Counts) -> Counts:
        """How many rows a rank may take that starts at each place of the group: int64 [rows]."""
        if self.max_tokens is None:
            return np.full(len(widths), len(widths))
        longest = np.maximum.accumulate(widths[::-1], axis=0)[::-1]
        return self.max_tokens // longest.sum(axis=1) * self.parts


def share_groups(
    layout: GroupLayout,
    lengths: Lengths,
    *,
    world_size: int,
    max_tokens: int | None = None,
    rows_multiple: int = 1,
) -> Sharing:
    """The fewest micro-batches per group for which none has more than ``max_tokens``.

    ``max_tokens`` counts padded source and target tokens of one rank's micro-batch; None: no
    bound, one micro-batch per group. With a layout of fixed shapes the rows of micro-batches are
    multiples of ``rows_multiple`` and the same for all groups of a shape.

    Raises ``UserError`` where ``rows_multiple`` of the longest rows are more than ``max_tokens``.
    """
    widths = layout.widths.sum(axis=1)
    need = rows_multiple * int(widths.max(initial=0))
    if max_tokens is not None and need > max_tokens:
        raise UserError(
            f"max_tokens_per_device={max_tokens // rows_multiple}: expected at least "
            f"{need // rows_multiple}, the longest row after padding; raise "
            "--max_tokens_per_device, or lower --max_source_length or --max_target_length"
        )
    sizes = -(-_largest_of_shape(layout) // world_size)
    parts = 1
    rows = _round_up(sizes, rows_multiple)
    while max_tokens is not None and (rows * widths > max_tokens).any():
        parts += 1
        rows = _round_up(-(-sizes // parts), rows_multiple)
    fixed = layout.shapes is not None
    return Sharing(lengths, world_size, parts, rows if fixed else None, max_tokens)


def _largest_of_shape(layout: GroupLayout) -> Counts:
    """Rows of each group; with fixed shapes those of the largest group of the same shape."""
    if layout.shapes is None:
        return layout.sizes
    most = np.zeros(int(layout.shapes.max(initial=-1)) + 1, dtype=np.int64)
    np.maximum.at(most, layout.shapes, layout.sizes)
    return most[layout.shapes]


def _round_up(values: Counts, multiple: int) -> Counts:
    return -(-values // multiple) * multiple


def _level_ends(ascending: Costs, costs: Costs) -> Counts:
    """Cut rows of these costs so that the loads become level, as water fills a vessel of steps.

    Returns the end of each rank's share among the rows.
    """
    levels = (costs.sum() + np.cumsum(ascending)) / np.arange(1, len(ascending) + 1)
    # That of the ranks that take part at all: the last one whose own load lies below it.
    level = levels[np.flatnonzero(ascending <= levels)[-1]]
    wanted = np.cumsum(np.maximum(level - ascending, 0))
    ends = np.searchsorted(np.cumsum(costs) - costs / 2, wanted)
    ends[-1] = len(costs)
    return ends


def _within(ends: Counts, room: Counts) -> Counts:
    """The nearest cuts for which a share that starts at ``i`` has at most ``room[i]`` rows.

    ``room`` must not fall, and shares of ``room[0]`` rows must hold them all.
    """
    reach = np.arange(len(room)) + room
    earliest = [len(room)]  # where each share must at least end, so that the ones after suffice
    for _ in range(len(ends) - 1):
        earliest.append(int(np.searchsorted(reach, earliest[-1])))
    start, found = 0, []
    for end, least in zip(ends.tolist(), reversed(earliest), strict=True):
        latest = int(reach[start]) if start < len(room) else start
        start = min(max(end, start, least), latest, len(room))
        found.append(start)
    return np.array(found)


def _padded_costs(widths: Counts, counts: Counts, *, parts: int) -> Costs:
    """Cost of each share of so many rows, cut into micro-batches that are padded to their longest.

    Cut as ``numpy.array_split`` cuts.
    """
    sizes = counts[:, None] // parts + (np.arange(parts) < counts[:, None] % parts)
    filled = sizes.reshape(-1) > 0
    starts = (np.cumsum(sizes) - sizes.reshape(-1))[filled]
    costs = np.zeros(sizes.size)
    costs[filled] = row_cost(np.maximum.reduceat(widths, starts, axis=0))
    totals: Costs = (costs.reshape(sizes.shape) * sizes).sum(axis=1)
    return totals
