"""The collator against transformers' own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import DataCollatorForSeq2Seq

from s2s_scale.data.collators import Seq2SeqCollator
from tests.support.pairs import word_tokenizer


def make_rows(count: int = 13, *, seed: int = 0) -> list[dict[str, Any]]:
    random = np.random.RandomState(seed)

    def ids() -> list[int]:
        return random.randint(3, 10, size=random.randint(1, 20)).tolist()

    return [{"input_ids": ids(), "labels": ids()} for _ in range(count)]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("multiple", [None, 8])
def test_equals_transformers_collator(side: str, multiple: int | None) -> None:
    tokenizer = word_tokenizer()
    tokenizer.padding_side = side
    rows = make_rows()
    reference = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=multiple)(
        [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    )
    batch = Seq2SeqCollator(0, pad_to_multiple_of=multiple, padding_side=side)(rows)
    assert sorted(batch) == sorted(reference) == ["attention_mask", "input_ids", "labels"]
    for name, tensor in reference.items():
        assert batch[name].dtype == torch.int64
        assert torch.equal(batch[name], tensor), name


@pytest.mark.parametrize("make", [np.array, torch.tensor, tuple])
def test_arrays_and_tensors_are_as_good_as_lists(make: Any) -> None:
    rows = make_rows()
    expected = Seq2SeqCollator(0)(rows)
    found = Seq2SeqCollator(0)([{k: make(v) for k, v in row.items()} for row in rows])
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    mixed = [rows[0]] + [{k: make(v) for k, v in row.items()} for row in rows[1:]]
    found = Seq2SeqCollator(0)(mixed)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_columns_there_and_not_there() -> None:
    rows = [
        {"source": "text", "source_length": 1, "input_ids": [0], "attention_mask": [0]},
        {"source": "text", "source_length": 2, "input_ids": [5, 6], "attention_mask": [1, 0]},
    ]
    batch = Seq2SeqCollator(0)(rows)
    assert sorted(batch) == ["attention_mask", "input_ids"]
    assert batch["attention_mask"].tolist() == [[0, 0], [1, 0]]
    # A source that holds the pad token as a real token keeps it: lengths decide, not ids.
    assert Seq2SeqCollator(0)([{"input_ids": [0, 4]}, {"input_ids": [4]}])[
        "attention_mask"
    ].tolist() == [[1, 1], [1, 0]]
    rows = [
        {"input_ids": [5], "labels": [3, 4], "decoder_input_ids": [2, 3]},
        {"input_ids": [6], "labels": [3], "decoder_input_ids": [2]},
    ]
    batch = Seq2SeqCollator(9, label_pad_id=-7)(rows)
    assert batch["decoder_input_ids"].tolist() == [[2, 3], [2, 9]]
    assert batch["labels"].tolist() == [[3, 4], [3, -7]]


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="no rows"):
        Seq2SeqCollator(0)([])
    with pytest.raises(ValueError, match="'labels' is missing in 1 of 2 rows"):
        Seq2SeqCollator(0)([{"input_ids": [1], "labels": [1]}, {"input_ids": [1]}])
    with pytest.raises(ValueError, match="padding_side"):
        Seq2SeqCollator(0, padding_side="top")
    with pytest.raises(ValueError, match="pad_to_multiple_of"):
        Seq2SeqCollator(0, pad_to_multiple_of=0)


def test_rows_without_any_token_have_one_column() -> None:
    batch = Seq2SeqCollator(0)([{"input_ids": [], "labels": []}])
    assert batch["input_ids"].tolist() == [[0]]
    assert batch["labels"].tolist() == [[-100]]
    assert batch["attention_mask"].tolist() == [[0]]
