"""Evaluation within a budget of tokens: how many rows a batch has, their order, what is refused."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pytest
import torch

from s2s_scale import Seq2SeqTrainingArguments
from s2s_scale.errors import UserError
from s2s_scale.trainer.evaluation import MOST_ROWS, EvaluationLoader
from tests.support.ended import ending_model
from tests.support.training import fresh, our_trainer, ragged_rows


def rows_of(lengths: list[tuple[int, int]]) -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [{"input_ids": [7] * source, "labels": [8] * target} for source, target in lengths]
    )


def loader(rows: datasets.Dataset, *, rank: int = 0, world_size: int = 1, **options: Any) -> Any:
    options = {"rows_per_batch": 2, **options}
    return EvaluationLoader(
        rows, list, source=rows, rank=rank, world_size=world_size, num_workers=0, **options
    )


LENGTHS = [(3 + n % 5, 2 + n % 3) for n in range(40)] + [(30, 10), (28, 12), (16, 9)]


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("budget", [None, 42, 70])
def test_batches_keep_to_the_budget_and_ranks_have_as_many_rows(
    budget: int | None, world_size: int
) -> None:
    rows = rows_of(LENGTHS)
    ranks = [
        list(loader(rows, rank=rank, world_size=world_size, max_tokens=budget))
        for rank in range(world_size)
    ]
    limit = budget or 2 * (30 + 12)
    for batches in zip(*ranks, strict=True):
        assert len(set(map(len, batches))) == 1
        for batch in batches:
            width = sum(max(len(row[side]) for row in batch) for side in ("input_ids", "labels"))
            assert len(batch) * width <= limit or len(batch) == 1
            assert len(batch) <= MOST_ROWS * 2
    order = loader(rows, world_size=world_size, max_tokens=budget).row_order
    assert sorted(order[order >= 0].tolist()) == list(range(len(LENGTHS)))
    sizes = [len(batch) for batch in ranks[0]]
    assert max(sizes) >= min(MOST_ROWS * 2, limit // 12) > sizes[0]  # short rows, long rows


def test_a_budget_below_the_longest_row_is_refused() -> None:
    with pytest.raises(UserError, match="eval_tokens_per_device=39: expected at least 40"):
        loader(rows_of(LENGTHS), max_tokens=39)


def test_it_has_no_effect_with_few_shapes(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="eval_tokens_per_device=99: has no effect with num_bucket"):
        Seq2SeqTrainingArguments(output_dir=str(tmp_path), eval_tokens_per_device=99, num_buckets=3)


def test_the_budget_changes_neither_texts_nor_losses_nor_their_order(tmp_path: Any) -> None:
    model = ending_model("bart").requires_grad_(True)
    rows = datasets.Dataset.from_list(ragged_rows(model, 23, seed=7))
    outcomes = []
    for options in ({"per_device_eval_batch_size": 1}, {"eval_tokens_per_device": 60}, {}):
        trainer = our_trainer(model, tmp_path, None, predict_with_generate=True, **options)
        found = trainer.predict(rows, max_length=20, num_beams=3)
        for row, labels in zip(found.label_ids, rows["labels"], strict=True):
            assert row[: len(labels)].tolist() == labels
        outcomes.append((found.predictions.tolist(), found.metrics["test_loss"]))
    assert len({tuple(map(tuple, texts)) for texts, _ in outcomes}) == 1
    assert np.ptp([loss for _, loss in outcomes]) < 1e-6


def test_generation_runs_through_the_shrinking_batch(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from s2s_scale.trainer import evaluation

    calls = []

    def counted(model: Any, **options: Any) -> torch.Tensor:
        calls.append(len(options["input_ids"]))
        return torch.full((len(options["input_ids"]), 3), 2)

    monkeypatch.setattr(evaluation, "generate", counted)
    model = fresh("t5")
    rows = datasets.Dataset.from_list(ragged_rows(model, 9))
    trainer = our_trainer(
        model, tmp_path, None, predict_with_generate=True, per_device_eval_batch_size=4
    )
    trainer.predict(rows, max_length=6)
    assert sum(calls) == 9
