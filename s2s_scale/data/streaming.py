"""Streams of tokenised examples: files of any size, read and shuffled block by block.

A block is a number of rows that follow one another in the files. The rows of a step are planned for
one block at a time, from its lengths, the seed, the epoch and the block's number, so what was in a
shuffle buffer can be restored from the place where its block begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from s2s_scale.config import DEFAULT_SHUFFLE_BUFFER, DataArguments
from s2s_scale.data.batch_plan import Lengths
from s2s_scale.data.readers import BEGIN, JsonReader, PairReader, Place
from s2s_scale.data.sources import open_reader, source_kind
from s2s_scale.data.tokenize import beyond_vocabulary, tokenize_rows, too_long
from s2s_scale.errors import UserError


def open_stream(data: DataArguments) -> PairReader:
    """The reader of the training files that the user named.

    Raises:
        UserError: they are missing, or cannot be read row by row.
    """
    if source_kind(data) == "dataset":
        raise UserError(
            f"dataset_name={data.dataset_name}: cannot be streamed; a saved data set is "
            "memory-mapped anyway: leave --streaming out, or give --train_file or --data_dir"
        )
    reader = open_reader(data, "train")
    if isinstance(reader, JsonReader) and reader.is_array:
        raise UserError(
            f"{reader.paths[0]}: a file that is one array cannot be streamed; expected one JSON "
            "object a line; convert the file, or leave --streaming out"
        )
    return reader


class BlockPlace(NamedTuple):
    """Where a block begins: its epoch, its number in the epoch, and the place in the files."""

    epoch: int = 0
    block: int = 0
    place: Place = BEGIN

    def as_json(self) -> dict[str, Any]:
        """The fields as plain values, for ``from_json``."""
        return {"epoch": self.epoch, "block": self.block, **self.place._asdict()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> BlockPlace:
        """The inverse of ``as_json``."""
        place = Place(values["rows"], values["lines"], tuple(values["offsets"]))
        return cls(values["epoch"], values["block"], place)


FIRST_BLOCK = BlockPlace()


@dataclass(frozen=True)
class Block(Dataset[Mapping[str, Any]]):
    """The token ids of a block's rows."""

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
    """Training rows that are read and tokenised while training runs, epoch after epoch.

    Args:
        pairs: the reader of the files.
        tokenizer: a tokenizer of transformers.
        vocab_sizes: of the model, source and target; larger token ids are refused.
        max_source_length: tokens of a source.
        max_target_length: tokens of a target.
        source_prefix: text put before every source.
        long_rows: whether longer rows are cut (``truncate``) or refused (``error``).
        buffer: rows of a block, among which rows are shuffled.
        limit: rows of an epoch; None: all there are.
    """

    def __init__(
        self,
        pairs: PairReader,
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
        self.pairs = pairs
        self.buffer = buffer
        self.limit = limit
        self._tokenizer = tokenizer
        self._vocab_sizes = vocab_sizes
        self._limits = (max_source_length, max_target_length)
        self._prefix = source_prefix
        self._truncates = long_rows == "truncate"

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        """The rows of one epoch, in the order of the files."""
        for block in self.blocks(rows=self.buffer):
            if block.start.epoch:
                return
            yield from (block[row] for row in range(len(block)))

    def identity(self) -> dict[str, Any]:
        """What must stay the same when a run is resumed."""
        digest = self.pairs.digest()
        rows = "all of the stream" if self.limit is None else self.limit
        return {"training rows": rows, "digest of the training rows": digest, "buffer": self.buffer}

    def blocks(self, start: BlockPlace = FIRST_BLOCK, *, rows: int) -> Iterator[Block]:
        """Blocks of ``rows`` rows from ``start`` on, without end: the files are read over and over.

        Raises ``UserError`` for files without a row, and for rows that cannot be trained on.
        """
        here = start
        while True:
            sides: tuple[list[str], list[str]] = ([], [])
            after = here.place
            for pair in self.pairs.pairs(here.place, limit=self.limit):
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
            truncation=self._truncates,
        )
        block = Block(start, ids["input_ids"], ids["labels"])
        columns = (("source", block.input_ids), ("target", block.labels))
        for (side, rows), limit, size in zip(columns, self._limits, self._vocab_sizes, strict=True):
            for number, tokens in enumerate(rows, start=start.place.rows + 1):
                if len(tokens) > limit:
                    raise UserError(too_long(number, side, len(tokens), limit))
                if max(tokens, default=0) >= size:
                    raise UserError(beyond_vocabulary(number, side, max(tokens), size))
        return block
