"""Private parts of sacrebleu that the metrics rely on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from s2s_scale.compat import relies_on

CHECKED = ("2.4", "2.6")
METRIC = "sacrebleu.metrics.base.Metric"


@relies_on(
    "sacrebleu",
    checked=CHECKED,
    reason="its corpus_score takes all texts at once, and ours arrive batch by batch",
    uses={f"{METRIC}._extract_corpus_statistics": ("hypotheses", "references")},
)
def row_statistics(
    metric: Any, hypotheses: Sequence[str], references: Sequence[str]
) -> list[list[int]]:
    """Sufficient statistics of each row; their sum gives the corpus score by ``score_of``."""
    rows: list[list[int]] = metric._extract_corpus_statistics(hypotheses, [list(references)])
    return rows


@relies_on(
    "sacrebleu",
    checked=CHECKED,
    reason="its corpus_score takes all texts at once, and ours arrive batch by batch",
    uses={f"{METRIC}._compute_score_from_stats": ("stats",)},
)
def score_of(metric: Any, statistics: Sequence[int]) -> float:
    """The corpus score from the sum of ``row_statistics``."""
    return float(metric._compute_score_from_stats(list(statistics)).score)


@relies_on(
    "sacrebleu",
    checked=CHECKED,
    reason="its tokenizers cache the last 65,536 lines each, and wrap each other in a private "
    "attribute",
    uses={"sacrebleu.tokenizers.tokenizer_13a.Tokenizer13a": None},
)
def clear_caches(metric: Any) -> None:
    """Empty the caches of the metric's tokenizers."""
    tokenizer = getattr(metric, "tokenizer", None)  # chrF has none
    while tokenizer is not None:
        clear = getattr(type(tokenizer).__call__, "cache_clear", None)
        if clear is not None:
            clear()
        tokenizer = getattr(tokenizer, "_post_tokenizer", None)
