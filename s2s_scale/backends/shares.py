"""Dividing things of different sizes evenly over ranks."""

from __future__ import annotations

from collections.abc import Mapping


def equal_shares(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Name -> rank, so that the ranks' sums of sizes are near each other.

    Largest first, to the emptiest rank (longest-processing-time rule, Graham 1969). The same for
    the same sizes, wherever it is called.
    """
    totals = [0] * ranks
    rank_of = {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        rank = totals.index(min(totals))
        rank_of[name] = rank
        totals[rank] += sizes[name]
    return rank_of
