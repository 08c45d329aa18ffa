"""Samplers of all ranks together hold the plan; filler rows carry no loss."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from s2s_scale.data.collators import Seq2SeqCollator
from s2s_scale.data.samplers import FillerRows, PlanBatchSampler, PlanSampler

small = st.integers(1, 5)
LENGTHS = tuple(np.random.RandomState(0).randint(1, 50, size=(2, 200)).astype(np.int32))


def samplers(count: int, world: int, **options: Any) -> list[PlanSampler]:
    lengths = (LENGTHS[0][:count], LENGTHS[1][:count])
    return [PlanSampler(lengths, rank=r, world_size=world, **options) for r in range(world)]


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.sampled_from(["fixed", "sortish", "sequential"]),
    st.integers(0, 200), small, small, small, st.booleans(), st.integers(0, 3),
)  # fmt: skip
def test_ranks_together_have_every_row_once(
    mode: str, count: int, world: int, device: int, accumulation: int, drop: bool, epoch: int
) -> None:
    ranks = samplers(
        count, world, rows_per_device=device, accumulation=accumulation, mode=mode, drop_last=drop
    )
    loaders = [PlanBatchSampler(rank) for rank in ranks]
    for loader in loaders:
        loader.set_epoch(epoch)
    batches = [list(loader) for loader in loaders]
    assert {len(b) for b in batches} == {len(loader) for loader in loaders} == {len(batches[0])}
    assert all(batch for rank in batches for batch in rank)
    assert all(len(batch) <= device for rank in batches for batch in rank)
    ids = [row for rank in batches for batch in rank for row in batch]
    real = [row for row in ids if row >= 0]
    assert sorted(real) == sorted(ranks[0].plan.order.tolist())
    assert drop or len(real) == count
    fillers = [row for row in ids if row < 0]
    assert {~row for row in fillers} <= set(real)
    if world == 1:
        assert not fillers
    for rank, found in zip(ranks, batches, strict=True):
        assert list(rank) == [row for batch in found for row in batch]
        assert len(rank) == len(list(rank))


def test_micro_batches_make_up_the_steps() -> None:
    """``accumulation`` micro-batches of all ranks are exactly one step of the plan."""
    ranks = samplers(50, 2, rows_per_device=3, accumulation=2, mode="sortish", seed=4)
    assert ranks[0].rows_per_step == 12
    assert ranks[0].steps == 5
    batches = [list(PlanBatchSampler(rank)) for rank in ranks]
    for step in range(4):
        parts = [row for rank in batches for part in rank[2 * step : 2 * step + 2] for row in part]
        assert sorted(parts) == sorted(ranks[0].plan.rows(step).tolist())
    assert [len(rank) for rank in batches] == [9, 9]  # 2 rows are left: one micro-batch
    assert [rank[-1] for rank in batches] == [[row] for row in ranks[0].plan.rows(4).tolist()]


def test_a_rank_without_a_row_gets_a_filler() -> None:
    ranks = samplers(9, 4, rows_per_device=2, mode="sequential")
    assert [list(PlanBatchSampler(rank))[-1] for rank in ranks] == [[8], [~8], [~8], [~8]]


def test_epochs() -> None:
    (sampler,) = samplers(40, 1, rows_per_device=4)
    first = list(sampler)
    plan = sampler.plan
    sampler.set_epoch(0)
    assert sampler.plan is plan
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_mistakes() -> None:
    for options in ({"rank": 2, "world_size": 2}, {"accumulation": 0}, {"world_size": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            PlanSampler(n_rows=4, rows_per_device=1, **options)
    with pytest.raises(ValueError, match="n_rows"):
        PlanSampler(rows_per_device=1)


ROWS = [{"input_ids": [row, row + 1], "labels": [row, 3, -100][: row + 1]} for row in range(3)]


def test_filler_rows_through_a_loader() -> None:
    """The shapes are those of the row; all labels are -100; the data itself is untouched."""
    fillers = FillerRows(datasets.Dataset.from_list(ROWS))
    assert len(fillers) == 3
    assert fillers.column_names == ["input_ids", "labels"]
    collate = Seq2SeqCollator(0)
    loader = DataLoader(fillers, batch_sampler=[[2, ~2], [0, 1], [~0]], collate_fn=collate)
    first, second, third = list(loader)
    assert first["input_ids"].tolist() == [[2, 3], [2, 3]]
    assert first["labels"].tolist() == [[2, 3, -100], [-100] * 3]
    assert second["labels"].tolist() == [[0, -100], [1, 3]]
    assert third["input_ids"].tolist() == [[0, 1]]
    assert third["labels"].tolist() == [[-100]]
    assert fillers[2] == ROWS[2]
    assert fillers[~1]["labels"] == [-100, -100]


@pytest.mark.parametrize("make", [list, np.array, torch.tensor])
def test_filler_rows_of_plain_data_sets(make: Any) -> None:
    rows = [{"input_ids": make([1, 2]), "labels": make([5, 6])}, {"input_ids": make([1])}]
    fillers = FillerRows(rows)
    assert not hasattr(fillers, "column_names")
    one, other, bare = fillers.__getitems__([0, ~0, ~1])
    assert one is rows[0]
    assert bare is rows[1]
    assert type(other["labels"]) is type(rows[0]["labels"])
    assert list(other["labels"]) == [-100, -100]
    assert list(rows[0]["labels"]) == [5, 6]


def test_one_read_a_batch_where_the_data_set_offers_it() -> None:
    class Batched(list):  # type: ignore[type-arg]
        reads = 0

        def __getitems__(self, rows: list[int]) -> list[Any]:
            self.reads += 1
            return [self[row] for row in rows]

    data = Batched(ROWS)
    assert len(FillerRows(data).__getitems__([2, ~2, 0])) == 3
    assert data.reads == 1
