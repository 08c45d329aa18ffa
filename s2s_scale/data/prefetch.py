"""Input that is ready before it is needed: a thread that prefetches, and rows read without copies.

``datasets`` turns rows into Python lists of numbers, which takes longer than all other work on a
batch. In ``ArrowRows`` a row is a view of the memory-mapped file, and nothing is copied until the
batch is made.
"""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from torch.utils.data import Dataset

from s2s_scale.data.compat import has_indices

T = TypeVar("T")
BATCHES_AHEAD = 4
STOP_SECONDS = 10.0
TOKENS = ("input_ids", "labels")

_unfinished: dict[threading.Thread, threading.Event] = {}


@atexit.register
def _stop_all() -> None:
    """Stop threads that are still running, as after an error that ends the program.

    Python would stop them anywhere, and within torch that aborts the process.
    """
    threads = list(_unfinished.items())
    for _, stopped in threads:
        stopped.set()
    for thread, _ in threads:
        thread.join(STOP_SECONDS)


def prefetch(items: Iterator[T], *, count: int = BATCHES_AHEAD) -> Iterator[T]:
    """The same items, produced by a thread that is up to ``count`` items ahead.

    An exception in the thread is raised where the items are read.
    """
    made: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=count)
    stopped = threading.Event()

    def put(entry: tuple[bool, Any]) -> bool:
        while not stopped.is_set():
            try:
                made.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((True, item)):
                    return
            put((False, None))
        except BaseException as error:  # noqa: BLE001  (raised again where the items are read)
            put((False, error))
        finally:
            _unfinished.pop(threading.current_thread(), None)

    thread = threading.Thread(target=work, daemon=True, name="batches")
    _unfinished[thread] = stopped
    thread.start()
    try:
        while True:
            there, item = made.get()
            if not there:
                if item is not None:
                    raise item
                return
            yield item
    finally:
        stopped.set()


class ArrowRows(Dataset[Mapping[str, Any]]):
    """The token columns of a data set: a row maps their names to read-only int32 arrays.

    ``dataset``: a ``datasets.Dataset`` for which ``reads_from_arrow`` is true.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.column_names = list(dataset.column_names)
        self._columns: dict[str, _Column] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[Mapping[str, Any]]:
        if self._columns is None:  # made on first use, since a worker process maps the file itself
            table = self.dataset.data
            self._columns = {name: _Column(table.column(name)) for name in self.column_names}
        sides = {name: column.rows(rows) for name, column in self._columns.items()}
        together = zip(*sides.values(), strict=True)
        return [dict(zip(sides, values, strict=True)) for values in together]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_columns": None}


class _Column:
    """A column of lists, as the flat values of each chunk and the offsets of each row in them."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._values, starts, ends, chunks = [], [], [], []
        for number, chunk in enumerate(column.chunks):
            offsets = chunk.offsets.to_numpy()
            self._values.append(chunk.values.to_numpy(zero_copy_only=True))
            starts.append(offsets[:-1])
            ends.append(offsets[1:])
            chunks.append(np.full(len(chunk), number, dtype=np.int32))
        none = [np.empty(0, dtype=np.int64)]
        self._starts, self._ends, self._chunks = (
            np.concatenate(parts or none) for parts in (starts, ends, chunks)
        )

    def rows(self, rows: Sequence[int]) -> list[npt.NDArray[np.int32]]:
        places = np.asarray(rows)
        spans = zip(
            self._chunks[places].tolist(),
            self._starts[places].tolist(),
            self._ends[places].tolist(),
            strict=True,
        )
        return [self._values[chunk][start:end] for chunk, start, end in spans]


def reads_from_arrow(dataset: Any) -> bool:
    """Whether ``ArrowRows`` can read it: a whole table of token ids alone, without a format."""
    import datasets

    if not isinstance(dataset, datasets.Dataset) or has_indices(dataset):
        return False
    if dataset.format["type"] is not None or set(dataset.column_names) - set(TOKENS):
        return False
    types = [field.type for field in dataset.data.schema]
    lists = all(pa.types.is_list(t) and pa.types.is_integer(t.value_type) for t in types)
    return bool(types) and lists and all(c.null_count == 0 for c in dataset.data.columns)
