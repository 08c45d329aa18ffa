"""Evaluation of generated text: decode, score and write it as it is produced.

Shapes: B rows of a batch, n sequences returned per row, T positions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from s2s_scale.evaluation.metrics import TextMetrics, check_metric_names
from s2s_scale.utils import atomic_file

if TYPE_CHECKING:
    import numpy.typing as npt
    from transformers import PreTrainedTokenizerBase

TextsOf = Callable[[Sequence[int]], list[str]]
"""Row ids -> their texts."""


class Sample(NamedTuple):
    """One row for the report; ``source`` is empty if the sources are not known."""

    source: str
    reference: str
    hypothesis: str


def as_ids(ids: Any, pad_token_id: int) -> npt.NDArray[np.int64]:
    """Token ids as an int64 array [B, T] on the host, with -100 replaced by the pad id."""
    if hasattr(ids, "detach"):
        ids = ids.detach().cpu().numpy()
    array = np.asarray(ids, dtype=np.int64)
    return np.where(array < 0, pad_token_id, array)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Any) -> list[str]:
    """Texts of token ids [B, T] (tensor, array or lists) without special tokens and -100."""
    array = as_ids(ids, int(tokenizer.pad_token_id))
    return tokenizer.batch_decode(array.tolist(), skip_special_tokens=True)


def one_line(text: str) -> str:
    """``text`` with spaces in place of line ends, so that row i of a file is line i."""
    return " ".join(text.split("\n")).replace("\r", " ") if "\n" in text or "\r" in text else text


class TextEvaluation:
    """Scores generated text batch by batch, in memory that does not grow with the texts.

    Rows may arrive in any order and more than once; the first arrival counts. Only a few bytes are
    kept per row: texts go to an unnamed temporary file, from which ``finish`` writes them in order.

    Args:
        tokenizer: decodes generated ids and labels.
        metrics: names of ``TextMetrics``.
        references: reference texts of row ids; by default the labels are decoded.
        sources: source texts of row ids, for ``samples``.
        output_file: where ``finish`` writes the generated texts.
        num_samples: number of rows kept for ``samples``.

    Raises:
        UserError: an unknown metric.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        metrics: Sequence[str],
        references: TextsOf | None = None,
        sources: TextsOf | None = None,
        output_file: Path | None = None,
        num_samples: int = 8,
    ) -> None:
        check_metric_names(metrics)
        self.tokenizer = tokenizer
        self.metric_names = list(metrics)
        self.references = references
        self.sources = sources
        self.output_file = Path(output_file) if output_file is not None else None
        self.num_samples = num_samples
        special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        self._special_ids = np.array(sorted(special), dtype=np.int64)
        self._spool: IO[bytes] | None = None
        self.start(0)

    def start(self, n_rows: int) -> None:
        """Begin an evaluation of rows 0 to ``n_rows - 1``, discarding an earlier one."""
        self._close()
        self._metrics = TextMetrics(self.metric_names) if n_rows else None
        self._seen = np.zeros(n_rows, dtype=bool)
        self._spans = np.zeros((n_rows, 2), dtype=np.int64)  # offset and length in the spool
        self._tokens = 0
        self._kept: dict[int, Sample] = {}
        count = min(self.num_samples, n_rows)
        self._sample_rows = set(np.linspace(0, n_rows - 1, count).astype(int).tolist())
        if self.output_file is not None and n_rows:
            self._spool = tempfile.TemporaryFile()  # noqa: SIM115  (closed by finish)

    def add(self, row_ids: Sequence[int], generated: Any, labels: Any = None) -> None:
        """Add generated rows.

        Args:
            row_ids: B row ids.
            generated: token ids [B * n, T]; the first of the n sequences of each row is scored.
            labels: token ids [B, T]; only needed without references.

        Raises:
            ValueError: the shapes do not match ``row_ids``, a row id is out of range, or there are
                neither references nor labels.
        """
        rows = [int(row) for row in row_ids]
        if not rows:
            return
        pad = int(self.tokenizer.pad_token_id)
        ids = as_ids(generated, pad)
        if len(ids) == 0 or len(ids) % len(rows):
            raise ValueError(
                f"{len(ids)} generated rows for {len(rows)} row ids: expected a multiple of the ids"
            )
        ids = ids[:: len(ids) // len(rows)]
        fresh = []  # indices of the rows that arrive for the first time
        for i, row in enumerate(rows):
            if not 0 <= row < len(self._seen):
                raise ValueError(f"row {row} is outside of the {len(self._seen)} rows evaluated")
            if not self._seen[row]:
                self._seen[row] = True
                fresh.append(i)
        if not fresh:
            return
        kept_rows = [rows[i] for i in fresh]
        if self.references is not None:
            references = self.references(kept_rows)
        elif labels is not None:
            references = decode(self.tokenizer, as_ids(labels, pad)[fresh])
        else:
            raise ValueError("neither references nor labels to compare the generated text with")
        hypotheses = decode(self.tokenizer, ids[fresh])
        assert self._metrics is not None
        self._metrics.add(hypotheses, references)
        self._tokens += int((~np.isin(ids[fresh], self._special_ids)).sum())
        self._keep(kept_rows, hypotheses, references)

    def finish(self) -> dict[str, float]:
        """The metrics, and ``gen_len``: the mean number of generated tokens without special ones.

        Writes ``output_file`` atomically, one row per line in the order of the data.

        Raises:
            ValueError: a row never arrived.
        """
        missing = np.flatnonzero(~self._seen)
        if len(missing):
            raise ValueError(f"{len(missing)} rows were never added, the first: {missing[0]}")
        if self._metrics is None:
            return {}
        try:
            if self.output_file is not None:
                assert self._spool is not None
                with atomic_file(self.output_file, binary=True) as out:
                    for offset, length in self._spans:
                        self._spool.seek(offset)
                        out.write(self._spool.read(length) + b"\n")
        finally:
            self._close()
        return {**self._metrics.result(), "gen_len": self._tokens / len(self._seen)}

    @property
    def signatures(self) -> dict[str, str]:
        """How each metric was computed, by name; empty before the first ``start``."""
        return self._metrics.signatures() if self._metrics is not None else {}

    @property
    def samples(self) -> list[Sample]:
        """Rows spread evenly over the data, in its order."""
        return [self._kept[row] for row in sorted(self._kept)]

    def _keep(self, rows: list[int], hypotheses: list[str], references: list[str]) -> None:
        """Spool the texts of these rows, and keep those that are samples."""
        if self._spool is not None:
            at = self._spool.tell()
            for row, text in zip(rows, hypotheses, strict=True):
                data = one_line(text).encode("utf-8")
                self._spool.write(data)
                self._spans[row] = at, len(data)
                at += len(data)
        for i, row in enumerate(rows):
            if row in self._sample_rows:
                source = self.sources([row])[0] if self.sources is not None else ""
                self._kept[row] = Sample(source, references[i], hypotheses[i])

    def _close(self) -> None:
        if self._spool is not None:
            self._spool.close()
            self._spool = None


def in_data_order(rows: Any, order: np.ndarray) -> Any:
    """``rows``, whose i-th entry belongs to data row ``order[i]``, sorted by data row.

    Args:
        rows: array [N, ...], or [N * R, ...] with R entries per data row (several returned
            sequences); tuples and lists of such arrays; or None.
        order: int array [N]: a permutation of the data rows, with any number of negative ids in
            between; these mark filler rows, whose entries are dropped.

    Raises:
        ValueError: the number of entries is not a multiple of N.
    """
    if rows is None:
        return None
    if isinstance(rows, (tuple, list)):
        return type(rows)(in_data_order(part, order) for part in rows)
    per_row, rest = divmod(len(rows), len(order))
    if rest:
        raise ValueError(
            f"{len(rows)} predictions for {len(order)} data rows: expected a multiple of the rows"
        )
    real = np.flatnonzero(order >= 0)
    positions = real[np.argsort(order[real], kind="stable")]
    entries = (positions[:, None] * per_row + np.arange(per_row)).reshape(-1)
    return rows[entries]
