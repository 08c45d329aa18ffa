"""Reads pairs from .jsonl, .json, .csv, .tsv and .parquet files, with the line of every row.

Reads a text file with one row per line into Arrow strings, and checks that it is UTF-8.

A row ends at ``\n`` or ``\r\n`` only. Other characters that Unicode calls line separators
(U+2028, U+0085, form feed, ...) are text: splitting there would shift every later row of one file
against the other.

Finds the source and target text among the columns of a table, nested ones included.

Collects the mistakes found in a file, a few of each kind, and raises them together.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from s2s_scale.errors import UserError, did_you_mean, raise_problems

NESTED = "translation"


def find_columns(
    columns: Sequence[str],
    *,
    wanted: tuple[str | None, str | None],
    languages: tuple[str | None, str | None],
    where: str,
) -> tuple[str, str]:
    """The columns of source and target text among ``columns``.

    Fields of a nested column are named ``outer.inner``. ``wanted`` are --source_column and
    --target_column, ``languages`` are --src_lang and --tgt_lang: mBART's ``en_XX`` finds ``en``.
    Raises ``UserError`` naming ``where``, the missing column and the columns that are there.
    """
    found = []
    problems = []
    for side, name, language in zip(("source", "target"), wanted, languages, strict=True):
        column = _find(columns, side=side, wanted=name, language=language)
        if column is None:
            problems.append(_missing(columns, side=side, wanted=name, where=where))
        else:
            found.append(column)
    if len(set(found)) == 1 and not problems:
        problems.append(
            f"{where}: column '{found[0]}' is both source and target; expected two different "
            f"columns; name them with --source_column and --target_column"
        )
    raise_problems(problems)
    return found[0], found[1]


def _find(
    columns: Sequence[str], *, side: str, wanted: str | None, language: str | None
) -> str | None:
    if wanted is not None:
        candidates = [wanted, f"{NESTED}.{wanted}"]
    else:
        candidates = [side]
        if language is not None:
            candidates += [f"{NESTED}.{language}", f"{NESTED}.{language.split('_')[0]}"]
    return next((name for name in candidates if name in columns), None)


def _missing(columns: Sequence[str], *, side: str, wanted: str | None, where: str) -> str:
    there = ", ".join(columns) if columns else "none"
    name = wanted or side
    remedy = f"name the right one with --{side}_column"
    if wanted is None and any(column.startswith(f"{NESTED}.") for column in columns):
        language = {"source": "--src_lang", "target": "--tgt_lang"}[side]
        remedy += f", or give the language with {language}"
    return (
        f"{where}: no column '{name}' for the {side} text{did_you_mean(name, columns)}; "
        f"expected one of the columns there: {there}; {remedy}"
    )


LISTED = 5


class Problems:
    """Problem lines by kind. Only the first ``LISTED`` of a kind are kept; the rest are counted.

    A file with a million bad lines thus gives a message that a person can read.
    """

    def __init__(self) -> None:
        self._lines: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self._counts)

    def add(self, kind: str, line: str) -> None:
        """Add one problem. ``kind`` is the plural that 'and N more' is said of."""
        self.add_many(kind, [line], count=1)

    def add_many(self, kind: str, lines: Iterable[str], *, count: int) -> None:
        """Add ``count`` problems of a kind; ``lines`` may stop after the first ``LISTED``."""
        if count < 1:
            return
        kept = self._lines.setdefault(kind, [])
        kept.extend(line for line, _ in zip(lines, range(LISTED - len(kept)), strict=False))
        self._counts[kind] = self._counts.get(kind, 0) + count

    def lines(self) -> list[str]:
        """All kept lines in the order of their kinds, each kind followed by what was left out."""
        lines = []
        for kind, kept in self._lines.items():
            lines += kept
            left_out = self._counts[kind] - len(kept)
            if left_out > 0:
                lines.append(f"and {left_out:,} more {kind}")
        return lines

    def raise_any(self) -> None:
        """Raise one ``UserError`` with all lines; do nothing when there are none."""
        raise_problems(self.lines())


BLOCK_BYTES = 16 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
NEWLINE, RETURN = 10, 13


def read_lines(path: Path, *, problems: Problems) -> pa.ChunkedArray:
    """The lines of the file as strings, without their line ends and a leading byte order mark.

    Lines that are not UTF-8 are added to ``problems``; the result is then missing rows and its
    caller must raise the problems. Takes about a second per gigabyte.
    """
    chunks: list[pa.Array] = []
    first_line = 1
    for block in _blocks(path):
        if _is_utf8(block, path=path, first_line=first_line, problems=problems):
            chunks.append(_split_lines(block))
        first_line += block.count(b"\n")
    return pa.chunked_array(chunks, type=pa.string())


def check_utf8(path: Path, *, problems: Problems) -> None:
    """Add every line of the file that is not UTF-8 to ``problems``."""
    first_line = 1
    for block in _blocks(path):
        _is_utf8(block, path=path, first_line=first_line, problems=problems)
        first_line += block.count(b"\n")


def _blocks(path: Path) -> Iterator[bytes]:
    """The file's bytes in blocks of whole lines, without a leading byte order mark."""
    with path.open("rb") as file:
        rest = file.read(len(BYTE_ORDER_MARK))
        if rest == BYTE_ORDER_MARK:
            rest = b""
        while block := file.read(BLOCK_BYTES):
            block = rest + block
            cut = block.rfind(b"\n") + 1
            if cut:
                yield block[:cut]
            rest = block[cut:]
        if rest:
            yield rest


def _is_utf8(block: bytes, *, path: Path, first_line: int, problems: Problems) -> bool:
    try:
        block.decode("utf-8")
    except UnicodeDecodeError:
        _report_bytes(block, path=path, first_line=first_line, problems=problems)
        return False
    return True


def _report_bytes(block: bytes, *, path: Path, first_line: int, problems: Problems) -> None:
    encoding = "UTF-16" if b"\x00" in block else "LATIN1"
    for number, line in enumerate(block.split(b"\n"), start=first_line):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            problems.add(
                f"lines of {path} that are not UTF-8",
                f"{path}:{number}: byte 0x{line[error.start]:02x} at position {error.start + 1} "
                f"is not UTF-8; expected UTF-8 text; convert the file, for example with "
                f"'iconv -f {encoding} -t UTF-8'",
            )


def _split_lines(block: bytes) -> pa.StringArray:
    """Arrow strings over one copy of the block from which the line ends are taken out."""
    data = np.frombuffer(block, dtype=np.uint8)
    ends = np.flatnonzero(data == NEWLINE)
    returns = (ends > 0) & (data[ends - 1] == RETURN)
    text = np.delete(data, np.concatenate([ends, ends[returns] - 1]))
    # A line's end in the remaining text: its place in the file, less the line ends before it.
    stops = ends - np.arange(len(ends)) - np.cumsum(returns)
    if data[-1] != NEWLINE:
        stops = np.append(stops, len(text))
    offsets = np.concatenate([[0], stops]).astype(np.int32)
    return pa.StringArray.from_buffers(len(stops), pa.py_buffer(offsets), pa.py_buffer(text))


ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
ROWS_PER_CHUNK = 50_000
SCHEMA = pa.schema([("source", pa.string()), ("target", pa.string())])
_ABSENT = object()


@dataclass(frozen=True)
class ColumnChoice:
    """What the user said about the columns: --source_column, --target_column and languages."""

    wanted: tuple[str | None, str | None] = (None, None)
    languages: tuple[str | None, str | None] = (None, None)

    def find(self, columns: list[str], *, where: str) -> tuple[str, str]:
        """See ``find_columns``."""
        return find_columns(columns, wanted=self.wanted, languages=self.languages, where=where)


@dataclass
class _Pairs:
    """Rows gathered in chunks; ``lines`` holds the line in the file of every row.

    ``label`` stands between file name and line in messages; it says so where rows are counted.
    """

    path: Path
    problems: Problems
    label: str = ":"
    sides: list[list[str]] = field(default_factory=lambda: [[], []])
    lines: list[int] = field(default_factory=list)
    batches: list[pa.RecordBatch] = field(default_factory=list)

    def add(self, line: int, source: Any, target: Any, names: tuple[str, str]) -> None:
        for value, name in zip((source, target), names, strict=True):
            if not isinstance(value, str):
                self._report(line, name, value)
                return
        self.lines.append(line)
        self.sides[0].append(source)
        self.sides[1].append(target)
        if len(self.sides[0]) == ROWS_PER_CHUNK:
            self._close_chunk()

    def table(self) -> pa.Table:
        self._close_chunk()
        return pa.Table.from_batches(self.batches, schema=SCHEMA)

    def place(self, line: int) -> str:
        return f"{self.path}{self.label}{line}"

    def _close_chunk(self) -> None:
        try:
            arrays = [pa.array(side, type=pa.string()) for side in self.sides]
        except UnicodeEncodeError:
            self._report_surrogates()
        else:
            self.batches.append(pa.RecordBatch.from_arrays(arrays, schema=SCHEMA))
        self.sides = [[], []]

    def _report(self, line: int, name: str, value: Any) -> None:
        if value is _ABSENT:
            self.problems.add(
                f"rows of {self.path} without a column",
                f"{self.place(line)}: column '{name}' is missing in this row; expected text; "
                f"add it or delete the row",
            )
            return
        shown = json.dumps(value, ensure_ascii=False)
        shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
        self.problems.add(
            f"cells of {self.path} that are not text",
            f"{self.place(line)}: column '{name}' holds {shown} ({type(value).__name__}); "
            f"expected text; put it in quotes or delete the row",
        )

    def _report_surrogates(self) -> None:
        """JSON can spell half a character (``\\ud83d`` alone), which no UTF-8 text can hold."""
        for row, line in enumerate(self.lines[-len(self.sides[0]) :]):
            text = self.sides[0][row] + self.sides[1][row]
            if any("\ud800" <= character <= "\udfff" for character in text):
                self.problems.add(
                    f"lines of {self.path} with half a character",
                    f"{self.place(line)}: an escape such as \\ud83d stands alone; expected both "
                    f"halves of the character (a surrogate pair); correct or delete the row",
                )


def check_table_path(path: Path, *, flag: str) -> None:
    """Raise ``UserError`` unless ``path`` is a file whose ending names a known format."""
    if path.suffix.lower() not in ENDINGS:
        raise UserError(
            f"{flag} {path}: unknown file ending '{path.suffix}'"
            f"{did_you_mean(path.suffix, ENDINGS)}; expected one of: {', '.join(ENDINGS)}; "
            f"rename or convert the file"
        )
    if not path.is_file():
        raise UserError(
            f"{flag} {path}: {'is a folder' if path.is_dir() else 'no such file'}; expected a "
            f"{path.suffix} file; correct the path"
        )


def read_table(
    path: Path, *, choice: ColumnChoice, limit: int | None = None
) -> tuple[pa.Table, Callable[[int], str]]:
    """The file's first ``limit`` pairs (columns source, target), and where a row stands in it.

    The second result gives "file:line" for a row counted from 0 ("file: row 7" for .parquet and
    for an array in .json, which have no lines). Raises ``UserError`` for bytes that are not
    UTF-8, malformed rows, unknown columns and cells that are not text.
    """
    if path.suffix.lower() == ".parquet":
        table = _read_parquet(path, choice=choice, limit=limit)
        return table, lambda row: f"{path}: row {row + 1}"
    problems = Problems()
    check_utf8(path, problems=problems)
    problems.raise_any()
    pairs = _Pairs(path, problems)
    if path.suffix.lower() in (".csv", ".tsv"):
        _read_csv(path, pairs=pairs, choice=choice, limit=limit)
    else:
        _read_json(path, pairs=pairs, choice=choice, limit=limit)
    table = pairs.table()
    problems.raise_any()
    return table, lambda row: pairs.place(pairs.lines[row])


def _read_json(path: Path, *, pairs: _Pairs, choice: ColumnChoice, limit: int | None) -> None:
    """Read objects; the columns are those of the first one."""
    names: tuple[str, str] | None = None
    # newline="\n": a U+2028 or a lone \r inside a line does not end it.
    with pairs.path.open(encoding="utf-8-sig", newline="\n") as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
        file.seek(0)
        if start == "[":
            pairs.label = ": row "
            rows = iter(_array_rows(path, file.read()))
        else:
            rows = _line_rows(file)
        for line, row in rows:
            if not isinstance(row, dict):
                _report_json(pairs, line=line, found=row)
                continue
            if names is None:
                keys = json_columns(row)
                names = choice.find(list(keys), where=pairs.place(line))
                paths = [keys[name] for name in names]
            pairs.add(line, json_cell(row, paths[0]), json_cell(row, paths[1]), names)
            if limit is not None and len(pairs.lines) == limit:
                return


def _report_json(pairs: _Pairs, *, line: int, found: Any) -> None:
    what = f"not JSON ({found})" if isinstance(found, ValueError) else "no JSON object"
    pairs.problems.add(
        f"lines of {pairs.path} that are no JSON object",
        f"{pairs.place(line)}: {what}; expected one object a line, such as "
        f'{{"source": "...", "target": "..."}}; correct or delete the line',
    )


def _line_rows(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, start=1):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            row = error
        yield number, row


def _array_rows(path: Path, text: str) -> list[tuple[int, Any]]:
    """The objects of a file that is one array, numbered from 1."""
    try:
        rows: list[Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not JSON ({error}); expected one array of objects or one "
            f"object a line; correct the file"
        ) from error
    return list(enumerate(rows, start=1))


def json_columns(row: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Column names of a JSON object, with the path to each; ``outer.inner`` for nested ones."""
    keys: dict[str, tuple[str, ...]] = {}
    for outer, value in row.items():
        if isinstance(value, dict):
            keys.update({f"{outer}.{inner}": (outer, inner) for inner in value})
        else:
            keys[outer] = (outer,)
    return keys


def json_cell(row: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """The value under a path of ``json_columns``; one of no type of JSON where there is none."""
    value: Any = row
    for key in path:
        value = value.get(key, _ABSENT) if isinstance(value, dict) else _ABSENT
    return value


def _read_csv(path: Path, *, pairs: _Pairs, choice: ColumnChoice, limit: int | None) -> None:
    """Read with the csv module in its strict mode, which refuses text after a closing quote.

    A .tsv file is quoted as spreadsheets and pandas write it. One that holds bare quotes at the
    start of a cell is refused rather than misread.
    """
    csv.field_size_limit(sys.maxsize)  # the limit of 131,072 characters would refuse documents
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        line = 1
        try:
            header = next(reader, [])
            names = choice.find(header, where=f"{path}:1")
            source, target = (header.index(name) for name in names)
            line = reader.line_num + 1
            for row in reader:
                if len(row) == len(header):
                    pairs.add(line, row[source], row[target], names)
                elif row:  # a blank line is no row
                    _report_width(pairs, line=line, found=len(row), expected=len(header))
                if limit is not None and len(pairs.lines) == limit:
                    return
                line = reader.line_num + 1
        except csv.Error as error:
            pairs.problems.add(
                f"malformed rows of {path}",
                f"{path}:{line}: {error}; expected cells parted by {delimiter!r}, a cell with "
                f"quotes put in quotes and each inner quote doubled; correct the row, or save "
                f"the data as .jsonl",
            )


def _report_width(pairs: _Pairs, *, line: int, found: int, expected: int) -> None:
    pairs.problems.add(
        f"rows of {pairs.path} with a wrong number of cells",
        f"{pairs.path}:{line}: {found} cells; expected {expected}, as in the header; put cells "
        f"that hold the delimiter or a line end in quotes",
    )


def _read_parquet(path: Path, *, choice: ColumnChoice, limit: int | None) -> pa.Table:
    # pq.read_table would name the field of a nested column 'en' and not 'translation.en'.
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            columns = file.schema_arrow.empty_table().flatten().column_names
            names = choice.find(columns, where=str(path))
            table = file.read(columns=list(names)).flatten()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{path}: not a readable .parquet file ({error}); expected Parquet; write it anew"
        ) from error
    check_types({name: table.schema.field(name).type for name in names}, where=str(path))
    table = table.slice(0, limit)
    sides = [table.column(name).cast(pa.string()) for name in names]
    return pa.Table.from_arrays(sides, schema=SCHEMA)


def check_types(types: Mapping[str, pa.DataType], *, where: str) -> None:
    """Raise ``UserError`` for columns whose Arrow type is not text."""
    problems = Problems()
    for name, kind in types.items():
        value = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(value) or pa.types.is_large_string(value)):
            problems.add(
                "columns that are not text",
                f"{where}: column '{name}' holds {kind}; expected text (string); convert the "
                f"column or name another with --source_column and --target_column",
            )
    problems.raise_any()
