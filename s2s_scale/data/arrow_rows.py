"""Token ids straight from the memory-mapped table of a ``datasets.Dataset``.

``datasets`` makes Python lists of numbers, which takes longer than everything else that is done to
a batch. Here a row is a view of the mapped file: nothing is copied until the batch is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from torch.utils.data import Dataset

TOKENS = ("input_ids", "labels")


class ArrowRows(Dataset[Mapping[str, Any]]):
    """The token columns of a data set: a row is a mapping of name to an int32 array, read-only."""

    def __init__(self, dataset: Any) -> None:
        """``dataset``: a ``datasets.Dataset`` that ``arrow_problem`` has nothing against."""
        self.dataset = dataset
        self.column_names = list(dataset.column_names)
        self._columns: dict[str, _Column] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[Mapping[str, Any]]:
        if self._columns is None:  # made where rows are read: a loader's worker maps the file anew
            table = self.dataset.data
            self._columns = {name: _Column(table.column(name)) for name in self.column_names}
        sides = {name: column.rows(rows) for name, column in self._columns.items()}
        together = zip(*sides.values(), strict=True)
        return [dict(zip(sides, values, strict=True)) for values in together]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_columns": None}


class _Column:
    """A column of lists as flat values, chunk by chunk, and where each row's begin and end."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._values, starts, ends, chunks = [], [], [], []
        for number, chunk in enumerate(column.chunks):
            offsets = chunk.offsets.to_numpy()
            self._values.append(chunk.values.to_numpy(zero_copy_only=True))
            starts.append(offsets[:-1])
            ends.append(offsets[1:])
            chunks.append(np.full(len(chunk), number, dtype=np.int32))
        self._starts, self._ends, self._chunks = map(_joined, (starts, ends, chunks))

    def rows(self, rows: Sequence[int]) -> list[npt.NDArray[np.int32]]:
        places = np.asarray(rows)
        spans = zip(
            self._chunks[places].tolist(),
            self._starts[places].tolist(),
            self._ends[places].tolist(),
            strict=True,
        )
        return [self._values[chunk][start:end] for chunk, start, end in spans]


def _joined(parts: list[Any]) -> Any:
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def reads_from_arrow(dataset: Any) -> bool:
    """Whether rows can be read so: a plain table of token ids, without chosen rows or a format."""
    import datasets

    if not isinstance(dataset, datasets.Dataset) or dataset._indices is not None:
        return False
    if dataset.format["type"] is not None or set(dataset.column_names) - set(TOKENS):
        return False
    types = [field.type for field in dataset.data.schema]
    lists = all(pa.types.is_list(t) and pa.types.is_integer(t.value_type) for t in types)
    return bool(types) and lists and all(c.null_count == 0 for c in dataset.data.columns)
