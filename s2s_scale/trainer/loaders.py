"""Data loaders for training by the batch plan and for evaluation sorted by length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import TrainingArguments

from s2s_scale.data.batch_plan import (
    Lengths,
    Rows,
    deal_batches,
    evaluation_batches,
    has_length_columns,
    row_lengths,
)
from s2s_scale.data.buckets import ShapeGrid, Widths, choose_shapes
from s2s_scale.data.samplers import FillerRows, MicroBatch, PlanBatchSampler
from s2s_scale.errors import UserError

MOST_ROWS = 4
"""An evaluation batch of short rows has at most so many times ``per_device_eval_batch_size``."""


def loader_options(args: TrainingArguments) -> dict[str, Any]:
    """The ``dataloader_*`` training flags as keywords of torch's ``DataLoader``.

    The generator is the loader's own: drawing worker seeds from the global one would make dropout
    depend on how often a loader was started.
    """
    return {
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory and torch.cuda.is_available(),
        "persistent_workers": args.dataloader_persistent_workers,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "generator": torch.Generator().manual_seed(args.seed),
    }


class TrainingLoader(DataLoader):  # type: ignore[type-arg]
    """Micro-batches of this rank, in the order of the plan."""

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: PlanBatchSampler,
        collate: Callable[[list[Any]], Any],
        **options: Any,
    ) -> None:
        super().__init__(dataset, batch_sampler=sampler, collate_fn=collate, **options)


class EvaluationLoader(DataLoader):  # type: ignore[type-arg]
    """This rank's batches of rows of like length, longest first, within a budget of tokens.

    Rows come in the data's order where their lengths are not to be had without reading them all.
    ``rounds`` holds the row ids of all ranks, rank after rank, batch after batch; ids below 0 fill
    up the last batches of some ranks and stand for no row. ``row_order`` is all of them in a row.
    """

    rounds: list[list[int]]
    row_order: np.ndarray
    source: Dataset[Any]

    def __init__(
        self,
        dataset: Dataset[Any],
        collate: Callable[[list[Any]], Any],
        *,
        source: Dataset[Any],
        rows_per_batch: int,
        rank: int,
        world_size: int,
        num_buckets: int | None = None,
        max_tokens: int | None = None,
        **options: Any,
    ) -> None:
        """``rows_per_batch``: of one rank; ``max_tokens``: see ``_budget``."""
        n_rows = len(source)  # type: ignore[arg-type]
        known = num_buckets is not None or max_tokens is not None or has_length_columns(source)
        lengths = row_lengths(source) if known else None
        if num_buckets is None and lengths is not None and n_rows:
            max_tokens = _budget(lengths, rows_per_batch=rows_per_batch, given=max_tokens)
            most_rows = MOST_ROWS * rows_per_batch
        else:
            max_tokens, most_rows = None, rows_per_batch
        batches = evaluation_batches(
            lengths,
            n_rows=n_rows,
            rows_per_batch=most_rows,
            max_tokens=max_tokens,
            world_size=world_size,
        )
        full = None if num_buckets is None else rows_per_batch
        dealt = deal_batches(batches, world_size=world_size, rows_per_rank=full)
        self.grid, widths = _widths_of_rounds(dealt, lengths, num_buckets)
        super().__init__(
            FillerRows(dataset),
            batch_sampler=[
                MicroBatch(shares[rank].tolist(), width)
                for shares, width in zip(dealt, widths, strict=True)
            ],
            collate_fn=collate,
            **options,
        )
        rounds = [np.concatenate(shares) for shares in dealt]
        self.rounds = [rows.tolist() for rows in rounds]
        self.row_order = np.concatenate(rounds) if rounds else np.empty(0, dtype=np.int64)
        self.source = source


def _budget(lengths: Lengths, *, rows_per_batch: int, given: int | None) -> int:
    """Source and target tokens, pads included, of a rank's evaluation batch.

    Where none is ``given``: what ``rows_per_batch`` of the longest rows have.

    Raises:
        UserError: the longest row has more than were given.
    """
    longest = int((lengths[0].astype(np.int64) + lengths[1]).max())
    if given is None:
        return rows_per_batch * sum(int(side.max()) for side in lengths)
    if given < longest:
        raise UserError(
            f"eval_tokens_per_device={given}: expected at least {longest}, the source and target "
            "tokens of the longest row; raise --eval_tokens_per_device, or lower "
            "--max_source_length or --val_max_target_length"
        )
    return given


def _widths_of_rounds(
    rounds: list[list[Rows]], lengths: Lengths | None, num_buckets: int | None
) -> tuple[ShapeGrid | None, list[Widths | None]]:
    """The shapes of the batches, and which one each round of batches is padded to.

    With a ``num_buckets`` at most so many; without one, None: the longest rows decide.
    """
    if num_buckets is None or lengths is None or not rounds:
        return None, [None] * len(rounds)
    rows = [np.concatenate(shares) for shares in rounds]
    real = [ids[ids >= 0] for ids in rows]
    source, target = (
        np.array([side[ids].max() for ids in real], dtype=np.int32) for side in lengths
    )
    grid = choose_shapes((source, target), num_buckets=num_buckets)
    return grid, [grid.widths[number] for number in grid.fit((source, target))]
