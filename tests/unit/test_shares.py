"""Dividing parameters over ranks by their sizes."""

from __future__ import annotations

from s2s_scale.backends.base import equal_shares


def test_shares_are_near_each_other():
    sizes = {"a": 5, "b": 9, "c": 4, "d": 1, "e": 7}
    for ranks in (1, 2, 3, 8):
        found = equal_shares(sizes, ranks)
        assert sorted(found) == list(sizes)
        totals = [sum(sizes[n] for n in sizes if found[n] == rank) for rank in range(ranks)]
        # Graham's bound for this rule: within 4/3 of the best, which is no less than these two.
        assert max(totals) <= 4 / 3 * max(max(sizes.values()), -(-sum(sizes.values()) // ranks))
