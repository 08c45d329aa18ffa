"""Text metrics from sufficient statistics, in memory that is constant in the number of rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from s2s_scale.config import METRICS
from s2s_scale.errors import unknown_name
from s2s_scale.evaluation.compat import clear_caches, row_statistics, score_of
from s2s_scale.utils import package_version

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+")


class TextMetrics:
    """Corpus scores of the named metrics over all rows added so far.

    Args:
        names: any of ``bleu`` and ``chrf`` (sacrebleu, 0 to 100); ``rouge1``, ``rouge2``,
            ``rougeL`` and ``rougeLsum``, or ``rouge`` for all of them (F1 x 100, Lsum over
            sentences split at ``. ! ?`` and line ends); and ``exact_match`` (percent, ignoring
            leading and trailing whitespace).

    Raises:
        UserError: a name is none of these.
    """

    def __init__(self, names: Sequence[str] = METRICS) -> None:
        check_metric_names(names)
        self.rows = 0
        self._corpus: dict[str, Any] = {}  # sacrebleu's metrics
        if "bleu" in names:
            from sacrebleu.metrics.bleu import BLEU

            self._corpus["bleu"] = BLEU()
        if "chrf" in names:
            from sacrebleu.metrics.chrf import CHRF

            self._corpus["chrf"] = CHRF()
        # The sum over rows of what a corpus score is computed from
        self._statistics: dict[str, list[int]] = {}
        self._rouge_types = [r for r in ROUGE_TYPES if "rouge" in names or r in names]
        if self._rouge_types:
            from rouge_score.rouge_scorer import RougeScorer

            self._rouge = RougeScorer(self._rouge_types, use_stemmer=True)
        # The sum over rows of the metrics that are means over rows
        self._sums = dict.fromkeys(self._rouge_types, 0.0)
        if "exact_match" in names:
            self._sums["exact_match"] = 0.0

    def add(self, hypotheses: Sequence[str], references: Sequence[str]) -> None:
        """Add rows; hypothesis i belongs to reference i."""
        if len(hypotheses) != len(references):
            raise ValueError(
                f"{len(hypotheses)} hypotheses for {len(references)} references: expected one each"
            )
        if not hypotheses:
            return
        self.rows += len(hypotheses)
        for name, metric in self._corpus.items():
            for row in row_statistics(metric, hypotheses, references):
                sums = self._statistics.get(name)
                if sums is not None:
                    row = [a + b for a, b in zip(sums, row, strict=True)]
                self._statistics[name] = row
            clear_caches(metric)
        for hypothesis, reference in zip(hypotheses, references, strict=True):
            if self._rouge_types:
                pair = split_sentences(reference), split_sentences(hypothesis)
                for name, score in self._rouge.score(*pair).items():
                    self._sums[name] += score.fmeasure
            if "exact_match" in self._sums:
                self._sums["exact_match"] += hypothesis.strip() == reference.strip()

    def result(self) -> dict[str, float]:
        """The scores by name; all 0 if no row was added."""
        scores = {
            name: score_of(metric, self._statistics[name]) if self.rows else 0.0
            for name, metric in self._corpus.items()
        }
        for name, total in self._sums.items():
            scores[name] = 100.0 * total / max(self.rows, 1)
        return scores

    def signatures(self) -> dict[str, str]:
        """How each score was computed, by name: signatures, and versions of libraries."""
        known = {name: str(metric.get_signature()) for name, metric in self._corpus.items()}
        if self._rouge_types:
            version = package_version("rouge_score")
            rouge = f"rouge_score {version}, F1, Porter stemmer, mean over rows"
            known.update(dict.fromkeys(self._rouge_types, rouge))
        return known


def check_metric_names(names: Iterable[str]) -> None:
    """Raise ``UserError`` for a name that is not a metric. Imports no metric library."""
    known = {*METRICS, *ROUGE_TYPES}
    for name in names:
        if name not in known:
            raise unknown_name("metric", name, known)


def split_sentences(text: str) -> str:
    """``text`` with one sentence per line, which is what ROUGE-Lsum expects."""
    lines = (line.strip() for line in _SENTENCE_END.sub("\n", text).splitlines())
    return "\n".join(line for line in lines if line)
