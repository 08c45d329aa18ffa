"""The packed plan: each pair once, rows of one size with few pads, the same for every reader."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2s_scale.data import packing
from s2s_scale.data.packing import distribute, packed_layout, plan_packed
from s2s_scale.errors import UserError
from tests.support.lengths import long_tailed, share_of_pads_at_random

# Held against the plan that was first shipped: a resumed run must meet the same rows.
GOLDEN = [
    [[18, 1], [6, 17, 11], [14, 15, 10]],
    [[9, 3, 4], [12, 20, 21], [8, 13]],
    [[0, 5, 16], [7, 19], [2, 23, 22]],
]


def some_lengths(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.RandomState(seed)
    source, target = (random.randint(1, 40, count).astype(np.int32) for _ in range(2))
    return source, target


def loads(lengths, plan):
    """Source and target tokens of every packed row: [rows, 2]."""
    ends = plan.row_offsets
    sums = [np.concatenate([[0], np.cumsum(side[plan.order])]) for side in lengths]
    return np.stack([np.diff(side[ends]) for side in sums], axis=1)


@given(
    count=st.integers(0, 200),
    tokens=st.integers(80, 3_000),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_each_pair_once_and_no_row_over_its_width(count, tokens, seed, epoch):
    lengths = some_lengths(count, seed)
    layout = packed_layout(lengths, tokens_per_step=tokens)
    plan = plan_packed(layout, seed=seed, epoch=epoch)
    assert sorted(plan.order.tolist()) == list(range(count))
    assert plan.steps == layout.steps == len(plan.offsets) - 1
    assert len(plan.row_offsets) - 1 == layout.steps * layout.rows_per_step
    assert (loads(lengths, plan) <= layout.widths).all()
    for step in range(plan.steps):
        rows = plan.rows_of(step)
        assert len(rows) == layout.rows_per_step
        assert np.concatenate(rows).tolist() == plan.rows(step).tolist()
    with pytest.raises(IndexError):
        plan.rows_of(plan.steps)


@pytest.mark.parametrize(
    ("count", "tokens"), [(4_000, 32_768), (100_000, 131_072), (300_000, 65_536)]
)
def test_long_tailed_pairs_leave_at_most_two_percent_pads(count, tokens):
    lengths = long_tailed(count)
    started = time.process_time()
    layout = packed_layout(lengths, tokens_per_step=tokens)
    plans = [plan_packed(layout, seed=1, epoch=epoch) for epoch in range(2)]
    seconds = (time.process_time() - started) / 2
    real = sum(int(side.sum()) for side in lengths)
    room = layout.steps * layout.rows_per_step * sum(layout.widths)
    pads, random = 1 - real / room, share_of_pads_at_random(lengths)
    print(f"{count}: {layout.widths}, {100 * pads:.2f} % pads, {seconds:.2f} s")
    assert pads < 0.02 < 0.6 < random
    assert seconds < 2 * max(1, count / 1e6)
    for plan in plans:
        assert (loads(lengths, plan) <= layout.widths).all()
        steps = np.add.reduceat(sum(lengths)[plan.order], plan.offsets[:-1])
        assert steps.max() <= 1.02 * steps.mean() and steps.mean() <= tokens
    assert layout.rows_per_step % packing.ROWS_STEP == 0


def test_pairs_of_like_length_change_rows_and_steps_between_epochs():
    lengths = long_tailed(3_000)
    layout = packed_layout(lengths, tokens_per_step=16_384)
    first, same, other = (plan_packed(layout, seed=4, epoch=epoch) for epoch in (0, 0, 1))
    assert first.order.tolist() == same.order.tolist()
    partners = [
        {frozenset(row.tolist()) for step in range(plan.steps) for row in plan.rows_of(step)}
        for plan in (first, other)
    ]
    assert len(partners[0] & partners[1]) < 0.02 * len(partners[0])
    together = [
        {pair: step for step in range(plan.steps) for pair in plan.rows(step).tolist()}
        for plan in (first, other)
    ]
    moved = sum(together[0][pair] != together[1][pair] for pair in range(3_000))
    assert moved > 3_000 * (1 - 1.5 / layout.steps)


def test_every_step_holds_short_and_long_pairs():
    lengths = long_tailed(20_000)
    plan = plan_packed(packed_layout(lengths, tokens_per_step=32_768), seed=0, epoch=0)
    tokens = sum(lengths)
    shares = np.quantile(tokens, [0.25, 0.5, 0.75])
    for rows in plan:
        for quantile, expected in zip(shares, (0.25, 0.5, 0.75), strict=True):
            assert (tokens[rows] <= quantile).mean() == pytest.approx(expected, abs=0.08)


def test_rows_that_do_not_fit_take_those_that_do(monkeypatch):
    lengths = long_tailed(5_000)
    layout = packed_layout(lengths, tokens_per_step=32_768)
    base = plan_packed(layout, seed=3, epoch=7)
    tight = packing.replace(layout, widths=tuple(width - 2 for width in layout.widths))
    assert packing._chunks_within_widths(tight, packing.random_state(3, 7)) is None
    plan = plan_packed(tight, seed=3, epoch=7)
    assert sorted(plan.order.tolist()) == list(range(5_000))
    assert (loads(lengths, plan) <= layout.widths).all()
    assert plan.order.tolist() != base.order.tolist()


def test_pairs_that_fill_rows_exactly_share_them():
    sizes = np.array([[6.0, 4, 10, 5, 5], [2.0, 8, 10, 6, 4]])
    rows = distribute(sizes, 3)
    assert [np.bincount(rows, weights=side).tolist() for side in sizes] == [[10.0] * 3] * 2


def test_the_plan_is_that_of_the_first_release():
    layout = packed_layout(some_lengths(24, 5), tokens_per_step=320)
    plan = plan_packed(layout, seed=7, epoch=1)
    found = [[row.tolist() for row in plan.rows_of(step)] for step in range(plan.steps)]
    assert found == GOLDEN


def test_sizes_that_hold_no_pair_are_refused():
    lengths = np.array([3, 20], np.int32), np.array([9, 4], np.int32)
    with pytest.raises(UserError, match="tokens_per_step=20: expected at least 24, the longest"):
        packed_layout(lengths, tokens_per_step=20)
    with pytest.raises(UserError, match="tokens_per_row=28: expected at least 29"):
        packed_layout(lengths, tokens_per_step=90, tokens_per_row=28)
    with pytest.raises(UserError, match="tokens_per_step=90: expected at least 100, one row"):
        packed_layout(lengths, tokens_per_step=90, tokens_per_row=100)
    assert packed_layout(lengths, tokens_per_step=90, tokens_per_row=29).steps == 1
