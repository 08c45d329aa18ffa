"""Source and target lengths of a data set's rows, read the cheapest way it offers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from s2s_scale.config import (
    DEFAULT_GROUPS_PER_STEP,
    DEFAULT_STEPS_PER_EPOCH,
    DEFAULT_TOKENS_PER_STEP,
    LEAST_GROUPS_PER_STEP,
    LEAST_TOKENS_PER_STEP,
)
from s2s_scale.data.cache import entry_of, read_lengths
from s2s_scale.errors import UserError

ROWS_OF_GROUP = 16
_SOURCES = ("source_length", "length", "input_ids")

Lengths = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]


def row_lengths(dataset: Any, *, length_column: str = "length") -> Lengths:
    """Tokens in source and target of every row: two int32 arrays [rows].

    Taken from the arrays saved beside tokenised data (no row is read), else from the columns
    source_length and target_length, else from ``length_column`` (the source; the target is then
    counted, or 0 without labels), else counted in input_ids and labels. ``dataset`` may be any
    map-style data set of mappings. Raises ``UserError`` where a row has none of these.
    """
    entry = entry_of(dataset)
    if entry is not None:
        return read_lengths(entry)
    if hasattr(dataset, "select_columns") and hasattr(dataset, "with_format"):
        return _of_arrow(dataset, length_column=length_column)
    pairs = [_of_row(dataset[row], length_column=length_column) for row in range(len(dataset))]
    lengths = np.array(pairs, dtype=np.int32).reshape(-1, 2)
    return lengths[:, 0].copy(), lengths[:, 1].copy()


def has_length_columns(dataset: Any) -> bool:
    """Whether lengths can be had from columns, without reading row after row."""
    columns = getattr(dataset, "column_names", None) or ()
    return any(name in columns for name in _SOURCES)


def usual_tokens_per_step(lengths: Lengths) -> int:
    """Real tokens of a step where none are given: few enough for some hundred steps an epoch.

    There is room for four groups with the longest row.
    """
    total = sum(int(side.sum(dtype=np.int64)) for side in lengths)
    least = max(LEAST_TOKENS_PER_STEP, LEAST_GROUPS_PER_STEP * _longest_pair(lengths))
    return max(least, min(DEFAULT_TOKENS_PER_STEP, total // DEFAULT_STEPS_PER_EPOCH))


def usual_groups_per_step(lengths: Lengths, tokens_per_step: int, *, fixed_shapes: bool) -> int:
    """Groups of a step where no number is given: as many as have room for the longest row.

    With ``fixed_shapes``, where short groups are filled up, they also hold some rows of mean
    length.
    """
    groups = tokens_per_step // max(1, _longest_pair(lengths))
    if fixed_shapes:
        mean = sum(float(side.mean()) for side in lengths) if len(lengths[0]) else 1.0
        groups = min(
            groups, max(LEAST_GROUPS_PER_STEP, int(tokens_per_step / (ROWS_OF_GROUP * mean)))
        )
    return max(1, min(DEFAULT_GROUPS_PER_STEP, groups))


def _longest_pair(lengths: Lengths) -> int:
    return int((lengths[0] + lengths[1]).max(initial=0))


def _of_arrow(dataset: Any, *, length_column: str) -> Lengths:
    names = dataset.column_names
    source = next((n for n in ("source_length", length_column, "input_ids") if n in names), None)
    target = next((n for n in ("target_length", "labels") if n in names), None)
    if source is None:
        raise _no_length(names, length_column=length_column)
    first = _column(dataset, source)
    return first, np.zeros_like(first) if target is None else _column(dataset, target)


def _column(dataset: Any, name: str) -> npt.NDArray[np.int32]:
    """A column of numbers, or the lengths of a column of lists, without a Python row."""
    import pyarrow.compute as pc

    parts = [np.empty(0, dtype=np.int32)]
    for table in dataset.select_columns([name]).with_format("arrow").iter(batch_size=100_000):
        column = table.column(0)
        if name in ("input_ids", "labels"):
            column = pc.list_value_length(column)
        parts.append(column.to_numpy().astype(np.int32))
    return np.concatenate(parts)


def _of_row(row: Mapping[str, Any], *, length_column: str) -> tuple[int, int]:
    if "source_length" in row:
        source = int(row["source_length"])
    elif length_column in row:
        source = int(row[length_column])
    elif "input_ids" in row:
        source = len(row["input_ids"])
    else:
        raise _no_length(list(row), length_column=length_column)
    if "target_length" in row:
        return source, int(row["target_length"])
    return source, len(row["labels"]) if row.get("labels") is not None else 0


def _no_length(names: list[str], *, length_column: str) -> UserError:
    return UserError(
        f"batching by length: found rows with {', '.join(names)}; expected input_ids or a column "
        f"'source_length' or '{length_column}'; add one, or use --batching fixed"
    )
