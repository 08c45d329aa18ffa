"""Token-budgeted plans: every row once, near-equal steps, balanced loads, budgets kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2s_scale.data.buckets import choose_shapes, make_buckets, plan_buckets, row_cost
from s2s_scale.data.samplers import TokenSampler
from s2s_scale.errors import UserError
from tests.support.lengths import long_tailed

# Held against the plan that was first shipped: a resumed run must meet the same rows.
GOLDEN = [
    [
        22, 36, 37, 3, 31, 9, 7, 18, 35, 27, 1, 17,
    ],
    [
        16, 29, 0, 28, 13, 10, 26, 8, 2, 21, 12, 6,
    ],
    [
        24, 4, 11, 20, 33, 25, 23, 5, 19, 32, 38, 39, 34, 14, 15, 30,
    ],
]  # fmt: skip


def some_lengths(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    return long_tailed(count, mean=10, longest=60, seed=seed)


def samplers(lengths: Any, world: int, **options: Any) -> list[TokenSampler]:
    options = {"tokens_per_step": 600, "groups_per_step": 3, **options}
    return [TokenSampler(lengths, rank=r, world_size=world, **options) for r in range(world)]


@settings(deadline=None)
@given(
    st.integers(0, 400),
    st.integers(0, 99),
    st.integers(0, 3),
    st.integers(1, 5),
    st.one_of(st.none(), st.integers(1, 8)),
    st.booleans(),
)
def test_every_row_is_in_one_step(
    count: int, seed: int, epoch: int, each: int, buckets: int | None, drop: bool
) -> None:
    lengths = some_lengths(count, seed)
    grid = choose_shapes(lengths, num_buckets=buckets) if buckets and count else None
    layout = make_buckets(lengths, tokens_per_step=800, groups_per_step=each, grid=grid)
    plan = plan_buckets(layout, groups_per_step=each, seed=seed, epoch=epoch, drop_last=drop)
    whole = plan_buckets(layout, groups_per_step=each, seed=seed, epoch=epoch)
    assert sorted(whole.order.tolist()) == list(range(count))
    assert plan.order.tolist() == whole.order.tolist()[: len(plan.order)]
    assert plan.steps in (whole.steps, whole.steps - drop)
    for step in range(whole.steps):
        parts = whole.buckets_of(step)
        assert len(parts) == each or step == whole.steps - 1
        assert np.concatenate([rows for _, rows in parts]).tolist() == whole.rows(step).tolist()
        for bucket, rows in parts:
            assert len(rows) > 0
            for side, width in zip(lengths, layout.widths[bucket], strict=True):
                assert side[rows].max() <= width
            if grid is not None:
                assert tuple(layout.widths[bucket].tolist()) in grid.widths
    with pytest.raises(IndexError):
        whole.buckets_of(whole.steps)


@settings(deadline=None)
@given(
    st.integers(0, 300),
    st.integers(0, 99),
    st.integers(1, 9),
    st.one_of(st.none(), st.integers(120, 900)),
    st.one_of(st.none(), st.integers(1, 8)),
    st.integers(0, 2),
)
def test_ranks_have_equal_micro_batches_within_the_budget(
    count: int, seed: int, world: int, budget: int | None, buckets: int | None, epoch: int
) -> None:
    lengths = some_lengths(count, seed)
    ranks = samplers(lengths, world, max_tokens=budget, num_buckets=buckets)
    for rank in ranks:
        rank.set_epoch(epoch)
    batches = [list(rank.micro_batches()) for rank in ranks]
    assert {len(found) for found in batches} == {ranks[0].n_micro_batches}
    real = [row for found in batches for rows in found for row in rows if row >= 0]
    assert sorted(real) == list(range(count))
    shapes = set()
    for together in zip(*batches, strict=True):
        assert len({rows.widths for rows in together}) == 1
        for rows in together:
            ids = np.array([row if row >= 0 else ~row for row in rows])
            widths = rows.widths or tuple(side[ids].max() for side in lengths)
            assert all(side[ids].max() <= w for side, w in zip(lengths, widths, strict=True))
            assert budget is None or len(rows) * sum(widths) <= budget
            shapes.add((len(rows), *widths))
    if buckets is not None:
        assert len(shapes) <= buckets
    sampler = ranks[0]
    for step in range(sampler.steps - 1):
        assert len(list(sampler.divide(step))) == sampler.accumulation


def test_the_plan_does_not_know_the_ranks() -> None:
    lengths = long_tailed(3000)
    for buckets in (None, 8):
        plans = [
            TokenSampler(
                lengths,
                tokens_per_step=8000,
                groups_per_step=4,
                num_buckets=buckets,
                world_size=world,
                max_tokens=budget,
                rows_multiple=multiple,
            ).plan
            for world, budget, multiple in [(1, None, 1), (8, 4000, 1), (3, 9000, 4)]
        ]
        for plan in plans[1:]:
            assert plan.order.tolist() == plans[0].order.tolist()
            assert plan.offsets.tolist() == plans[0].offsets.tolist()


def test_epochs_differ_and_have_equal_sizes() -> None:
    lengths = long_tailed(5000)
    layout = make_buckets(lengths, tokens_per_step=10_000, groups_per_step=4)

    def plan(seed: int, epoch: int) -> Any:
        return plan_buckets(layout, groups_per_step=4, seed=seed, epoch=epoch)

    assert plan(3, 2).order.tolist() == plan(3, 2).order.tolist()
    plans = [plan(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(p.order.tolist()) for p in plans}) == 9
    assert {p.steps for p in plans} == {plans[0].steps}
    # The same rows must not always come together: two rows of the first epoch's first bucket.
    companions = [set(plans[e].buckets_of(1)[1][1].tolist()) for e in range(3)]
    assert len(companions[0] & companions[1]) < len(companions[0])


def test_golden_plan() -> None:
    lengths = some_lengths(40, 0)
    layout = make_buckets(lengths, tokens_per_step=400, groups_per_step=2)
    plan = plan_buckets(layout, groups_per_step=2, seed=42, epoch=1)
    assert [rows.tolist() for rows in plan] == GOLDEN


def test_steps_have_near_equal_tokens_and_mixed_lengths() -> None:
    lengths = long_tailed(50_000)
    tokens = sum(lengths)
    layout = make_buckets(lengths, tokens_per_step=32_768, groups_per_step=4)
    plan = plan_buckets(layout, groups_per_step=4, seed=0, epoch=0)
    per_step = np.array([tokens[rows].sum() for rows in plan])
    assert per_step.max() <= 32_768 * 1.02
    assert per_step.min() >= 32_768 * 0.97
    # Each step holds short and long rows: its mean length varies far less than a bucket's does.
    source = lengths[0]
    of_steps = [source[rows].mean() for rows in plan]
    of_buckets = [source[rows].mean() for s in range(plan.steps) for _, rows in plan.buckets_of(s)]
    assert np.std(of_steps) < np.std(of_buckets) / 4
    for step in range(plan.steps):
        means = [source[rows].mean() for _, rows in plan.buckets_of(step)]
        assert max(means) > 1.5 * min(means)


def test_the_longest_rows_come_first() -> None:
    lengths = long_tailed(20_000)
    for buckets in (None, 8):
        for epoch in range(3):
            sampler = TokenSampler(
                lengths, tokens_per_step=16_000, groups_per_step=4, num_buckets=buckets, seed=epoch
            )
            sampler.set_epoch(epoch)
            first = next(sampler.micro_batches())
            longest = row_cost(sampler.layout.widths).max()
            bucket = sampler.plan.buckets_of(0)[0]
            assert row_cost(sampler.layout.widths[bucket[0]]) == longest
            assert set(first) <= set(bucket[1].tolist())


@pytest.mark.parametrize(("each", "budget"), [(4, None), (4, 6000), (16, None)])
def test_loads_of_eight_ranks_are_balanced(each: int, budget: int | None) -> None:
    """Padded cost, source, target and attention, of every rank in every step: within 3 %."""
    lengths = long_tailed(60_000)
    sampler = TokenSampler(
        lengths, tokens_per_step=131_072, groups_per_step=each, world_size=8, max_tokens=budget
    )
    padded = real = 0
    for step in range(sampler.steps):
        loads = np.zeros(8)
        for batches in sampler.divide(step):
            for rank, batch in enumerate(batches):
                rows = batch.rows
                widths = np.array([side[rows].max() for side in lengths])
                loads[rank] += len(rows) * row_cost(widths)
                padded += len(rows) * widths.sum()
                real += sum(side[rows].sum() for side in lengths)
        assert (loads.max() - loads.min()) / loads.mean() < 0.03
    assert 1 - real / padded < 0.06


def test_fixed_shapes_have_near_equal_tokens() -> None:
    lengths = long_tailed(60_000)
    sampler = TokenSampler(
        lengths, tokens_per_step=131_072, groups_per_step=4, world_size=8, num_buckets=8
    )
    tokens = {
        len(batch) * sum(batch.widths)
        for step in range(sampler.steps)
        for batches in sampler.divide(step)
        for batch in batches
    }
    assert len(tokens) <= 8
    assert max(tokens) < 2 * min(tokens)


def test_mistakes() -> None:
    lengths = long_tailed(100)
    longest = int(sum(lengths).max())
    with pytest.raises(UserError, match=rf"tokens_per_step=10: expected at least {4 * longest}"):
        TokenSampler(lengths, tokens_per_step=10, groups_per_step=4)
    with pytest.raises(UserError, match=r"max_tokens_per_device=5: expected at least \d+"):
        TokenSampler(lengths, tokens_per_step=9999, groups_per_step=4, max_tokens=5)
