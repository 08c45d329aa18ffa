"""Properties of the batch plan for any sizes."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2s_scale.data.batch_plan import (
    LARGE_PERMUTATION,
    STEPS_PER_CHUNK,
    EpochPlan,
    Lengths,
    Mode,
    _longest_first,
    _permutation,
    _stable_order,
    divide_step,
    evaluation_batches,
    micro_batches_of_step,
    plan_epoch,
    random_state,
    steps_per_epoch,
)

MODES: tuple[Mode, ...] = ("fixed", "sortish", "sequential")
modes = st.sampled_from(MODES)
small = st.integers(1, 6)
# Held against the plan that was first shipped: a resumed run must meet the same rows.
GOLDEN_FIXED = [9, 5, 8, 7, 6, 4, 0, 3, 1, 2]
GOLDEN_SORTISH = [9, 4, 5, 0, 6, 1, 8, 3, 7, 2]


def make_lengths(count: int, *, seed: int = 0, longest: int = 60) -> Lengths:
    random = np.random.RandomState(seed)
    source, target = random.randint(1, longest, size=(2, count)).astype(np.int32)
    return source, target


@settings(deadline=None)  # a busy machine is no failure
@given(modes, st.integers(0, 400), st.integers(1, 50), st.integers(0, 2**63), st.integers(0, 9))
def test_every_row_once_in_full_steps_but_the_last(
    mode: Mode, count: int, rows_per_step: int, seed: int, epoch: int
) -> None:
    lengths = make_lengths(count, seed=seed % 1000)
    plan = plan_epoch(lengths, rows_per_step=rows_per_step, seed=seed, epoch=epoch, mode=mode)
    assert sorted(plan.order.tolist()) == list(range(count))
    sizes = [len(rows) for rows in plan]
    full, rest = divmod(count, rows_per_step)
    assert sizes == [rows_per_step] * full + [rest] * (rest > 0)
    assert plan.steps == len(sizes) == steps_per_epoch(count, rows_per_step=rows_per_step)
    cut = plan_epoch(
        lengths, rows_per_step=rows_per_step, seed=seed, epoch=epoch, mode=mode, drop_last=True
    )
    assert cut.order.tolist() == plan.order[: full * rows_per_step].tolist()
    assert cut.steps == steps_per_epoch(count, rows_per_step=rows_per_step, drop_last=True) == full


@settings(deadline=None)  # a busy machine is no failure
@given(modes, st.integers(1, 300), small, small, small, st.integers(0, 99))
def test_ranks_share_a_step_fairly(
    mode: Mode, count: int, world: int, device: int, accumulation: int, seed: int
) -> None:
    rows_per_step = world * device * accumulation
    plan = plan_epoch(
        make_lengths(count), rows_per_step=rows_per_step, seed=seed, epoch=0, mode=mode
    )
    seen: list[int] = []
    for step, rows in enumerate(plan):
        micro_batches = divide_step(rows, world_size=world, rows_per_device=device)
        assert np.concatenate(list(itertools.chain(*micro_batches))).tolist() == rows.tolist()
        assert len(micro_batches) == micro_batches_of_step(
            len(rows), world_size=world, rows_per_device=device
        )
        assert 1 <= len(micro_batches) <= accumulation
        left = len(rows)
        for parts in micro_batches:
            sizes = [len(part) for part in parts]
            assert len(sizes) == world
            assert max(sizes) - min(sizes) <= 1
            assert max(sizes) <= device
            assert min(sizes) > 0 or left < world
            left -= sum(sizes)
        if step < plan.steps - 1:
            assert {len(part) for parts in micro_batches for part in parts} == {device}
            assert len(micro_batches) == accumulation
        seen += rows.tolist()
    assert sorted(seen) == list(range(count))


@settings(deadline=None)  # a busy machine is no failure
@given(modes, st.integers(1, 200), st.integers(0, 99))
def test_the_same_rows_make_a_step_whatever_the_ranks(mode: Mode, count: int, seed: int) -> None:
    plan = plan_epoch(make_lengths(count), rows_per_step=24, seed=seed, epoch=1, mode=mode)
    divisions = [(1, 24), (1, 8), (2, 12), (2, 3), (3, 8), (4, 6), (8, 1), (24, 1)]
    for world, device in divisions:
        for rows in plan:
            parts = itertools.chain(*divide_step(rows, world_size=world, rows_per_device=device))
            assert sorted(np.concatenate(list(parts)).tolist()) == sorted(rows.tolist())


@pytest.mark.parametrize("mode", ["fixed", "sortish"])
def test_plans_are_repeatable_and_epochs_differ(mode: Mode) -> None:
    lengths = make_lengths(500)

    def order(*, seed: int, epoch: int) -> list[int]:
        state = np.random.get_state()[1].tolist()  # type: ignore[union-attr]
        plan = plan_epoch(lengths, rows_per_step=16, seed=seed, epoch=epoch, mode=mode)
        assert np.random.get_state()[1].tolist() == state  # type: ignore[union-attr]
        return plan.order.tolist()

    assert order(seed=3, epoch=2) == order(seed=3, epoch=2)
    orders = [order(seed=seed, epoch=epoch) for seed in range(4) for epoch in range(4)]
    assert len({tuple(found) for found in orders}) == 16


def test_golden_plan() -> None:
    plan = plan_epoch(None, n_rows=10, rows_per_step=4, seed=42, epoch=1, mode="fixed")
    assert plan.order.tolist() == GOLDEN_FIXED
    lengths = (np.arange(10, dtype=np.int32) % 5, np.arange(10, dtype=np.int32))
    plan = plan_epoch(lengths, rows_per_step=2, seed=42, epoch=1, mode="sortish")
    assert plan.order.tolist() == GOLDEN_SORTISH


@settings(deadline=None)  # a busy machine is no failure
@given(st.integers(1, 400), st.integers(1, 8), st.integers(0, 999))
def test_sortish_has_the_longest_row_first(count: int, rows_per_step: int, seed: int) -> None:
    lengths = make_lengths(count, seed=seed)
    plan = plan_epoch(lengths, rows_per_step=rows_per_step, seed=seed, epoch=0, mode="sortish")
    keys = list(zip(*(side.tolist() for side in lengths), strict=True))
    assert max(keys[row] for row in plan.rows(0)) == max(keys)
    for rows in plan:
        found = [keys[row] for row in rows]
        assert found == sorted(found, reverse=True)


def fastai_order(
    count: int, key: Callable[[int], tuple[int, int]], batch: int, random: np.random.RandomState
) -> list[np.ndarray]:
    """fastai 1.0.61's SortishSampler.__iter__, for a count that its batch size divides."""
    indices = random.permutation(count)
    size = batch * 50
    chunks = [indices[i : i + size] for i in range(0, count, size)]
    sort = np.concatenate([sorted(s, key=key, reverse=True) for s in chunks])
    batches = [sort[i : i + batch] for i in range(0, count, batch)]
    longest = int(np.argmax([key(b[0]) for b in batches], axis=0)[0])
    batches[0], batches[longest] = batches[longest], batches[0]
    rest = random.permutation(np.array(batches[1:]))
    return [batches[0], *rest]


def test_sortish_pads_as_little_as_fastai() -> None:
    """Same chunks and sorting: the plans' padding agrees closely, far below random batches."""
    count, batch = 16_000, 16
    source, target = make_lengths(count, seed=1, longest=200)

    def padded(batches: list[np.ndarray] | EpochPlan) -> float:
        return sum(len(rows) * int(source[rows].max()) for rows in batches) / source.sum()

    reference = padded(
        fastai_order(count, lambda i: (source[i], target[i]), batch, np.random.RandomState(0))
    )
    plans = {
        mode: padded(plan_epoch((source, target), rows_per_step=batch, seed=0, epoch=0, mode=mode))
        for mode in ("fixed", "sortish")
    }
    assert plans["sortish"] == pytest.approx(reference, rel=0.005)
    assert plans["sortish"] < 1.05 < 1.5 < plans["fixed"]


def test_sortish_sorts_inside_random_chunks() -> None:
    """Each step's rows lie in one chunk of 50 steps, and a chunk is no slice of the sorted data."""
    count, batch = 1000, 4
    source = np.arange(count, dtype=np.int32)
    plan = plan_epoch((source, source), rows_per_step=batch, seed=0, epoch=0, mode="sortish")
    spreads = [int(source[rows].max() - source[rows].min()) for rows in plan]
    # Sorting all 1,000 rows would give spreads of 3; chunks of 200 give about 15; random 600.
    assert 8 < np.mean(spreads) < 25
    firsts = [int(source[rows[0]]) for rows in plan]
    assert firsts[0] == count - 1
    assert firsts != sorted(firsts, reverse=True)
    assert STEPS_PER_CHUNK == 50


@pytest.mark.parametrize("scale", [1, 2**40])
def test_the_fast_sorts_give_the_order_of_numpy_s_stable_ones(scale: int) -> None:
    """Short lengths, whose key shares 64 bits with the place, and ones too long for that."""
    random = np.random.default_rng(0)
    source, target = (random.integers(1, 9, 3_000).astype(np.int64) * scale for _ in range(2))
    if scale > 1:
        target //= scale
    key, bits = _longest_first(source, target)
    expected = np.lexsort((-target, -source))
    assert (_stable_order(key, bits) == expected).all()
    assert key.itemsize == (4 if scale == 1 else 8)


def test_a_large_permutation_is_the_order_of_its_keys() -> None:
    count = LARGE_PERMUTATION + 12_345
    keys = random_state(3, 1).randint(0, 2**63 >> count.bit_length(), count, dtype=np.int64)
    expected = np.argsort(keys, kind="stable")
    assert (_permutation(random_state(3, 1), count) == expected).all()


def test_neighbours_in_length_share_a_micro_batch() -> None:
    source = np.arange(640, dtype=np.int32)
    plan = plan_epoch((source, source), rows_per_step=64, seed=0, epoch=0, mode="sortish")
    for rows in plan:
        micro_batches = divide_step(rows, world_size=2, rows_per_device=8)
        bounds = [(max(map(max, parts)), min(map(min, parts))) for parts in micro_batches]
        assert all(low > high for (_, low), (high, _) in itertools.pairwise(bounds))


def test_fixed_needs_no_lengths() -> None:
    lengths = make_lengths(33)
    with_lengths = plan_epoch(lengths, rows_per_step=4, seed=5, epoch=6, mode="fixed")
    without = plan_epoch(None, n_rows=33, rows_per_step=4, seed=5, epoch=6, mode="fixed")
    assert with_lengths.order.tolist() == without.order.tolist() != list(range(33))
    sequential = plan_epoch(None, n_rows=33, rows_per_step=4, seed=5, epoch=6, mode="sequential")
    assert sequential.order.tolist() == list(range(33))


def test_mistakes() -> None:
    lengths = make_lengths(4)
    with pytest.raises(ValueError, match="rows_per_step=0"):
        plan_epoch(lengths, rows_per_step=0, seed=0, epoch=0)
    with pytest.raises(ValueError, match="expected 'fixed'"):
        plan_epoch(lengths, rows_per_step=1, seed=0, epoch=0, mode="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs the lengths"):
        plan_epoch(None, n_rows=4, rows_per_step=1, seed=0, epoch=0, mode="sortish")
    with pytest.raises(ValueError, match="n_rows"):
        plan_epoch(None, rows_per_step=1, seed=0, epoch=0)
    with pytest.raises(ValueError, match="same number"):
        plan_epoch(lengths, n_rows=5, rows_per_step=1, seed=0, epoch=0)
    with pytest.raises(IndexError):
        plan_epoch(lengths, rows_per_step=4, seed=0, epoch=0).rows(1)
    with pytest.raises(ValueError, match="world_size=0"):
        divide_step(np.arange(3), world_size=0, rows_per_device=1)
    with pytest.raises(ValueError, match="rows_per_batch=0"):
        evaluation_batches(None, n_rows=3, rows_per_batch=0)
    assert divide_step(np.arange(0), world_size=2, rows_per_device=1) == []


@settings(deadline=None)  # a busy machine is no failure
@given(st.integers(0, 100), st.integers(1, 20), st.integers(0, 99))
def test_evaluation_batches(count: int, rows_per_batch: int, seed: int) -> None:
    lengths = make_lengths(count, seed=seed)
    plain = evaluation_batches(None, n_rows=count, rows_per_batch=rows_per_batch)
    assert [int(row) for batch in plain for row in batch] == list(range(count))
    batches = evaluation_batches(lengths, n_rows=count, rows_per_batch=rows_per_batch)
    assert [len(batch) for batch in batches] == [len(batch) for batch in plain]
    rows = [int(row) for batch in batches for row in batch]
    keys = list(zip(*(side.tolist() for side in lengths), strict=True))
    assert rows == sorted(range(count), key=lambda row: (-keys[row][0], -keys[row][1], row))


@settings(deadline=None)  # a busy machine is no failure
@given(st.integers(0, 100), st.integers(1, 20), st.integers(1, 5), st.integers(0, 99))
def test_evaluation_batches_within_a_budget_of_tokens(
    count: int, rows_per_batch: int, world_size: int, seed: int
) -> None:
    source, target = make_lengths(count, seed=seed)
    budget = 130 + seed
    options = {"rows_per_batch": rows_per_batch, "max_tokens": budget, "world_size": world_size}
    batches = evaluation_batches((source, target), n_rows=count, **options)
    assert sorted(int(row) for batch in batches for row in batch) == list(range(count))
    sizes = [len(batch) for batch in batches]
    full_rounds = (len(batches) - 1) // world_size
    for number in range(full_rounds):
        assert len(set(sizes[number * world_size : (number + 1) * world_size])) == 1
    for number in range(0, len(batches), world_size):
        rows = np.concatenate(batches[number : number + world_size])
        each = sizes[number]
        assert each <= rows_per_batch
        assert each * (source[rows].max() + target[rows].max()) <= budget or each == 1
        grown = order_of(source, target)
        more = grown[grown.tolist().index(rows[0]) :][: (each + 1) * world_size]
        widened = (each + 1) * (source[more].max() + target[more].max())
        assert widened > budget or each == rows_per_batch or number + world_size >= len(batches)


def order_of(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    return np.lexsort((np.arange(len(source)), -target, -source))
