"""Micro-batches from a stream, each block of which is planned like a data set."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from s2s_scale.arguments import Seq2SeqTrainingArguments
from s2s_scale.data.prefetch import prefetch
from s2s_scale.data.samplers import EpochSampler, FillerRows, MicroBatch
from s2s_scale.data.streaming import Block, BlockPlace, StreamedExamples

BLOCKS_OF_EPOCH = 2**24
"""More than an epoch has: tells the plans of one epoch's blocks from those of the next."""


def streaming_problems(args: Seq2SeqTrainingArguments, *, static_shapes: bool) -> list[str]:
    """Settings that cannot take effect on a stream, one line each with its remedy."""
    problems = []
    if args.max_steps <= 0:
        problems.append(
            f"max_steps={args.max_steps}: expected a number above 0, since the number of rows in a "
            "stream is not known before its end; give --max_steps"
        )
    problems += [
        f"{name}=epoch: cannot take effect on a stream, whose epochs have no known end; use "
        f"--{name} steps"
        for name in ("eval_strategy", "save_strategy", "logging_strategy")
        if str(getattr(getattr(args, name), "value", getattr(args, name))) == "epoch"
    ]
    for name, idle, remedy in (
        ("num_buckets", None, "leave it out"),
        ("auto_batch", False, "raise --groups_per_step for smaller micro-batches"),
        ("max_tokens_per_device", None, "raise --groups_per_step for smaller micro-batches"),
        ("dataloader_drop_last", False, "leave it out: a short step has all of its rows"),
        ("dataloader_num_workers", 0, "leave it out: a thread prefetches"),
    ):
        if getattr(args, name) != idle:
            problems.append(
                f"{name}={getattr(args, name)}: cannot take effect on a stream; {remedy}"
            )
    if args.batching == "packed":
        problems.append(
            "batching=packed: needs the lengths of all rows; use --batching tokens, or leave "
            "--streaming out"
        )
    if static_shapes:
        problems.append(
            "streaming=True: devices that want few shapes of batches need the lengths of all rows; "
            "leave --streaming out"
        )
    return problems


class StreamLoader:
    """This rank's micro-batches, ``accumulation`` for each step, without end.

    The rows of a step do not depend on the number of ranks, as with any other plan. If a step has
    fewer micro-batches, or a rank has no row in one, a filler row that carries no loss stands in.
    """

    batch_size = None

    def __init__(
        self,
        dataset: StreamedExamples,
        *,
        plan: Callable[[Any], EpochSampler],
        collate: Callable[[list[Any]], Any],
        rows_per_block: int,
        accumulation: int,
    ) -> None:
        """``plan`` makes this rank's sampler for rows with lengths."""
        self.dataset = dataset
        self._plan = plan
        self._collate = collate
        self._rows_per_block = rows_per_block
        self._accumulation = accumulation
        self._begins: list[tuple[int, BlockPlace]] = []
        self._start, self._skipped, self._first_step = BlockPlace(), 0, 0

    def go_on(self, position: Mapping[str, Any], step: int) -> None:
        """Start at a ``position`` that was saved after ``step`` optimizer steps."""
        self._start = BlockPlace.from_json(position)
        self._skipped = int(position["step"])
        self._first_step = step - self._skipped

    def position(self, step: int) -> dict[str, Any]:
        """The position after ``step`` optimizer steps, as JSON values."""
        known = [begin for begin in self._begins if begin[0] <= step]
        first, place = known[-1] if known else (self._first_step, self._start)
        return {**place.as_json(), "step": step - first}

    def __iter__(self) -> Iterator[Any]:
        step, skipped = self._first_step, self._skipped
        self._begins = []
        # Reading and tokenising a block takes as long as many batches, so it is prefetched.
        for block in prefetch(self.dataset.blocks(self._start, rows=self._rows_per_block), count=1):
            self._begins.append((step, block.start))
            sampler = self._plan(_Rows(block))
            sampler.set_epoch(block.start.epoch * BLOCKS_OF_EPOCH + block.start.block)
            rows = FillerRows(block)
            for number in range(sampler.steps):
                step += 1
                if skipped:
                    skipped -= 1
                    continue
                for batch in self._micro_batches(sampler, number):
                    yield self._collate(rows.__getitems__(batch))

    def _micro_batches(self, sampler: EpochSampler, step: int) -> Iterator[MicroBatch]:
        """This rank's micro-batches of a step, completed with filler rows."""
        batches = [batches[sampler.rank] for batches in sampler.divide(step)]
        filler = MicroBatch([~int(sampler.plan.rows(step)[-1])])
        missing = self._accumulation - len(batches)
        if missing < 0:
            raise RuntimeError(f"{len(batches)} micro-batches in a step of {self._accumulation}")
        return itertools.chain(batches, itertools.repeat(filler, missing))


class _Rows:
    """A block's lengths, as samplers read them."""

    def __init__(self, block: Block) -> None:
        self._lengths = block.lengths

    def __len__(self) -> int:
        return len(self._lengths[0])

    def __getitem__(self, row: int) -> dict[str, int]:
        source, target = (int(side[row]) for side in self._lengths)
        return {"source_length": source, "target_length": target}
