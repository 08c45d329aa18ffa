"""Metrics in pieces against sacrebleu and rouge_score on the whole."""

from __future__ import annotations

import random

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from s2s_scale.config import METRICS
from s2s_scale.errors import UserError
from s2s_scale.evaluation.metrics import TextMetrics, split_sentences

WORDS = "the cat sees a red dog. we go home! naïve Grüße, știți 12 1,568.90 houses?".split()


def corpus(rows: int, seed: int = 3) -> tuple[list[str], list[str]]:
    """Hypotheses that share most words with their references; a few equal, a few empty."""
    chance = random.Random(seed)
    references = [" ".join(chance.choices(WORDS, k=chance.randint(3, 12))) for _ in range(rows)]
    hypotheses = []
    for i, reference in enumerate(references):
        words = [w if chance.random() < 0.8 else chance.choice(WORDS) for w in reference.split()]
        hypotheses.append("" if i % 17 == 5 else reference if i % 5 == 0 else " ".join(words))
    return hypotheses, references


def in_pieces(names: list[str], hypotheses: list[str], references: list[str]) -> TextMetrics:
    metrics = TextMetrics(names)
    sizes, start = (1, 7, 0, 20, 1000), 0
    for size in sizes:
        metrics.add(hypotheses[start : start + size], references[start : start + size])
        start += size
    assert metrics.rows == len(hypotheses) < start
    return metrics


def test_bleu_and_chrf_equal_sacrebleu() -> None:
    hypotheses, references = corpus(120)
    found = in_pieces(["bleu", "chrf"], hypotheses, references).result()
    bleu = sacrebleu.corpus_bleu(hypotheses, [references]).score
    assert 20 < bleu < 95
    assert found == {"bleu": bleu, "chrf": sacrebleu.corpus_chrf(hypotheses, [references]).score}


def test_bleu_without_any_4_gram_is_smoothed_as_sacrebleu_does() -> None:
    hypotheses, references = ["a b c"], ["a b d"]
    found = in_pieces(["bleu"], hypotheses, references).result()["bleu"]
    assert found == sacrebleu.corpus_bleu(hypotheses, [references]).score


def test_rouge_equals_a_plain_loop() -> None:
    hypotheses, references = corpus(60)
    names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = RougeScorer(names, use_stemmer=True)
    sums = dict.fromkeys(names, 0.0)
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        pair = (split_sentences(reference), split_sentences(hypothesis))
        for name, score in scorer.score(*pair).items():
            sums[name] += score.fmeasure
    expected = {name: 100 * total / len(references) for name, total in sums.items()}
    found = in_pieces(["rouge"], hypotheses, references).result()
    assert found == pytest.approx(expected, rel=1e-12)
    assert found["rougeLsum"] != found["rougeL"], "sentence splitting had no effect"
    assert in_pieces(["rougeL"], hypotheses, references).result() == {"rougeL": found["rougeL"]}


def test_exact_match_is_a_percentage_that_ignores_outer_spaces() -> None:
    found = TextMetrics(["exact_match"])
    found.add(["a", " b ", "c", "D"], ["a", "b", "x", "d"])
    assert found.result() == {"exact_match": 50.0}


def test_perfect_rows_score_100() -> None:
    metrics = TextMetrics()
    metrics.add(["the cat sees a red dog"] * 2, ["the cat sees a red dog"] * 2)
    result = metrics.result()
    assert len(result) == 7
    assert result == pytest.approx(dict.fromkeys(result, 100.0))


def test_no_rows_score_0() -> None:
    assert set(TextMetrics().result().values()) == {0.0}


def test_signatures_name_sacrebleu() -> None:
    metrics = TextMetrics(METRICS)
    metrics.add(["a"], ["a"])
    signatures = metrics.signatures()
    assert f"version:{sacrebleu.__version__}" in signatures["bleu"]
    assert "nrefs:1" in signatures["bleu"]
    assert "nc:6" in signatures["chrf"]
    assert "rouge_score" in signatures["rougeLsum"]


def test_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown metric 'blue' \(did you mean 'bleu'\?\)"):
        TextMetrics(["blue"])


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="2 hypotheses for 1 references"):
        TextMetrics(["bleu"]).add(["a", "b"], ["a"])


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("He said “no.” She left.", ["He said “no.", "She left."]),
        ("1.5 km", ["1.5 km"]),
        ("a\n\n b ", ["a", "b"]),
        ("", []),
    ],
)
def test_split_sentences(text: str, lines: list[str]) -> None:
    assert split_sentences(text) == "\n".join(lines)


def test_no_line_is_kept_by_sacrebleu_s_tokenizers() -> None:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp

    caches = [kind.__call__ for kind in (Tokenizer13a, TokenizerRegexp)]
    sacrebleu.corpus_bleu(["one line of words"], [["another line of words"]])
    assert all(cache.cache_info().currsize > 0 for cache in caches)  # it does keep them
    hypotheses, references = corpus(30)
    TextMetrics(["bleu"]).add(hypotheses, references)
    assert [cache.cache_info().currsize for cache in caches] == [0, 0]
