"""Data loaders: training by the batch plan, evaluation sorted by length."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import PreTrainedConfig, TrainingArguments
from transformers.trainer_utils import has_length, seed_worker

from s2s_scale.arguments import TOKEN_OPTIONS, Seq2SeqTrainingArguments
from s2s_scale.backends import Backend
from s2s_scale.config import DEFAULT_BUCKETS
from s2s_scale.data.batch_plan import (
    Lengths,
    default_buckets_per_step,
    default_tokens_per_step,
    row_lengths,
)
from s2s_scale.data.collators import (
    Collate,
    PackedCollator,
    PadToWidths,
    Seq2SeqCollator,
    count_pads,
)
from s2s_scale.data.packing import PackedSampler
from s2s_scale.data.plan_summary import PlanSummary, summarise
from s2s_scale.data.prefetch import ArrowRows, reads_from_arrow
from s2s_scale.data.samplers import (
    EpochSampler,
    FillerRows,
    PlanBatchSampler,
    PlanSampler,
    TokenSampler,
)
from s2s_scale.data.streaming import StreamedExamples
from s2s_scale.errors import UserError
from s2s_scale.models import source_vocab_size, target_vocab_size
from s2s_scale.models.packed_attention import decoder_start
from s2s_scale.trainer.auto_batch import Trial, kept_or_found
from s2s_scale.trainer.compat import allow_graphs
from s2s_scale.trainer.evaluation import EvaluationLoader
from s2s_scale.trainer.metrics import TrainingMeter
from s2s_scale.trainer.run_state import Data, stream_position
from s2s_scale.trainer.streaming import StreamLoader

MEASURED_STEPS = 200
"""Of an epoch, for the summary of its plan."""
GRAPHS_PER_SHAPE = 2
"""In training and in evaluation, of each of a model's functions that torch.compile compiles."""
_STOCK_COLLATORS = (
    transformers.DataCollatorForSeq2Seq,
    transformers.DataCollatorWithPadding,
    transformers.default_data_collator,
)


def model_columns(
    dataset: Any,
    collate: Collate,
    drop: Callable[[Any], Any],
    dropping: Callable[[Collate], Collate],
) -> tuple[Any, Collate]:
    """Data set and collator without the columns that the model's forward does not take.

    ``drop`` removes them from a ``datasets.Dataset``; ``dropping`` wraps a collator so that it
    removes them from each row.
    """
    if not isinstance(dataset, datasets.Dataset):
        return dataset, dropping(collate)
    kept = drop(dataset)
    # Other collators may rely on lists.
    ours = isinstance(collate, Seq2SeqCollator) and reads_from_arrow(kept)
    return ArrowRows(kept) if ours else kept, collate


def pads_only(collate: Any) -> bool:
    """Whether a collator pads token ids and does nothing else, as a subclass might."""
    known = (Seq2SeqCollator, *_STOCK_COLLATORS)
    return type(collate) in known or collate in known


class TrainDataLoaders:
    """Makes the data loaders of one trainer.

    Args:
        args: the training arguments; what the data decide (micro-batches per step, tokens of a
            micro-batch) is set in them, so give a copy of the user's.
        backend: divides batches over devices.
        padding_id: gives the token id that fills rows.
        rows_per_device: gives the rows of a device's micro-batch, where the mode counts rows.
    """

    def __init__(
        self,
        args: Seq2SeqTrainingArguments,
        backend: Backend,
        *,
        padding_id: Callable[[], int],
        rows_per_device: Callable[[], int],
    ) -> None:
        self._args, self._backend = args, backend
        self._padding_id, self._rows_per_device = padding_id, rows_per_device
        self._evaluation_loaders: dict[int, EvaluationLoader] = {}
        self.train_sampler: EpochSampler | None = None
        """This rank's sampler, which holds the batch plan, once the training data are loaded."""
        self.stream: StreamLoader | None = None
        """The loader of the training data, once they are streamed."""

    @property
    def num_buckets(self) -> int | None:
        """The most shapes that the batches of a data set may have; None: no limit."""
        args = self._args
        compiles = self._backend.static_shapes or (
            args.torch_compile and args.batching in TOKEN_OPTIONS
        )
        default = DEFAULT_BUCKETS if compiles else None
        return default if args.num_buckets is None else args.num_buckets

    def follows_plan(self, dataset: Any) -> bool:
        """Whether batches follow the plan; streams and ``batch_rebalance`` do not.

        Raises:
            UserError: a setting needs a plan.
        """
        args = self._args
        rebalanced = args.train_sampling_strategy == "batch_rebalance"
        streamed = isinstance(dataset, IterableDataset) or not has_length(dataset)
        if streamed and args.batching != "fixed":
            raise UserError(
                f"batching={args.batching}: cannot take effect on a data set without a "
                "length (a stream); use --batching fixed, or a map-style data set"
            )
        if (streamed or rebalanced) and args.num_buckets is not None:
            raise UserError(
                f"num_buckets={args.num_buckets}: cannot take effect on "
                + ("a data set without a length (a stream)" if streamed else "batch_rebalance")
                + "; leave it out, or use a map-style data set and another sampling strategy"
            )
        return not (streamed or rebalanced)

    def sampler(self, dataset: Any) -> EpochSampler:
        """This rank's sampler by the batch plan. Every rank must call it with the same data set."""
        return make_sampler(
            self._args,
            dataset,
            rows_per_device=self._rows_per_device(),
            rank=self._backend.collectives.rank,
            world_size=self._backend.collectives.world_size,
            num_buckets=self.num_buckets,
            rows_multiple=self._backend.rows_multiple,
        )

    def planned(
        self,
        rows: Dataset[Any],
        sampler: EpochSampler,
        padded: Collate,
        packing: Callable[[], Collate],
    ) -> DataLoader[Any]:
        """This rank's micro-batches, in the order of the plan.

        ``padded`` makes batches of rows that hold one pair each, what ``packing`` gives makes
        packed ones.
        """
        self.train_sampler = sampler
        if self._args.torch_compile:
            # Past its own bound torch.compile goes on uncompiled.
            allow_graphs(GRAPHS_PER_SHAPE * (self.num_buckets or DEFAULT_BUCKETS))
        self._set_accumulation(sampler.accumulation)
        return DataLoader(
            FillerRows(rows),
            batch_sampler=PlanBatchSampler(sampler),
            collate_fn=packing() if isinstance(sampler, PackedSampler) else padded,
            worker_init_fn=partial(
                seed_worker,
                num_workers=self._args.dataloader_num_workers,
                rank=self._backend.collectives.rank,
            ),
            **loader_options(self._args),
        )

    def streamed(self, dataset: StreamedExamples, collate: Collate) -> StreamLoader:
        """This rank's micro-batches from a stream."""
        args, world_size = self._args, self._backend.collectives.world_size
        rows, rows_per_device = dataset.buffer, self._rows_per_device()
        if args.batching == "tokens":
            assert args.groups_per_step is not None, "settle_token_sizes has filled it in"
            self._set_accumulation(args.groups_per_step)
        else:  # full steps only, but for the last of an epoch
            step = rows_per_device * args.gradient_accumulation_steps * world_size
            rows = max(1, rows // step) * step
        plan = partial(
            make_sampler,
            args,
            rows_per_device=rows_per_device,
            rank=self._backend.collectives.rank,
            world_size=world_size,
        )
        self.stream = StreamLoader(
            dataset,
            plan=plan,
            collate=collate,
            rows_per_block=rows,
            accumulation=args.gradient_accumulation_steps,
        )
        return self.stream

    def enter_stream(self, checkpoint: Path) -> None:
        """Let the stream, if there is one, start where ``checkpoint`` left it.

        Raises:
            UserError: the checkpoint is that of a run without a stream.
        """
        if self.stream is not None:
            self.stream.go_on(*stream_position(checkpoint))

    def forget_training(self) -> None:
        """Forget the training data that were loaded last."""
        self.train_sampler = self.stream = None

    def _set_accumulation(self, micro_batches: int) -> None:
        if micro_batches != self._args.gradient_accumulation_steps:
            self._args.set_accumulation(micro_batches)

    def padded(self, collate: Collate, *sides_from: Any) -> Collate:
        """``collate``, with batches padded to the shape planned for them, if any.

        The padding side is that of ``collate``, else of the first of ``sides_from`` that has one,
        else right.
        """
        sides = (getattr(source, "padding_side", None) for source in (collate, *sides_from))
        side = next((side for side in sides if side is not None), "right")
        return PadToWidths(collate, pad_token_id=self._padding_id(), padding_side=side)

    def packing(self, collate: Collate, config: PreTrainedConfig) -> Collate:
        """A collator that packs several pairs into a row, in place of ``collate``.

        Raises:
            UserError: ``collate`` does more than pad.
        """
        if not pads_only(collate):
            raise UserError(
                f"data_collator={type(collate).__name__}: would not be called with "
                "batching=packed, which lays token ids out itself; expected Seq2SeqCollator or "
                "transformers' DataCollatorForSeq2Seq; use --batching tokens"
            )
        return PackedCollator(self._padding_id(), start=decoder_start(config))

    def evaluation(
        self,
        dataset: Any,
        columns: Callable[[], tuple[Dataset[Any], Collate]],
        stock: Callable[[], DataLoader[Any]],
    ) -> DataLoader[Any]:
        """Batches of rows of similar length; with persistent workers, the same loader each time.

        ``columns`` gives rows and collator. ``stock`` makes transformers' loader, used for streams
        and where results are wanted batch by batch.
        """
        streamed = isinstance(dataset, IterableDataset) or not has_length(dataset)
        if streamed or self._args.batch_eval_metrics or not self._args.eval_do_concat_batches:
            return stock()
        if id(dataset) in self._evaluation_loaders:
            return self._evaluation_loaders[id(dataset)]
        rows, collate = columns()
        loader = EvaluationLoader(
            rows,
            collate,
            source=dataset,
            rows_per_batch=self._args.eval_batch_size * self._backend.rows_multiple,
            num_buckets=self.num_buckets,
            max_tokens=self._args.eval_tokens_per_device,
            rank=self._backend.collectives.rank,
            world_size=self._backend.collectives.world_size,
            **loader_options(self._args),
        )
        if self._args.dataloader_persistent_workers:
            self._evaluation_loaders[id(dataset)] = loader
        return loader

    def data(self, dataset: Any, tokenizer: Any) -> Data:
        """What the run trains on and in which order, as far as that is known by now."""
        streamed = isinstance(dataset, StreamedExamples)
        planned = dataset is not None and (streamed or self.follows_plan(dataset))
        rows = dataset if planned else None
        return Data(rows, tokenizer, self.train_sampler, self.stream, self._rows_per_device())

    def rows_per_step(self) -> int | None:
        """Mean number of rows of a step on all devices; None where steps are not cut by tokens."""
        sampler = self.train_sampler
        if not isinstance(sampler, (TokenSampler, PackedSampler)) or not sampler.steps:
            return None
        return max(1, round(len(sampler.lengths[0]) / sampler.steps))

    def plan_summary(self) -> PlanSummary | None:
        """The shapes of training batches and their share of real tokens, as planned.

        Measured on some steps of an epoch; None where shapes are free or no plan was followed.
        """
        sampler = self.train_sampler
        if sampler is None or sampler.lengths is None or self.num_buckets is None:
            return None
        return summarise(sampler, sampler.lengths, most_steps=MEASURED_STEPS)

    def settle_micro_batches(
        self, dataset: Any, model: Any, train: Callable[[Mapping[str, Tensor]], Any]
    ) -> None:
        """Set ``max_tokens_per_device`` to the most that fits (``--auto_batch``), by trial.

        ``model``: without its wrappers. ``train``: forward and backward pass over a batch. Every
        rank must call it.

        Raises:
            UserError: the backend cannot tell before training, or not even one row fits.
        """
        if not self._backend.plain_backward:
            raise UserError(
                "auto_batch=True: cannot take effect here, since this backend lays out memory only "
                "when training begins; give --max_tokens_per_device"
            )
        lengths, args, collectives = row_lengths(dataset), self._args, self._backend.collectives
        ids = min(source_vocab_size(model.config), target_vocab_size(model.config))
        parameters = list(model.parameters())
        trial = Trial(train, parameters, device=args.device, vocabulary=ids)
        tokens, groups = token_sizes(args, lengths, fixed_shapes=self.num_buckets is not None)
        args.max_tokens_per_device = kept_or_found(
            trial,
            folder=Path(str(args.output_dir)),
            longest=(int(lengths[0].max(initial=1)), int(lengths[1].max(initial=1))),
            largest=2 * (tokens // (groups * collectives.world_size)),
            gather_objects=collectives.gather_objects,
            main=collectives.rank == 0,
            bf16=args.bf16,
        )


class StepBatches:
    """Takes the micro-batches of each optimizer step from an iterator that is prefetched.

    Args:
        place_batches: moves the batches of (number, batch) pairs to the device, ahead of the step.
        count_tokens: target tokens of a batch; None if it has no labels.
    """

    def __init__(
        self,
        place_batches: Callable[[Iterator[tuple[int, Any]]], Iterator[tuple[int, Any]]],
        count_tokens: Callable[[Mapping[str, Any]], Tensor | None],
    ) -> None:
        self._place_batches, self._count_tokens = place_batches, count_tokens
        self._source: Iterator[Any] | None = None
        self._placed: Iterator[tuple[int, Any]] = iter(())
        self._pads: deque[tuple[int, int]] = deque()

    def take(
        self, source: Iterator[Any], count: int, meter: TrainingMeter
    ) -> tuple[list[Any], int | None]:
        """The next ``count`` micro-batches, placed, and their target tokens on this rank.

        The tokens are None if batches have no labels. ``source`` is prefetched until ``end`` is
        called or another one is given. ``meter`` counts the time spent waiting, and the pads.
        """
        started = time.perf_counter()
        if source is not self._source:
            self._source = source
            self._pads.clear()
            self._placed = self._place_batches(self._counted(source))
        pairs = list(itertools.islice(self._placed, count))
        meter.wait(time.perf_counter() - started)
        for _ in pairs:
            meter.count_pads(*self._pads.popleft())
        labelled = bool(pairs) and "labels" in pairs[0][1]
        return [batch for _, batch in pairs], sum(n for n, _ in pairs) if labelled else None

    def _counted(self, batches: Iterator[Any]) -> Iterator[tuple[int, Any]]:
        """(target tokens, batch) pairs, counted in the thread that makes the batches."""
        for batch in batches:
            self._pads.append(count_pads(batch))
            tokens = self._count_tokens(batch)
            yield 0 if tokens is None else int(tokens), batch

    def end(self) -> None:
        """Stop prefetching."""
        self._source, self._placed = None, iter(())


def loader_options(args: TrainingArguments) -> dict[str, Any]:
    """The ``dataloader_*`` training flags as keywords of torch's ``DataLoader``.

    The loader has a generator of its own: drawing worker seeds from the global one would make
    dropout depend on how often a loader was started.
    """
    return {
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory and torch.cuda.is_available(),
        "persistent_workers": args.dataloader_persistent_workers,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "generator": torch.Generator().manual_seed(args.seed),
    }


def token_sizes(
    args: Seq2SeqTrainingArguments, lengths: Lengths, *, fixed_shapes: bool
) -> tuple[int, int]:
    """``tokens_per_step`` and ``groups_per_step`` as given, else what suits the data."""
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
    """One rank's sampler in the batching mode of ``args``. Every rank must pass the same data.

    ``rows_per_device``: rows of a device's micro-batch, if the mode counts rows. ``num_buckets``:
    the most shapes that batches may have; None: no limit. ``rows_multiple``: devices that share a
    rank's batches.

    Raises:
        UserError: the rows have no lengths, or the longest row fits into no batch.
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
