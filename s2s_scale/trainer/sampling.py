"""Which sampler the training arguments ask for."""

from __future__ import annotations

from typing import Any

from s2s_scale.arguments import TOKEN_OPTIONS, Seq2SeqTrainingArguments
from s2s_scale.data.batch_plan import (
    Lengths,
    default_buckets_per_step,
    default_tokens_per_step,
    row_lengths,
)
from s2s_scale.data.packing import PackedSampler
from s2s_scale.data.samplers import EpochSampler, PlanSampler, TokenSampler


def token_sizes(
    args: Seq2SeqTrainingArguments, lengths: Lengths, *, fixed_shapes: bool
) -> tuple[int, int]:
    """Tokens and groups of a step: as given, else what suits the data."""
    tokens = args.tokens_per_step or default_tokens_per_step(lengths)
    usual = default_buckets_per_step(lengths, tokens, fixed_shapes=fixed_shapes)
    return tokens, args.groups_per_step or usual


def make_sampler(
    args: Seq2SeqTrainingArguments,
    dataset: Any,
    *,
    rows_per_device: int,
    rank: int = 0,
    world_size: int = 1,
    num_buckets: int | None = None,
    rows_multiple: int = 1,
) -> EpochSampler:
    """One rank's sampler of the batching mode in ``args``. Every rank calls it with the same data.

    ``rows_per_device``: a device's rows in a micro-batch, where the mode counts rows.
    ``num_buckets``: the most shapes that batches may have; None: any. ``rows_multiple``: devices
    that share a rank's batches.

    Raises:
        UserError: the rows have no lengths, or the longest of them fits into no batch.
    """
    shared: dict[str, Any] = {
        "rank": rank,
        "world_size": world_size,
        "seed": args.plan_seed,
        "drop_last": args.dataloader_drop_last,
    }
    if args.batching in TOKEN_OPTIONS:
        lengths, per_device = row_lengths(dataset), args.max_tokens_per_device
        shared["max_tokens"] = None if per_device is None else per_device * rows_multiple
        shared["tokens_per_step"], groups = token_sizes(
            args, lengths, fixed_shapes=num_buckets is not None
        )
        shared["rows_multiple"] = rows_multiple
    if args.batching == "packed":
        return PackedSampler(
            lengths,
            tokens_per_row=args.tokens_per_row,
            one_shape=num_buckets is not None,
            **shared,
        )
    shared["num_buckets"] = num_buckets
    if args.batching == "tokens":
        return TokenSampler(lengths, groups_per_step=groups, **shared)
    needs_lengths = args.plan_mode == "sortish" or num_buckets is not None
    return PlanSampler(
        row_lengths(dataset) if needs_lengths else None,
        n_rows=len(dataset),
        mode=args.plan_mode,
        rows_per_device=rows_per_device * rows_multiple,
        accumulation=args.gradient_accumulation_steps,
        **shared,
    )
