"""Which rows come when: training by the batch plan, evaluation sorted by length."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import transformers
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers.trainer_utils import has_length, seed_worker

from s2s_scale.arguments import TOKEN_OPTIONS
from s2s_scale.config import DEFAULT_BUCKETS
from s2s_scale.data.batch_plan import row_lengths
from s2s_scale.data.collators import Collate, PackedCollator, PadToWidths, Seq2SeqCollator
from s2s_scale.data.packing import PackedSampler
from s2s_scale.data.plan_summary import PlanSummary, summarise
from s2s_scale.data.prefetch import ArrowRows, reads_from_arrow
from s2s_scale.data.samplers import EpochSampler, FillerRows, PlanBatchSampler, TokenSampler
from s2s_scale.data.streaming import StreamedExamples
from s2s_scale.errors import UserError
from s2s_scale.models import source_vocab_size
from s2s_scale.models.packed_attention import decoder_start
from s2s_scale.trainer.auto_batch import Trial, find_budget, keep, read_kept
from s2s_scale.trainer.loaders import EvaluationLoader, TrainingLoader, loader_options
from s2s_scale.trainer.meters import TrainingMeter
from s2s_scale.trainer.optimization import OptimizationTrainer
from s2s_scale.trainer.sampling import make_sampler, token_sizes
from s2s_scale.trainer.streaming import StreamLoader

_STOCK_COLLATORS = (
    transformers.DataCollatorForSeq2Seq,
    transformers.DataCollatorWithPadding,
    transformers.default_data_collator,
)
MEASURED_STEPS = 200
GRAPHS_PER_SHAPE = 2
"""In training and in evaluation, of each of a model's functions that torch.compile compiles."""


class BatchTrainer(OptimizationTrainer):
    """Makes the data loaders."""

    def _follows_plan(self, dataset: Any) -> bool:
        """Whether the batch plan decides; not for streams, nor for transformers' rebalancing."""
        rebalanced = self.args.train_sampling_strategy == "batch_rebalance"
        streamed = isinstance(dataset, IterableDataset) or not has_length(dataset)
        if streamed and self.args.batching != "fixed":
            raise UserError(
                f"batching={self.args.batching}: cannot take effect on a data set without a "
                "length (a stream); use --batching fixed, or a map-style data set"
            )
        if (streamed or rebalanced) and self.args.num_buckets is not None:
            raise UserError(
                f"num_buckets={self.args.num_buckets}: cannot take effect on "
                + ("a data set without a length (a stream)" if streamed else "batch_rebalance")
                + "; leave it out, or use a map-style data set and another sampling strategy"
            )
        return not (streamed or rebalanced)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        """This rank's training rows in the order of the batch plan.

        Every rank must call it with the same data set. A data set without a length gives None.
        """
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if dataset is None or not self._follows_plan(dataset):
            return super()._get_train_sampler(dataset)
        return make_sampler(
            self.args,
            dataset,
            rows_per_device=self._train_batch_size,
            rank=self.backend.collectives.rank,
            world_size=self.backend.collectives.world_size,
            num_buckets=self._num_buckets,
            rows_multiple=self.backend.rows_multiple,
        )

    @property
    def _num_buckets(self) -> int | None:
        """How many shapes the batches of a data set may have; None: any."""
        compiles = self.backend.static_shapes or (
            self.args.torch_compile and self.args.batching in TOKEN_OPTIONS
        )
        default = DEFAULT_BUCKETS if compiles else None
        return default if self.args.num_buckets is None else self.args.num_buckets

    def plan_summary(self) -> PlanSummary | None:
        """The shapes of training batches and their share of real tokens, as planned.

        Measured on some steps of an epoch; None where shapes are free or no plan was followed.
        """
        sampler = self._step_callback.sampler
        if sampler is None or sampler.lengths is None or self._num_buckets is None:
            return None
        return summarise(sampler, sampler.lengths, most_steps=MEASURED_STEPS)

    def get_total_train_batch_size(self, args: Any) -> int:
        """Rows of a step on all devices; with a budget of tokens, their mean."""
        sampler = self._step_callback.sampler
        if isinstance(sampler, (TokenSampler, PackedSampler)) and sampler.steps:
            return max(1, round(len(sampler.lengths[0]) / sampler.steps))
        rows: int = super().get_total_train_batch_size(args)
        return rows

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Micro-batches of this rank by the batch plan."""
        if isinstance(self.train_dataset, StreamedExamples):
            self._step_callback.sampler = None
            self._stream = self._stream_loader(self.train_dataset)
            return self._stream  # type: ignore[return-value]
        if self.train_dataset is None or not self._follows_plan(self.train_dataset):
            self._step_callback.sampler = None
            return super().get_train_dataloader()
        if self.args.auto_batch and self.args.max_tokens_per_device is None:
            self.args.max_tokens_per_device = self._find_budget()
        sampler = self._get_train_sampler()
        assert isinstance(sampler, EpochSampler)
        self._step_callback.sampler = sampler
        if self.args.torch_compile:
            self._allow_graphs()
        if sampler.accumulation != self.args.gradient_accumulation_steps:
            self.args.set_accumulation(sampler.accumulation)
        dataset, collate = self._model_columns(self.train_dataset, "training")
        workers = self.args.dataloader_num_workers
        return TrainingLoader(
            FillerRows(dataset),
            PlanBatchSampler(sampler),
            self._packing() if isinstance(sampler, PackedSampler) else self._padded(collate),
            worker_init_fn=partial(
                seed_worker, num_workers=workers, rank=self.backend.collectives.rank
            ),
            **loader_options(self.args),
        )

    def _allow_graphs(self) -> None:
        """Let torch.compile keep a graph for each shape; past its own bound it goes on uncompiled.

        Training and evaluation each have graphs of their own.
        """
        wanted = GRAPHS_PER_SHAPE * (self._num_buckets or DEFAULT_BUCKETS)
        from torch._dynamo import config as settings

        settings.recompile_limit = max(settings.recompile_limit, wanted)

    def _find_budget(self) -> int:
        """Padded tokens of the largest micro-batch that fits; every rank must call it.

        Kept in the output folder; found there, it is not looked for again.

        Raises:
            UserError: the backend cannot tell before training, or one row is too much.
        """
        if not self.backend.plain_backward:
            raise UserError(
                "auto_batch=True: cannot take effect here, since this backend lays out memory only "
                "when training begins; give --max_tokens_per_device"
            )
        lengths, args = row_lengths(self.train_dataset), self.args
        longest = (int(lengths[0].max(initial=1)), int(lengths[1].max(initial=1)))
        model, folder = self._plain_model(), Path(str(args.output_dir))
        key = {
            "longest row": list(longest),
            "parameters": sum(p.numel() for p in model.parameters()),
            "bf16": args.bf16,
            "device": args.device.type,
        }
        kept = read_kept(folder, key)
        if kept is None:
            fixed = self._num_buckets is not None
            tokens, groups = token_sizes(args, lengths, fixed_shapes=fixed)
            share = tokens // (groups * self.backend.collectives.world_size)
            trial = Trial(
                self._try_batch,
                list(model.parameters()),
                device=args.device,
                vocabulary=min(source_vocab_size(self.config), self.vocab_size),
            )
            kept = find_budget(2 * share, longest, lambda rows: trial.fits(rows, longest))
            self._meter = TrainingMeter(args.device)
        budget = min(self.backend.collectives.gather_objects(kept))
        if self.backend.collectives.rank == 0:
            keep(folder, key, budget)
            print(f"note: micro-batches of at most {budget} padded tokens", file=sys.stderr)
        return budget

    def _try_batch(self, batch: Mapping[str, Tensor]) -> None:
        """Forward and backward pass as in training; weights stay as they are."""
        self.model.train()
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            loss = self.compute_loss(self.model, dict(batch))
        loss.backward()
        self.backend.finish_step(self.model)

    def _stream_loader(self, dataset: StreamedExamples) -> StreamLoader:
        args, world_size = self.args, self.backend.collectives.world_size
        plan = partial(
            make_sampler,
            args,
            rows_per_device=self._train_batch_size,
            rank=self.backend.collectives.rank,
            world_size=world_size,
        )
        rows = dataset.buffer
        if args.batching == "tokens":
            assert args.groups_per_step is not None
            args.set_accumulation(args.groups_per_step)
        else:  # full steps only, but for the last of an epoch
            step = self._train_batch_size * args.gradient_accumulation_steps * world_size
            rows = max(1, rows // step) * step
        return StreamLoader(
            dataset,
            plan=plan,
            collate=self.data_collator,
            rows_per_block=rows,
            accumulation=args.gradient_accumulation_steps,
        )

    def _model_columns(self, dataset: Any, use: str) -> tuple[Any, Collate]:
        """Data set and collator without the columns that the model's forward does not take."""
        collate: Any = self.data_collator
        if isinstance(dataset, datasets.Dataset):
            kept = self._remove_unused_columns(dataset, description=use)
            # Collators of others may count on lists.
            ours = isinstance(collate, Seq2SeqCollator) and reads_from_arrow(kept)
            return ArrowRows(kept) if ours else kept, collate
        return dataset, self._get_collator_with_removed_columns(self.data_collator, use)

    def _can_pack(self) -> bool:
        own = self._computes_its_own_loss and self._collates_as_usual
        return own and self._no_packing_reason() is None

    @property
    def _collates_as_usual(self) -> bool:
        """Whether the collator pads token ids and does nothing else, as a subclass might."""
        known = (Seq2SeqCollator, *_STOCK_COLLATORS)
        return type(self.data_collator) in known or self.data_collator in known

    def _packing(self) -> Collate:
        """What lays pairs out in packed rows, in the place of the collator that pads them."""
        if not self._collates_as_usual:
            name = type(self.data_collator).__name__
            raise UserError(
                f"data_collator={name}: would not be called with batching=packed, which lays "
                "token ids out itself; expected Seq2SeqCollator or transformers' "
                "DataCollatorForSeq2Seq; use --batching tokens"
            )
        return PackedCollator(self._padding_id(), start=decoder_start(self.config))

    def _padded(self, collate: Collate) -> Collate:
        """The collator, with batches padded to the shape that was planned for them, if one was."""
        sides = (getattr(c, "padding_side", None) for c in (collate, self.processing_class))
        side = next((side for side in sides if side is not None), "right")
        pad = self._padding_id()
        return PadToWidths(collate, pad_token_id=pad, padding_side=side)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if dataset is None:
            raise ValueError("evaluation needs a data set: pass eval_dataset")
        return self._evaluation_loader(dataset, super().get_eval_dataloader, eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        return self._evaluation_loader(test_dataset, super().get_test_dataloader, test_dataset)

    def _evaluation_loader(
        self, dataset: Any, stock: Callable[[Any], DataLoader[Any]], given: Any
    ) -> DataLoader[Any]:
        """Batches sorted by length; the stock loader where results arrive batch by batch."""
        streamed = isinstance(dataset, IterableDataset) or not has_length(dataset)
        if streamed or self.args.batch_eval_metrics or not self.args.eval_do_concat_batches:
            return stock(given)
        if id(dataset) in self._evaluation_loaders:
            return self._evaluation_loaders[id(dataset)]
        rows, collate = self._model_columns(dataset, "evaluation")
        loader = EvaluationLoader(
            rows,
            self._padded(collate),
            source=dataset,
            rows_per_batch=self.args.eval_batch_size * self.backend.rows_multiple,
            num_buckets=self._num_buckets,
            max_tokens=self.args.eval_tokens_per_device,
            rank=self.backend.collectives.rank,
            world_size=self.backend.collectives.world_size,
            **loader_options(self.args),
        )
        if self.args.dataloader_persistent_workers:
            self._evaluation_loaders[id(dataset)] = loader
        return loader
