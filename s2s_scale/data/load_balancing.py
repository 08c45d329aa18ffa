"""Load balancing: the buckets of a step over ranks and micro-batches, within a token budget."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from s2s_scale.data.batch_plan import Lengths, Rows
from s2s_scale.data.buckets import BucketLayout, row_cost
from s2s_scale.errors import UserError

MAX_ROUNDS = 8
TOLERANCE = 0.01
"""Difference between the largest and the smallest load, relative to their mean."""

Counts = npt.NDArray[np.int64]
Costs = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LoadBalancer:
    """Divides buckets over ``world_size`` ranks, into ``parts`` micro-batches each.

    ``parts`` is the same for every bucket, so that every rank has the same number of micro-batches
    in every step. ``rows``: int64 [buckets], with fixed shapes the rows of a micro-batch of each
    bucket, fillers included; None with free ones. ``max_tokens``: upper bound on the padded tokens
    of a micro-batch.
    """

    lengths: Lengths
    world_size: int
    parts: int
    rows: Counts | None
    max_tokens: int | None

    def divide(self, buckets: list[tuple[int, Rows]]) -> list[list[Rows]]:
        """``result[micro_batch][rank]``: row ids of a step's buckets, ``parts`` for each bucket.

        Every row is in exactly one of them; a rank's part is empty if a bucket has too few rows.
        With fixed shapes a bucket is divided evenly, since micro-batches that are completed with
        filler rows cost the same. With free ones the loads of the ranks, pads and attention
        included, are balanced: a rank with more of the long rows gets fewer of the short ones.
        """
        loads = np.zeros(self.world_size)
        result = []
        for _, rows in buckets:
            if self.rows is not None:
                parts = np.array_split(rows, self.parts)
                result += [np.array_split(part, self.world_size) for part in parts]
                continue
            split = [np.array_split(share, self.parts) for share in self._balance(rows, loads)]
            result += [list(parts) for parts in zip(*split, strict=True)]
        return result

    def _balance(self, rows: Rows, loads: Costs) -> list[Rows]:
        """Each rank's rows, longest first; adds their costs to ``loads``.

        Neighbours in length stay together. The cost of a row depends on the width that its share
        is padded to, which is only known afterwards: hence several rounds.
        """
        widths = np.stack([side[rows] for side in self.lengths], axis=1).astype(np.int64)
        costs = row_cost(widths)
        longest_first = np.argsort(-costs, kind="stable")
        rows, widths, costs = rows[longest_first], widths[longest_first], costs[longest_first]
        if self.world_size == 1:
            return [rows]
        # Rows that a rank may take which starts at each place of the bucket: int64 [rows].
        room = np.full(len(widths), len(widths))
        if self.max_tokens is not None:
            longest = np.maximum.accumulate(widths[::-1], axis=0)[::-1]
            room = self.max_tokens // longest.sum(axis=1) * self.parts
        ranks = np.argsort(loads, kind="stable")
        least, best, after = np.inf, np.zeros(0, np.int64), loads
        for _ in range(MAX_ROUNDS):
            ends = _within(_level_ends(loads[ranks], costs), room)
            counts = np.diff(ends, prepend=0)
            padded = _padded_costs(widths, counts, parts=self.parts)
            reached = loads[ranks] + padded
            spread = float(reached.max() - reached.min())
            if spread < least:
                least, best, after = spread, ends, reached
            if spread < TOLERANCE * reached.mean():
                break
            costs = np.repeat(padded / np.maximum(counts, 1), counts)
        loads[ranks] = after
        shares: list[Rows] = [rows[:0]] * self.world_size
        for rank, share in zip(ranks, np.split(rows, best[:-1]), strict=True):
            shares[rank] = share
        return shares


def balance_loads(
    layout: BucketLayout,
    lengths: Lengths,
    *,
    world_size: int,
    max_tokens: int | None = None,
    rows_multiple: int = 1,
) -> LoadBalancer:
    """A load balancer with the fewest micro-batches per bucket that fit into ``max_tokens``.

    Args:
        layout: the buckets of every epoch.
        lengths: source and target tokens of each row.
        world_size: number of ranks.
        max_tokens: padded source and target tokens of one rank's micro-batch; None: no bound, one
            micro-batch per bucket.
        rows_multiple: with fixed shapes the rows of a micro-batch are a multiple of this, the same
            for all buckets of a shape.

    Raises:
        UserError: ``rows_multiple`` of the longest rows exceed ``max_tokens``.
    """
    widths = layout.widths.sum(axis=1)
    need = rows_multiple * int(widths.max(initial=0))
    if max_tokens is not None and need > max_tokens:
        raise UserError(
            f"max_tokens_per_device={max_tokens // rows_multiple}: expected at least "
            f"{need // rows_multiple}, the longest row after padding; raise "
            "--max_tokens_per_device, or lower --max_source_length or --max_target_length"
        )
    sizes = layout.sizes
    if layout.shapes is not None:  # those of the largest bucket of the same shape
        most = np.zeros(int(layout.shapes.max(initial=-1)) + 1, dtype=np.int64)
        np.maximum.at(most, layout.shapes, layout.sizes)
        sizes = most[layout.shapes]
    sizes = -(-sizes // world_size)
    parts = 1
    rows = _round_up(sizes, rows_multiple)
    while max_tokens is not None and (rows * widths > max_tokens).any():
        parts += 1
        rows = _round_up(-(-sizes // parts), rows_multiple)
    fixed = layout.shapes is not None
    return LoadBalancer(lengths, world_size, parts, rows if fixed else None, max_tokens)


def _round_up(values: Counts, multiple: int) -> Counts:
    return -(-values // multiple) * multiple


def _level_ends(ascending: Costs, costs: Costs) -> Counts:
    """The end of each rank's share, for rows of these costs, that makes the loads equal.

    Water-filling: ``ascending`` are the loads so far, lowest first, and the rows raise the lowest
    of them to a common level.
    """
    levels = (costs.sum() + np.cumsum(ascending)) / np.arange(1, len(ascending) + 1)
    # Only ranks whose load is below the level take part.
    level = levels[np.flatnonzero(ascending <= levels)[-1]]
    wanted = np.cumsum(np.maximum(level - ascending, 0))
    ends = np.searchsorted(np.cumsum(costs) - costs / 2, wanted)
    ends[-1] = len(costs)
    return ends


def _within(ends: Counts, room: Counts) -> Counts:
    """The nearest ends for which a share that starts at ``i`` has at most ``room[i]`` rows.

    ``room`` must not decrease, and shares of ``room[0]`` rows must hold all rows.
    """
    reach = np.arange(len(room)) + room
    earliest = [len(room)]  # where each share must end at least for the later ones to suffice
    for _ in range(len(ends) - 1):
        earliest.append(int(np.searchsorted(reach, earliest[-1])))
    start, found = 0, []
    for end, least in zip(ends.tolist(), reversed(earliest), strict=True):
        latest = int(reach[start]) if start < len(room) else start
        start = min(max(end, start, least), latest, len(room))
        found.append(start)
    return np.array(found)


def _padded_costs(widths: Counts, counts: Counts, *, parts: int) -> Costs:
    """Cost of shares of ``counts`` rows, each split as by ``numpy.array_split`` into micro-batches
    that are padded to their longest row."""
    sizes = counts[:, None] // parts + (np.arange(parts) < counts[:, None] % parts)
    filled = sizes.reshape(-1) > 0
    starts = (np.cumsum(sizes) - sizes.reshape(-1))[filled]
    costs = np.zeros(sizes.size)
    costs[filled] = row_cost(np.maximum.reduceat(widths, starts, axis=0))
    totals: Costs = (costs.reshape(sizes.shape) * sizes).sum(axis=1)
    return totals
