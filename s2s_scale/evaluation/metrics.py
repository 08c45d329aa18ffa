"""Text metrics from sufficient statistics, in memory that is constant in the number of rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from s2s_scale.config import METRICS
from s2s_scale.errors import unknown_name
from s2s_scale.evaluation.compat import clear_caches, row_statistics, score_of
from s2s_scale.utils import package_version

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+")


class _Metric(Protocol):
    def add(self, hypotheses: Sequence[str], references: Sequence[str]) -> None: ...

    def result(self) -> dict[str, float]: ...

    def signature(self) -> dict[str, str]: ...


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
        self._parts: list[_Metric] = []
        rouge = [r for r in ROUGE_TYPES if "rouge" in names or r in names]
        for name in ("bleu", "chrf"):
            if name in names:
                self._parts.append(_Sacrebleu(name))
        if rouge:
            self._parts.append(_Rouge(rouge))
        if "exact_match" in names:
            self._parts.append(_ExactMatch())
        self.rows = 0

    def add(self, hypotheses: Sequence[str], references: Sequence[str]) -> None:
        """Add rows; hypothesis i belongs to reference i."""
        if len(hypotheses) != len(references):
            raise ValueError(
                f"{len(hypotheses)} hypotheses for {len(references)} references: expected one each"
            )
        self.rows += len(hypotheses)
        for part in self._parts:
            part.add(hypotheses, references)

    def result(self) -> dict[str, float]:
        """The scores by name; all 0 if no row was added."""
        scores: dict[str, float] = {}
        for part in self._parts:
            scores.update(part.result())
        return scores

    def signatures(self) -> dict[str, str]:
        """How each score was computed, by name: signatures, and versions of libraries."""
        known: dict[str, str] = {}
        for part in self._parts:
            known.update(part.signature())
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


class _Sacrebleu:
    """BLEU or chrF: the two steps of sacrebleu's ``corpus_score``, with only their sum kept."""

    def __init__(self, name: str) -> None:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF

        self.name = name
        self.metric: Any = BLEU() if name == "bleu" else CHRF()
        self.sums: list[int] | None = None

    def add(self, hypotheses: Sequence[str], references: Sequence[str]) -> None:
        if not hypotheses:
            return
        for row in row_statistics(self.metric, hypotheses, references):
            self.sums = (
                row if self.sums is None else [a + b for a, b in zip(self.sums, row, strict=True)]
            )
        clear_caches(self.metric)

    def result(self) -> dict[str, float]:
        if self.sums is None:
            return {self.name: 0.0}
        return {self.name: score_of(self.metric, self.sums)}

    def signature(self) -> dict[str, str]:
        return {self.name: str(self.metric.get_signature())}


class _Rouge:
    """F1 of ``rouge_score``, averaged over rows."""

    def __init__(self, types: Sequence[str]) -> None:
        from rouge_score.rouge_scorer import RougeScorer

        self.scorer = RougeScorer(list(types), use_stemmer=True)
        self.sums = dict.fromkeys(types, 0.0)
        self.rows = 0

    def add(self, hypotheses: Sequence[str], references: Sequence[str]) -> None:
        self.rows += len(hypotheses)
        for hypothesis, reference in zip(hypotheses, references, strict=True):
            scores = self.scorer.score(split_sentences(reference), split_sentences(hypothesis))
            for name in self.sums:
                self.sums[name] += scores[name].fmeasure

    def result(self) -> dict[str, float]:
        return {name: 100.0 * total / max(self.rows, 1) for name, total in self.sums.items()}

    def signature(self) -> dict[str, str]:
        text = f"rouge_score {package_version('rouge_score')}, F1, Porter stemmer, mean over rows"
        return dict.fromkeys(self.sums, text)


class _ExactMatch:
    def __init__(self) -> None:
        self.equal = 0
        self.rows = 0

    def add(self, hypotheses: Sequence[str], references: Sequence[str]) -> None:
        self.rows += len(hypotheses)
        pairs = zip(hypotheses, references, strict=True)
        self.equal += sum(h.strip() == r.strip() for h, r in pairs)

    def result(self) -> dict[str, float]:
        return {"exact_match": 100.0 * self.equal / max(self.rows, 1)}

    def signature(self) -> dict[str, str]:
        return {}
