"""Reads pairs of text one after the other from files of any size, from any place on.

A place is where a reader stands: how many rows and lines are behind it, and how many bytes of each
file. Whoever knows it goes on there without reading what comes before.

Token ids of a stream of pairs, block after block: the rows among which a plan shuffles.

A block is so many rows that follow one another in the files. Which rows make a step is planned for
a block at a time, by its lengths, the seed, the epoch and the block's number: what was in a buffer
can be had again from the place where its block begins.
"""

from __future__ import annotations

import abc
import csv
import hashlib
import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from s2s_scale.config import DEFAULT_SHUFFLE_BUFFER, DataArguments
from s2s_scale.data.batch_plan import Lengths
from s2s_scale.data.readers import ColumnChoice, check_table_path, json_cell, json_columns
from s2s_scale.data.sources import source_kind
from s2s_scale.data.tokenize import tokenize_rows
from s2s_scale.errors import UserError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
HEAD_BYTES = 1 << 16
"""What is read of a file to know it again."""


class Place(NamedTuple):
    """Rows and lines that are behind, and the bytes of each file."""

    rows: int = 0
    lines: int = 0
    offsets: tuple[int, ...] = ()


BEGIN = Place()


class Pair(NamedTuple):
    """A row, and the place after it."""

    source: str
    target: str
    after: Place


class PairStream(abc.ABC):
    """Pairs of text in files, in their order."""

    def __init__(self, *paths: Path) -> None:
        self.paths = paths

    @abc.abstractmethod
    def read(self, place: Place = BEGIN) -> Iterator[Pair]:
        """The pairs from ``place`` on; ``UserError`` with file and line for what is wrong."""

    def digest(self) -> str:
        """Changes with the files' sizes and first bytes; quick, however large they are."""
        digest = hashlib.blake2b(digest_size=8)
        for path in self.paths:
            with path.open("rb") as file:
                digest.update(f"{path.stat().st_size} ".encode() + file.read(HEAD_BYTES))
        return digest.hexdigest()

    def _pair(self, source: Any, target: Any, after: Place, *, where: str) -> Pair:
        for side, text in (("source", source), ("target", target)):
            if not isinstance(text, str):
                raise UserError(
                    f"{where}: {side} is {type(text).__name__}; expected text; put it in quotes, "
                    "or delete the row"
                )
            if not text or text.isspace():
                raise UserError(
                    f"{where}: empty {side} text (found {text!r}); expected text; fill it in, or "
                    "delete the row from source and target"
                )
        return Pair(source, target, after)


class LineStream(PairStream):
    """Two files with a text a line."""

    def read(self, place: Place = BEGIN) -> Iterator[Pair]:
        """See ``PairStream``."""
        with self.paths[0].open("rb") as first, self.paths[1].open("rb") as second:
            files = (first, second)
            for file, offset in zip(files, place.offsets or (0, 0), strict=True):
                file.seek(offset)
            rows, offsets = place.rows, place.offsets or (0, 0)
            while True:
                raw = [file.readline() for file in files]
                if not all(raw):
                    break
                rows += 1
                offsets = (offsets[0] + len(raw[0]), offsets[1] + len(raw[1]))
                source, target = (
                    _text(line, path, rows) for line, path in zip(raw, self.paths, strict=True)
                )
                where = f"{self.paths[0]}:{rows}"
                yield self._pair(source, target, Place(rows, rows, offsets), where=where)
            if any(raw):
                longer, shorter = self.paths if raw[0] else reversed(self.paths)
                raise UserError(
                    f"{shorter}: ends after {rows:,} lines, but {longer} goes on; expected the "
                    "same number; add the missing lines or delete the surplus ones"
                )


class JsonStream(PairStream):
    """A file with a JSON object a line."""

    def __init__(self, path: Path, choice: ColumnChoice) -> None:
        super().__init__(path)
        self._choice = choice

    def read(self, place: Place = BEGIN) -> Iterator[Pair]:
        """See ``PairStream``; the columns are those of the first object."""
        path = self.paths[0]
        with path.open("rb") as file:
            names = self._columns(file)
            offset, rows = (place.offsets or (0,))[0], place.rows
            file.seek(offset)
            for number, raw in enumerate(file, start=place.lines + 1):
                offset += len(raw)
                if raw.isspace():
                    continue
                rows += 1
                row = self._object(raw, number)
                source, target = (json_cell(row, name) for name in names)
                after = Place(rows, number, (offset,))
                yield self._pair(source, target, after, where=f"{path}:{number}")

    def _columns(self, file: BinaryIO) -> list[tuple[str, ...]]:
        for number, raw in enumerate(file, start=1):
            if not raw.isspace():
                columns = json_columns(self._object(raw, number))
                where = f"{self.paths[0]}:{number}"
                return [columns[name] for name in self._choice.find(list(columns), where=where)]
        return []

    def _object(self, raw: bytes, number: int) -> dict[str, Any]:
        text = _text(raw, self.paths[0], number)
        try:
            row = json.loads(text)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(
                f"{self.paths[0]}:{number}: no JSON object (found {text[:60]!r}); expected one "
                'object a line, such as {"source": "...", "target": "..."}; a file that is one '
                "array cannot be streamed: write one object a line"
            )
        return row


class CsvStream(PairStream):
    """A .csv or .tsv file with a header."""

    def __init__(self, path: Path, choice: ColumnChoice) -> None:
        super().__init__(path)
        self._choice = choice
        self._offset = self._line = 0

    def read(self, place: Place = BEGIN) -> Iterator[Pair]:
        """See ``PairStream``."""
        csv.field_size_limit(sys.maxsize)
        path = self.paths[0]
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        with path.open("rb") as file:
            self._offset = self._line = 0
            header = next(self._rows(file, delimiter), [])
            names = self._choice.find(header, where=f"{path}:1")
            source, target = (header.index(name) for name in names)
            if place.offsets:
                self._offset, self._line = place.offsets[0], place.lines
            file.seek(self._offset)
            rows, line = place.rows, self._line + 1
            for row in self._rows(file, delimiter):
                if row:
                    rows += 1
                    if len(row) != len(header):
                        raise UserError(
                            f"{path}:{line}: {len(row)} cells; expected {len(header)}, as in the "
                            "header; put cells that hold the delimiter or a line end in quotes"
                        )
                    after = Place(rows, self._line, (self._offset,))
                    yield self._pair(row[source], row[target], after, where=f"{path}:{line}")
                line = self._line + 1

    def _rows(self, file: BinaryIO, delimiter: str) -> Iterator[list[str]]:
        """The rows from where the file stands; line and offset are those after the newest row."""

        def lines() -> Iterator[str]:
            while raw := file.readline():
                self._line += 1
                self._offset += len(raw)
                yield _text(raw, self.paths[0], self._line, ends=True)

        try:
            yield from csv.reader(lines(), delimiter=delimiter, strict=True)
        except csv.Error as error:
            raise UserError(
                f"{self.paths[0]}:{self._line}: {error}; expected cells parted by {delimiter!r}, a "
                "cell with quotes put in quotes and each inner quote doubled; correct the row, or "
                "save the data as .jsonl"
            ) from error


class ParquetStream(PairStream):
    """A .parquet file; its places are numbers of rows, and row groups before them are not read."""

    def __init__(self, path: Path, choice: ColumnChoice) -> None:
        super().__init__(path)
        self._choice = choice

    def read(self, place: Place = BEGIN) -> Iterator[Pair]:
        """See ``PairStream``."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.paths[0]
        try:
            with pq.ParquetFile(path, memory_map=True) as file:
                columns = file.schema_arrow.empty_table().flatten().column_names
                names = self._choice.find(columns, where=str(path))
                sizes = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
                ends = list(itertools.accumulate(sizes))
                first = sum(end <= place.rows for end in ends)
                rows = ends[first - 1] if first else 0
                groups = list(range(first, len(sizes)))
                for batch in file.iter_batches(row_groups=groups, columns=list(names)):
                    table = pa.Table.from_batches([batch]).flatten()
                    sides = (table.column(name).to_pylist() for name in names)
                    for source, target in zip(*sides, strict=True):
                        rows += 1
                        if rows > place.rows:
                            where = f"{path}: row {rows}"
                            yield self._pair(source, target, Place(rows, rows), where=where)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(
                f"{path}: not a readable .parquet file ({error}); expected Parquet; write it anew"
            ) from error


def open_stream(data: DataArguments) -> PairStream:
    """The training files that the user named, as a stream.

    Raises:
        UserError: they are missing, or cannot be read one row after the other.
    """
    kind = source_kind(data)
    if kind == "dataset":
        raise UserError(
            f"dataset_name={data.dataset_name}: cannot be streamed; a saved data set is "
            "memory-mapped anyway: leave --streaming out, or give --train_file or --data_dir"
        )
    if kind == "data_dir":
        folder = Path(str(data.data_dir)).expanduser()
        paths = [folder / f"train.{side}" for side in ("source", "target")]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise UserError(
                *(
                    f"{path}: no such file; expected one {path.suffix[1:]} text a line; add it, "
                    "or correct --data_dir"
                    for path in missing
                )
            )
        return LineStream(*paths)
    if not data.train_file:
        raise UserError("no train data: found no --train_file; expected a file; give --train_file")
    path = Path(data.train_file).expanduser()
    check_table_path(path, flag="--train_file")
    choice = ColumnChoice(
        wanted=(data.source_column, data.target_column), languages=(data.src_lang, data.tgt_lang)
    )
    kinds = {".csv": CsvStream, ".tsv": CsvStream, ".parquet": ParquetStream}
    return kinds.get(path.suffix.lower(), JsonStream)(path, choice)


def _text(raw: bytes, path: Path, line: int, *, ends: bool = False) -> str:
    """A line as text, without its end unless ``ends``, and without a leading byte order mark."""
    if line == 1:
        raw = raw.removeprefix(BYTE_ORDER_MARK)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}:{line}: byte 0x{raw[error.start]:02x} at position {error.start + 1} is not "
            "UTF-8; expected UTF-8 text; convert the file, for example with 'iconv -t UTF-8'"
        ) from error
    return text if ends else text.removesuffix("\n").removesuffix("\r")


class BlockPlace(NamedTuple):
    """Where a block begins."""

    epoch: int = 0
    #: its number in the epoch
    block: int = 0
    place: Place = Place()

    def as_json(self) -> dict[str, Any]:
        """Numbers alone, for ``from_json``."""
        return {"epoch": self.epoch, "block": self.block, **self.place._asdict()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> BlockPlace:
        """What ``as_json`` gave."""
        place = Place(values["rows"], values["lines"], tuple(values["offsets"]))
        return cls(values["epoch"], values["block"], place)


FIRST_BLOCK = BlockPlace()


@dataclass(frozen=True)
class Block(Dataset[Mapping[str, Any]]):
    """The rows of a block, as token ids."""

    start: BlockPlace
    input_ids: list[list[int]]
    labels: list[list[int]]

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        return {"input_ids": self.input_ids[row], "labels": self.labels[row]}

    @property
    def lengths(self) -> Lengths:
        """Source and target tokens of each row."""
        source, target = (
            np.fromiter(map(len, side), dtype=np.int32, count=len(side))
            for side in (self.input_ids, self.labels)
        )
        return source, target


class StreamedExamples(IterableDataset[Mapping[str, Any]]):
    """Training rows that are read and tokenised while training goes on, epoch after epoch."""

    def __init__(
        self,
        pairs: PairStream,
        tokenizer: Any,
        *,
        vocab_sizes: tuple[int, int],
        max_source_length: int,
        max_target_length: int,
        source_prefix: str = "",
        long_rows: str = "truncate",
        buffer: int = DEFAULT_SHUFFLE_BUFFER,
        limit: int | None = None,
    ) -> None:
        """``vocab_sizes``: source and target; ``limit``: rows of an epoch, None: all there are."""
        self.pairs = pairs
        self.buffer = buffer
        self.limit = limit
        self._tokenizer = tokenizer
        self._vocab_sizes = vocab_sizes
        self._limits = (max_source_length, max_target_length)
        self._prefix = source_prefix
        self._cuts = long_rows == "truncate"

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        """The rows of one epoch, in the order of the files."""
        for block in self.blocks(rows=self.buffer):
            if block.start.epoch:
                return
            yield from (block[row] for row in range(len(block)))

    def identity(self) -> dict[str, Any]:
        """What must stay the same when a run goes on."""
        digest = self.pairs.digest()
        rows = "all of the stream" if self.limit is None else self.limit
        return {"training rows": rows, "digest of the training rows": digest, "buffer": self.buffer}

    def blocks(self, start: BlockPlace = FIRST_BLOCK, *, rows: int) -> Iterator[Block]:
        """Blocks of so many rows from ``start`` on, without end: after the last comes the first.

        Raises ``UserError`` for files without a row, and for rows that cannot be trained on.
        """
        here = start
        while True:
            sides: tuple[list[str], list[str]] = ([], [])
            after = here.place
            for pair in self.pairs.read(here.place):
                if self.limit is not None and pair.after.rows > self.limit:
                    break
                for side, text in zip(sides, (pair.source, pair.target), strict=True):
                    side.append(text)
                after = pair.after
                if len(sides[0]) == rows:
                    yield self._tokenized(here, sides)
                    here = BlockPlace(here.epoch, here.block + 1, after)
                    sides = ([], [])
            if sides[0]:
                yield self._tokenized(here, sides)
            elif after.rows == 0:
                raise UserError(
                    f"{self.pairs.paths[0]}: has no rows; expected at least 1; add rows"
                )
            here = BlockPlace(here.epoch + 1)

    def _tokenized(self, start: BlockPlace, sides: tuple[list[str], list[str]]) -> Block:
        source_limit, target_limit = self._limits
        ids = tokenize_rows(
            {"source": sides[0], "target": sides[1]},
            tokenizer=self._tokenizer,
            source_prefix=self._prefix,
            max_source_length=source_limit,
            max_target_length=target_limit,
            truncation=self._cuts,
        )
        block = Block(start, ids["input_ids"], ids["labels"])
        self._check(block)
        return block

    def _check(self, block: Block) -> None:
        sides = (("source", block.input_ids), ("target", block.labels))
        for (side, rows), limit, size in zip(sides, self._limits, self._vocab_sizes, strict=True):
            for number, ids in enumerate(rows, start=block.start.place.rows + 1):
                if len(ids) > limit:
                    raise UserError(
                        f"row {number}: {len(ids)} {side} tokens; expected at most {limit}; raise "
                        f"--max_{side}_length, shorten the row, or use --long_rows truncate"
                    )
                if max(ids, default=0) >= size:
                    raise UserError(
                        f"row {number}: {side} token id {max(ids)}; expected ids from 0 to "
                        f"{size - 1}, the model's {side} vocabulary; tokenizer and model do not "
                        "match: give --tokenizer_name the model's own"
                    )
