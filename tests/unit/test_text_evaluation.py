"""Evaluation of generated rows: decoding, order, files and memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from s2s_scale.errors import UserError
from s2s_scale.evaluation.metrics import TextMetrics
from s2s_scale.evaluation.text import Sample, TextEvaluation, decode, one_line
from tests.support.families import FAMILY_NAMES, TINY_TEXTS, tiny_tokenizer

HYPOTHESES = ["the cat sees the house", *TINY_TEXTS[1:]]
METRICS = ["bleu", "chrf", "rouge", "exact_match"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return tiny_tokenizer("marian", tmp_path_factory.mktemp("text") / "marian")


def ids_of(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, start: int | None, pad: int
) -> torch.Tensor:
    """Token ids as ``generate`` returns them (``start`` first), padded with ``pad``."""
    rows = [tokenizer(text_target=text)["input_ids"] for text in texts]
    rows = [([] if start is None else [start]) + row for row in rows]
    width = max(map(len, rows))
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows])


def feed(evaluation: TextEvaluation, order: Sequence[int], *, batch: int = 3) -> None:
    """Add the rows of HYPOTHESES against TINY_TEXTS in ``order``."""
    tokenizer = evaluation.tokenizer
    pad = int(tokenizer.pad_token_id)
    for at in range(0, len(order), batch):
        rows = order[at : at + batch]
        generated = ids_of(tokenizer, [HYPOTHESES[i] for i in rows], start=pad, pad=pad)
        labels = ids_of(tokenizer, [TINY_TEXTS[i] for i in rows], start=None, pad=-100)
        evaluation.add(rows, generated, labels)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_labels_and_generated_ids_decode_in_every_family(name: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(name, tmp_path / name)
    labels = ids_of(tokenizer, TINY_TEXTS, start=None, pad=-100)
    assert decode(tokenizer, labels) == TINY_TEXTS
    assert decode(tokenizer, labels.numpy()) == TINY_TEXTS
    assert (labels == -100).any(), "the labels were changed, or none was padded"


@pytest.mark.parametrize("order", [range(7), [6, 0, 3, 5, 1, 4, 2]])
def test_scores_and_file_do_not_depend_on_the_order_of_arrival(
    order: Sequence[int], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    file = tmp_path / "out" / "test_generations.txt"
    evaluation = TextEvaluation(tokenizer, metrics=METRICS, output_file=file)
    evaluation.start(7)
    feed(evaluation, list(order))
    result = evaluation.finish()
    whole = TextMetrics(METRICS)
    whole.add(HYPOTHESES, TINY_TEXTS)
    lengths = [len(tokenizer(text_target=text)["input_ids"]) - 1 for text in HYPOTHESES]
    expected = {**whole.result(), "gen_len": sum(lengths) / 7}
    assert result == pytest.approx(expected, rel=1e-12)
    assert result["exact_match"] == pytest.approx(600 / 7)
    assert file.read_text(encoding="utf-8").split("\n") == [*HYPOTHESES, ""]
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert "version" in evaluation.signatures["bleu"]


def test_samples_are_spread_over_the_data_and_in_order(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    evaluation = TextEvaluation(
        tokenizer,
        metrics=["bleu"],
        sources=lambda rows: [f"source {row}" for row in rows],
        num_samples=3,
    )
    evaluation.start(7)
    feed(evaluation, [6, 5, 4, 3, 2, 1, 0])
    evaluation.finish()
    assert evaluation.samples == [
        Sample(f"source {row}", TINY_TEXTS[row], HYPOTHESES[row]) for row in (0, 3, 6)
    ]


def test_references_are_asked_for_by_row(tokenizer: PreTrainedTokenizerBase) -> None:
    asked: list[list[int]] = []

    def references(rows: Sequence[int]) -> list[str]:
        asked.append(list(rows))
        return [HYPOTHESES[row] for row in rows]

    evaluation = TextEvaluation(tokenizer, metrics=["exact_match"], references=references)
    evaluation.start(7)
    feed(evaluation, [4, 2, 0, 1, 3, 5, 6])
    assert evaluation.finish()["exact_match"] == 100.0
    assert asked == [[4, 2, 0], [1, 3, 5], [6]]


def test_the_first_of_several_sequences_is_scored(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["the cat", "a dog", "the dog", "we go home"]
    pad = int(tokenizer.pad_token_id)
    evaluation = TextEvaluation(
        tokenizer, metrics=["exact_match"], references=lambda rows: ["the cat", "the dog"]
    )
    evaluation.start(2)
    evaluation.add([0, 1], ids_of(tokenizer, texts, start=pad, pad=pad))
    assert evaluation.finish()["exact_match"] == 100.0


def test_a_row_that_arrives_twice_counts_once(tokenizer: PreTrainedTokenizerBase) -> None:
    evaluation = TextEvaluation(tokenizer, metrics=["exact_match"])
    evaluation.start(7)
    feed(evaluation, [0, 1, 2, 3, 4, 5, 6])
    once = dict(evaluation.finish())
    evaluation.start(7)
    feed(evaluation, [0, 1, 2, 3, 4, 5, 6, 6, 5, 0, 0])
    assert evaluation.finish() == once
    assert once["exact_match"] < 100


def test_line_ends_in_text_become_spaces(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert one_line("a\nb\r\nc") == "a b  c"
    assert one_line("a b\u2028c") == "a b\u2028c"
    monkeypatch.setattr("s2s_scale.evaluation.text.decode", lambda *_: ["two\nlines", "one"])
    file = tmp_path / "g.txt"
    evaluation = TextEvaluation(
        tokenizer, metrics=["bleu"], references=lambda rows: ["x"] * 2, output_file=file
    )
    evaluation.start(2)
    evaluation.add([0, 1], torch.zeros(2, 3, dtype=torch.long))
    evaluation.finish()
    assert file.read_text() == "two lines\none\n"


def test_a_missing_row_is_an_error_and_writes_nothing(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    file = tmp_path / "g.txt"
    file.write_text("before")
    evaluation = TextEvaluation(tokenizer, metrics=["bleu"], output_file=file)
    evaluation.start(7)
    feed(evaluation, [0, 1, 2, 4, 5, 6])
    with pytest.raises(ValueError, match="1 rows were never added, the first: 3"):
        evaluation.finish()
    assert file.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["g.txt"]


def test_input_that_does_not_fit_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    evaluation = TextEvaluation(tokenizer, metrics=["bleu"])
    evaluation.start(2)
    ids = torch.zeros(3, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="3 generated rows for 2 row ids"):
        evaluation.add([0, 1], ids, ids)
    with pytest.raises(ValueError, match="outside of the 2 rows"):
        evaluation.add([2], ids[:1], ids[:1])
    with pytest.raises(ValueError, match="neither references nor labels"):
        evaluation.add([0], ids[:1])
    with pytest.raises(UserError, match="unknown metric 'blue'"):
        TextEvaluation(tokenizer, metrics=["blue"])


def test_memory_stays_flat_with_the_number_of_rows(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    ids = ids_of(tokenizer, TINY_TEXTS[:5] * 10, start=None, pad=int(tokenizer.pad_token_id))
    reference = TINY_TEXTS[0] * 20

    def peak(rows: int) -> int:
        evaluation = TextEvaluation(
            tokenizer,
            metrics=["bleu", "exact_match"],
            references=lambda some: [reference] * len(some),
            output_file=tmp_path / "g.txt",
        )
        evaluation.start(rows)
        tracemalloc.start()
        for at in range(0, rows, 50):
            evaluation.add(np.arange(at, at + 50).tolist(), ids)
        evaluation.finish()
        high = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return high

    peak(100)  # imports and caches
    few, many = peak(100), peak(1000)
    # 900 more rows hold 400 KB of references and 30 KB of generated text
    assert many < few + 100_000
    assert (tmp_path / "g.txt").read_text().count("\n") == 1000
