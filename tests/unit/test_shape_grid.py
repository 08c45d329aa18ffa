"""The grid of shapes: covers every row, is the best there is, and beats the usual paddings."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2s_scale.data.buckets import (
    MAX_LEVELS,
    ShapeGrid,
    choose_shapes,
    padded_to_longest,
    padded_to_powers,
    row_cost,
    spread_levels,
)
from tests.support.lengths import long_tailed, share_of_pads_at_random

pairs = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=60)


def lengths_of(rows: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    source, target = np.array(rows, dtype=np.int32).T
    return source.copy(), target.copy()


def padded_by_hand(rows: list[tuple[int, int]], widths: list[tuple[int, int]]) -> float:
    """Tokens where each row takes the cheapest shape that holds it."""
    return sum(min(S + T for S, T in widths if s <= S and t <= T) for s, t in rows)


@settings(deadline=None)
@given(pairs, st.integers(1, 9))
def test_every_row_has_a_shape_that_holds_it(rows: list[tuple[int, int]], buckets: int) -> None:
    lengths = lengths_of(rows)
    grid = choose_shapes(lengths, num_buckets=buckets)
    assert 1 <= len(grid) <= buckets
    for before, after in itertools.pairwise(grid.widths):
        assert before[0] <= after[0]
        assert before[1] <= after[1]
        assert before != after
    assert grid.largest == (max(s for s, _ in rows), max(t for _, t in rows))
    numbers = grid.fit(lengths)
    for (source, target), number in zip(rows, numbers, strict=True):
        fitting = [w for w in grid.widths if w[0] >= source and w[1] >= target]
        assert grid.widths[number] == fitting[0] == grid.holding(source, target)
    assert set(numbers.tolist()) == set(range(len(grid)))
    real = sum(map(sum, rows))
    assert grid.real_share(lengths) == pytest.approx(real / padded_by_hand(rows, [*grid.widths]))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=25),
    st.integers(1, 3),
)
def test_no_chain_of_shapes_is_better(rows: list[tuple[int, int]], buckets: int) -> None:
    """Against all chains, tried one by one."""
    sources, targets = (set(sides) for sides in zip(*rows, strict=True))
    corner = (max(sources), max(targets))
    best = float("inf")
    others = list(itertools.product(sources, targets))
    for chosen in itertools.combinations_with_replacement(others, buckets - 1):
        chain = sorted([*chosen, corner])
        if all(a[1] <= b[1] for a, b in itertools.pairwise(chain)):
            best = min(best, padded_by_hand(rows, chain))
    grid = choose_shapes(lengths_of(rows), num_buckets=buckets)
    assert padded_by_hand(rows, [*grid.widths]) == best


def test_shapes_on_long_tailed_lengths() -> None:
    """Random batches of 32 hold 65 to 70 % pads; padding to the longest and to powers beside it.

    A row in one of 8 shapes cannot do better than about 0.85: docs/explanation/batch-plan.md.
    """
    lengths = long_tailed(200_000)
    assert 0.65 < share_of_pads_at_random(lengths) < 0.70
    shares = {n: choose_shapes(lengths, num_buckets=n).real_share(lengths) for n in (1, 8, 16, 40)}
    powers, count = padded_to_powers(lengths)
    assert shares[1] == pytest.approx(padded_to_longest(lengths))
    assert shares[1] < 0.1
    assert count > 20
    assert shares[8] > powers + 0.05
    assert shares[8] > 0.76
    assert shares[16] > 0.85
    assert shares[40] > 0.90


def test_narrower_lengths_reach_nine_tenths_with_eight_shapes() -> None:
    """Sources cut at 1,024 tokens and short summaries, as in news summarisation."""
    random = np.random.RandomState(0)
    source = np.clip(np.exp(random.normal(np.log(800), 0.5, 50_000)), 50, 1024).astype(np.int32)
    target = np.clip(np.exp(random.normal(np.log(60), 0.3, 50_000)), 10, 142).astype(np.int32)
    assert choose_shapes((source, target)).real_share((source, target)) > 0.90
    assert padded_to_longest((source, target)) < 0.75


def test_few_distinct_lengths_need_no_pads() -> None:
    lengths = lengths_of([(3, 4), (7, 9), (20, 30)] * 5)
    grid = choose_shapes(lengths, num_buckets=8)
    assert grid.widths == ((3, 4), (7, 9), (20, 30))
    assert grid.real_share(lengths) == 1.0


def test_levels_are_few_and_end_at_the_longest() -> None:
    (source, _) = long_tailed(50_000)
    levels = spread_levels(source, MAX_LEVELS)
    assert len(levels) <= MAX_LEVELS
    assert levels[-1] == source.max()
    assert (np.diff(levels) > 0).all()
    assert spread_levels(np.array([5, 2, 5], dtype=np.int32), 48).tolist() == [2, 5]


def test_cost_counts_both_sides_and_attention() -> None:
    costs = row_cost(np.array([[10, 10], [20, 10], [10, 20], [2048, 2048]]))
    assert costs[1] == costs[2] > costs[0]
    assert costs[3] == pytest.approx(2 * 2048 + 3 * 2048)


def test_mistakes() -> None:
    lengths = lengths_of([(3, 4)])
    with pytest.raises(ValueError, match="num_buckets=0"):
        choose_shapes(lengths, num_buckets=0)
    with pytest.raises(ValueError, match="no rows"):
        choose_shapes((lengths[0][:0], lengths[1][:0]))
    with pytest.raises(ValueError, match="have 9 and 2 tokens; expected at most 3 and 4"):
        ShapeGrid(((3, 4),)).fit(lengths_of([(9, 2)]))
