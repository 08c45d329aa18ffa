"""Readers of text pairs: one class per file format, for data that is loaded whole or streamed.

A reader yields the rows of its files in chunks of Arrow strings. With every row come the line that
it begins on, for messages, and the place after it, from which another reader can resume without
reading what comes before. Mistakes are collected a few of each kind and raised together.

In files with one text per line, and in JSON lines, a line ends at ``\\n`` or ``\\r\\n`` only. Other
characters that Unicode calls line separators (U+2028, U+0085, form feed, ...) are text: splitting
there would shift every later row of one file against the other.
"""

from __future__ import annotations

import abc
import csv
import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from s2s_scale.data.columns import SCHEMA, ColumnChoice, check_types, report_blank
from s2s_scale.errors import Problems, UserError, did_you_mean

ROWS_PER_CHUNK = 50_000
BLOCK_BYTES = 4 << 20
HEAD_BYTES = 1 << 16
"""What a stream's digest takes of each file's beginning."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
NEWLINE, RETURN = 10, 13
_ABSENT = object()

Ints = npt.NDArray[np.int64]


class Place(NamedTuple):
    """Where reading can resume: numbers of rows and lines already read, and bytes of each file."""

    rows: int = 0
    lines: int = 0
    offsets: tuple[int, ...] = ()


BEGIN = Place()


class Pair(NamedTuple):
    """A row, and the place after it."""

    source: str
    target: str
    after: Place


class Chunk(NamedTuple):
    """Consecutive rows of a file.

    ``texts``: columns source and target, strings [rows]. ``lines``: int64 [rows], the line that
    each row begins on, counted from 1. ``ends``: int64 [rows, 1 + files], the lines and the bytes
    of each file up to the end of each row.
    """

    texts: pa.RecordBatch
    lines: Ints
    ends: Ints


class PairReader(abc.ABC):
    """Reads the text pairs of a file, or of two parallel files, in their order."""

    def __init__(self, *paths: Path) -> None:
        self.paths = paths

    @abc.abstractmethod
    def chunks(
        self, start: Place = BEGIN, *, problems: Problems, limit: int | None = None
    ) -> Iterator[Chunk]:
        """The rows from ``start`` on, up to row ``limit`` of the file.

        Mistakes are added to ``problems``. Chunks are of no use from then on: whoever reads them
        must raise the problems in the end. Raises ``UserError`` where reading cannot go on.
        """

    def where(self, line: int, side: str) -> str:
        """A line as messages name it: "file:line"."""
        return f"{self.paths[0]}:{line}"

    def pairs(self, start: Place = BEGIN, *, limit: int | None = None) -> Iterator[Pair]:
        """The rows from ``start`` on, up to row ``limit`` of the file, one by one.

        Raises ``UserError`` at the first chunk with a mistake, empty texts included.
        """
        rows, problems = start.rows, Problems()
        for chunk in self.chunks(start, problems=problems, limit=limit):
            problems.raise_any()
            report_blank(
                chunk.texts,
                chunk.lines,
                where=self.where,
                origin=str(self.paths[0]),
                problems=problems,
            )
            problems.raise_any()
            sides = (column.to_pylist() for column in chunk.texts.columns)
            for source, target, (lines, *offsets) in zip(*sides, chunk.ends.tolist(), strict=True):
                rows += 1
                yield Pair(source, target, Place(rows, lines, tuple(offsets)))
        problems.raise_any()

    def digest(self) -> str:
        """Changes with the sizes and first bytes of the files; quick, however large they are."""
        digest = hashlib.blake2b(digest_size=8)
        for path in self.paths:
            with path.open("rb") as file:
                digest.update(f"{path.stat().st_size} ".encode() + file.read(HEAD_BYTES))
        return digest.hexdigest()


class LineReader(PairReader):
    """Two parallel files with one text per line."""

    def where(self, line: int, side: str) -> str:
        return f"{self.paths[0 if side == 'source' else 1]}:{line}"

    def chunks(
        self, start: Place = BEGIN, *, problems: Problems, limit: int | None = None
    ) -> Iterator[Chunk]:
        """See ``PairReader``. Files with different numbers of lines are a problem."""
        blocks = [
            read_lines(path, problems=problems, offset=offset, lines=start.rows)
            for path, offset in zip(self.paths, start.offsets or (0, 0), strict=True)
        ]
        ahead: list[Lines | None] = [next(side, None) for side in blocks]
        rows = start.rows
        while True:
            if limit is not None and rows >= limit:
                return
            source, target = ahead
            if source is None or target is None:
                break
            count = min(len(source.texts), len(target.texts))
            if limit is not None:
                count = min(count, limit - rows)
            texts = [side.texts[:count] for side in (source, target)]
            lines = np.arange(rows + 1, rows + count + 1)
            yield Chunk(
                pa.RecordBatch.from_arrays(texts, schema=SCHEMA),
                lines,
                np.stack([lines, source.ends[:count], target.ends[:count]], axis=1),
            )
            rows += count
            ahead = [
                Lines(side.texts[count:], side.ends[count:])
                if count < len(side.texts)
                else next(block, None)
                for side, block in zip((source, target), blocks, strict=True)
            ]
        totals = [
            rows + sum(len(part.texts) for part in itertools.chain([first] if first else [], rest))
            for first, rest in zip(ahead, blocks, strict=True)
        ]
        if totals[0] != totals[1]:
            problems.add(
                "line counts",
                f"{self.paths[0]} has {totals[0]:,} lines and {self.paths[1]} has {totals[1]:,}; "
                f"expected the same number; add the missing lines or delete the surplus ones",
            )


class Lines(NamedTuple):
    """Lines of a file: ``texts``, strings [lines] without line ends, and ``ends``, int64 [lines],
    the file's bytes up to the end of each line."""

    texts: pa.StringArray
    ends: Ints


def read_lines(
    path: Path, *, problems: Problems, offset: int = 0, lines: int = 0
) -> Iterator[Lines]:
    """The file's lines in blocks, from byte ``offset`` on, which ``lines`` lines precede.

    A leading byte order mark is left out. Lines that are not UTF-8 are added to ``problems``, and
    their blocks then hold invalid strings. Takes about a second per gigabyte.
    """
    with path.open("rb") as file:
        if offset == 0 and file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK:
            offset = len(BYTE_ORDER_MARK)
        file.seek(offset)
        rest: bytes | None = b""
        while rest is not None:
            read = file.read(BLOCK_BYTES)
            block = rest + read
            cut = block.rfind(b"\n") + 1 if read else len(block)
            block, rest = block[:cut], block[cut:] if read else None
            if not block:
                continue
            try:
                block.decode("utf-8")
            except UnicodeDecodeError:
                for number, line in enumerate(block.split(b"\n"), start=lines + 1):
                    _decode(line, path, number, problems)
            texts, ends = _split_lines(block)
            yield Lines(texts, ends + offset)
            offset += len(block)
            lines += len(ends)


def _split_lines(block: bytes) -> tuple[pa.StringArray, Ints]:
    """Strings over one copy of the block without its line ends, and where each line ends in it."""
    data = np.frombuffer(block, dtype=np.uint8)
    newlines = np.flatnonzero(data == NEWLINE)
    returns = (newlines > 0) & (data[newlines - 1] == RETURN)
    text = np.delete(data, np.concatenate([newlines, newlines[returns] - 1]))
    # The end of a line in the remaining text: its place in the block, less the line ends before it.
    stops = newlines - np.arange(len(newlines)) - np.cumsum(returns)
    ends = newlines + 1
    if data[-1] != NEWLINE:
        stops, ends = np.append(stops, len(text)), np.append(ends, len(data))
    offsets = np.concatenate([[0], stops]).astype(np.int32)
    strings = pa.StringArray.from_buffers(len(stops), pa.py_buffer(offsets), pa.py_buffer(text))
    return strings, ends


def _not_utf8(path: Path) -> str:
    """The kind of problem that a wrong encoding is."""
    return f"lines of {path} that are not UTF-8"


def _decode(raw: bytes, path: Path, line: int, problems: Problems) -> str | None:
    """A line as text, without a leading byte order mark; None, and a problem, if not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        encoding = "UTF-16" if b"\x00" in raw else "LATIN1"
        problems.add(
            _not_utf8(path),
            f"{path}:{line}: byte 0x{raw[error.start]:02x} at position {error.start + 1} is not "
            f"UTF-8; expected UTF-8 text; convert the file, for example with "
            f"'iconv -f {encoding} -t UTF-8'",
        )
        return None


class _Row(NamedTuple):
    """A parsed row: the line that it begins on, its cells, and lines and bytes up to its end."""

    line: int
    source: Any
    target: Any
    lines: int
    offset: int


class _RowReader(PairReader):
    """A file that is parsed row by row, and whose columns have names."""

    def __init__(self, path: Path, choice: ColumnChoice) -> None:
        super().__init__(path)
        self._choice = choice
        self._names = ("source", "target")

    @abc.abstractmethod
    def _rows(self, start: Place, problems: Problems) -> Iterator[_Row]:
        """The rows from ``start`` on; cells may be anything. Sets ``_names`` before the first."""

    def chunks(
        self, start: Place = BEGIN, *, problems: Problems, limit: int | None = None
    ) -> Iterator[Chunk]:
        """See ``PairReader``."""
        count, rows = start.rows, []
        for row in self._rows(start, problems):
            if not (isinstance(row.source, str) and isinstance(row.target, str)):
                self._report_cell(row, problems)
                continue
            rows.append(row)
            count += 1
            if count == limit:
                break
            if len(rows) == ROWS_PER_CHUNK:
                yield from self._chunk(rows, problems)
                rows = []
        if rows:
            yield from self._chunk(rows, problems)

    def _chunk(self, rows: list[_Row], problems: Problems) -> Iterator[Chunk]:
        lines, source, target, *ends = zip(*rows, strict=True)
        try:
            sides = [pa.array(side, type=pa.string()) for side in (source, target)]
        except UnicodeEncodeError:  # JSON can spell half a character, which UTF-8 cannot hold
            for row in rows:
                if any("\ud800" <= character <= "\udfff" for character in row.source + row.target):
                    problems.add(
                        f"lines of {self.paths[0]} with half a character",
                        f"{self.where(row.line, '')}: an escape such as \\ud83d stands alone; "
                        f"expected both halves of the character (a surrogate pair); correct or "
                        f"delete the row",
                    )
            return
        texts = pa.RecordBatch.from_arrays(sides, schema=SCHEMA)
        yield Chunk(texts, np.array(lines), np.stack(ends, axis=1))

    def _report_cell(self, row: _Row, problems: Problems) -> None:
        path, place = self.paths[0], self.where(row.line, "")
        values = zip(self._names, (row.source, row.target), strict=True)
        name, value = next(cell for cell in values if not isinstance(cell[1], str))
        if value is _ABSENT:
            problems.add(
                f"rows of {path} without a column",
                f"{place}: column '{name}' is missing in this row; expected text; add it or "
                f"delete the row",
            )
            return
        shown = json.dumps(value, ensure_ascii=False)
        shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
        problems.add(
            f"cells of {path} that are not text",
            f"{place}: column '{name}' holds {shown} ({type(value).__name__}); expected text; put "
            f"it in quotes or delete the row",
        )

    def _decoded(
        self, file: BinaryIO, start: Place, problems: Problems
    ) -> Iterator[tuple[int, int, str]]:
        """From ``start`` on: a line's number, the bytes up to its end, and its text with its end.

        What follows a line that is not UTF-8 is only checked for its encoding: if that is wrong,
        everything else would look like a mistake too.
        """
        path, offset = self.paths[0], start.offsets[0] if start.offsets else 0
        file.seek(offset)
        for number, raw in enumerate(file, start=start.lines + 1):
            offset += len(raw)
            text = _decode(raw, path, number, problems)
            if text is not None and _not_utf8(path) not in problems:
                yield number, offset, text.removeprefix("\ufeff") if number == 1 else text


class JsonReader(_RowReader):
    """A file with one JSON object per line, or one array of objects; its first one has the columns.

    An array has no lines: its rows are counted instead, and it can only be read from the beginning.
    """

    def __init__(self, path: Path, choice: ColumnChoice) -> None:
        super().__init__(path, choice)
        self._keys: list[tuple[str, ...]] = []
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES).removeprefix(BYTE_ORDER_MARK)
        self.is_array = head.lstrip().startswith(b"[")

    def where(self, line: int, side: str) -> str:
        return f"{self.paths[0]}: row {line}" if self.is_array else f"{self.paths[0]}:{line}"

    def _rows(self, start: Place, problems: Problems) -> Iterator[_Row]:
        if start != BEGIN and not self._keys:  # the columns are those of the first object
            next(self._rows(BEGIN, Problems()), None)
        with self.paths[0].open("rb") as file:
            for line, offset, value in self._values(file, start, problems):
                if not isinstance(value, dict):
                    what = f"not JSON ({value})" if isinstance(value, ValueError) else None
                    problems.add(
                        f"lines of {self.paths[0]} that are not a JSON object",
                        f"{self.where(line, '')}: {what or 'no JSON object'}; expected one object "
                        f'a line, such as {{"source": "...", "target": "..."}}; correct or delete '
                        f"the line",
                    )
                    continue
                if not self._keys:
                    known = _json_columns(value)
                    self._names = self._choice.find(list(known), where=self.where(line, ""))
                    self._keys = [known[name] for name in self._names]
                source, target = (_json_cell(value, key) for key in self._keys)
                yield _Row(line, source, target, line, offset)

    def _values(
        self, file: BinaryIO, start: Place, problems: Problems
    ) -> Iterator[tuple[int, int, Any]]:
        """Number of each value, bytes up to its end, and the value, or why it is not JSON."""
        lines = self._decoded(file, start, problems)
        if not self.is_array:
            for number, offset, text in lines:
                if not text.isspace():
                    try:
                        yield number, offset, json.loads(text)
                    except ValueError as error:
                        yield number, offset, error
            return
        whole = "".join(text for _, _, text in lines)
        problems.raise_any()
        try:
            values = json.loads(whole)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{self.paths[0]}:{error.lineno}: not JSON ({error}); expected one array of "
                f"objects or one object a line; correct the file"
            ) from error
        yield from ((number, 0, value) for number, value in enumerate(values, start=1))


def _json_columns(row: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Column names of a JSON object, with the keys that lead to each; ``outer.inner`` if nested."""
    keys: dict[str, tuple[str, ...]] = {}
    for outer, value in row.items():
        if isinstance(value, dict):
            keys.update({f"{outer}.{inner}": (outer, inner) for inner in value})
        else:
            keys[outer] = (outer,)
    return keys


def _json_cell(row: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """The value under the keys of ``_json_columns``, or ``_ABSENT``."""
    value: Any = row
    for key in keys:
        value = value.get(key, _ABSENT) if isinstance(value, dict) else _ABSENT
    return value


class CsvReader(_RowReader):
    """A .csv or .tsv file with a header, read in the strict mode of the csv module.

    A .tsv file is quoted as spreadsheets and pandas write it. One with bare quotes at the start of
    a cell is refused rather than misread.
    """

    def _rows(self, start: Place, problems: Problems) -> Iterator[_Row]:
        csv.field_size_limit(sys.maxsize)  # the limit of 131,072 characters would refuse documents
        path = self.paths[0]
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        lines = offset = 0  # up to the end of the newest row

        def rows(place: Place) -> Iterator[list[str]]:
            def texts() -> Iterator[str]:
                nonlocal lines, offset
                for lines, offset, text in self._decoded(file, place, problems):  # noqa: B007
                    yield text

            return csv.reader(texts(), delimiter=delimiter, strict=True)

        with path.open("rb") as file:
            line = 1
            try:
                table = rows(BEGIN)
                header = next(table, [])
                problems.raise_any()
                self._names = self._choice.find(header, where=f"{path}:1")
                source, target = (header.index(name) for name in self._names)
                if start != BEGIN:
                    table, lines = rows(start), start.lines
                line = lines + 1
                for row in table:
                    if len(row) == len(header):
                        yield _Row(line, row[source], row[target], lines, offset)
                    elif row:  # a blank line is no row
                        problems.add(
                            f"rows of {path} with a wrong number of cells",
                            f"{path}:{line}: {len(row)} cells; expected {len(header)}, as in the "
                            f"header; put cells that hold the delimiter or a line end in quotes",
                        )
                    line = lines + 1
            except csv.Error as error:
                if _not_utf8(path) not in problems:  # there, the text just ends
                    problems.add(
                        f"malformed rows of {path}",
                        f"{path}:{line}: {error}; expected cells parted by {delimiter!r}, a cell "
                        f"with quotes put in quotes and each inner quote doubled; correct the row, "
                        f"or save the data as .jsonl",
                    )


class ParquetReader(PairReader):
    """A .parquet file. Its places are numbers of rows; row groups before them are not read."""

    def __init__(self, path: Path, choice: ColumnChoice) -> None:
        super().__init__(path)
        self._choice = choice

    def where(self, line: int, side: str) -> str:
        return f"{self.paths[0]}: row {line}"

    def chunks(
        self, start: Place = BEGIN, *, problems: Problems, limit: int | None = None
    ) -> Iterator[Chunk]:
        """See ``PairReader``."""
        path = self.paths[0]
        try:
            with pq.ParquetFile(path, memory_map=True) as file:
                schema = file.schema_arrow.empty_table().flatten().schema
                names = self._choice.find(schema.names, where=str(path))
                check_types({name: schema.field(name).type for name in names}, where=str(path))
                sizes = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
                ends = list(itertools.accumulate(sizes))
                first = sum(end <= start.rows for end in ends)
                row = ends[first - 1] if first else 0
                groups = list(range(first, len(sizes)))
                for batch in file.iter_batches(row_groups=groups, columns=list(names)):
                    # The reader would name the field of a nested column 'en', flattening
                    # 'translation.en'.
                    table = pa.Table.from_batches([batch]).flatten()
                    skipped = min(max(0, start.rows - row), len(table))
                    stop = len(table) if limit is None else min(len(table), max(0, limit - row))
                    sides = [
                        table.column(name).chunk(0)[skipped:stop].cast(pa.string())
                        for name in names
                    ]
                    lines = np.arange(row + skipped + 1, row + max(skipped, stop) + 1)
                    if len(lines):
                        texts = pa.RecordBatch.from_arrays(sides, schema=SCHEMA)
                        yield Chunk(texts, lines, lines[:, None])
                    row += len(table)
                    if limit is not None and row >= limit:
                        return
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(
                f"{path}: not a readable .parquet file ({error}); expected Parquet; write it anew"
            ) from error


_TABLES: dict[str, Callable[[Path, ColumnChoice], PairReader]] = {
    ".jsonl": JsonReader,
    ".json": JsonReader,
    ".csv": CsvReader,
    ".tsv": CsvReader,
    ".parquet": ParquetReader,
}


def open_table(path: Path, choice: ColumnChoice, *, flag: str) -> PairReader:
    """The reader of a table file, by its ending.

    Raises ``UserError``, naming ``flag``, for a file that is missing or of an unknown format.
    """
    ending = path.suffix.lower()
    if ending not in _TABLES:
        raise UserError(
            f"{flag} {path}: unknown file ending '{path.suffix}'{did_you_mean(ending, _TABLES)}; "
            f"expected one of: {', '.join(_TABLES)}; rename or convert the file"
        )
    if not path.is_file():
        raise UserError(
            f"{flag} {path}: {'is a folder' if path.is_dir() else 'no such file'}; expected a "
            f"{path.suffix} file; correct the path"
        )
    return _TABLES[ending](path, choice)
