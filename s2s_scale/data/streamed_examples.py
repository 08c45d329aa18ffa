"""Token ids of a stream of pairs, block after block: the rows among which a plan shuffles.

A block is so many rows that follow one another in the files. Which rows make a step is planned for
a block at a time, by its lengths, the seed, the epoch and the block's number: what was in a buffer
can be had again from the place where its block begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from s2s_scale.config import DEFAULT_SHUFFLE_BUFFER
from s2s_scale.data.examples import tokenize_rows
from s2s_scale.data.lengths import Lengths
from s2s_scale.data.streams import PairStream, Place
from s2s_scale.errors import UserError


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
