"""Evaluation: token-weighted losses, generated text, and results in the data's order.

Shapes: B rows of a batch, T target positions, L generation limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import EvalPrediction
from transformers.trainer_utils import EvalLoopOutput

from s2s_scale.arguments import Seq2SeqTrainingArguments
from s2s_scale.backends import Backend
from s2s_scale.data.batch_plan import (
    Lengths,
    Rows,
    deal_batches,
    evaluation_batches,
    has_length_columns,
    row_lengths,
)
from s2s_scale.data.buckets import ShapeGrid, Widths, choose_shapes
from s2s_scale.data.samplers import FillerRows, MicroBatch
from s2s_scale.errors import UserError
from s2s_scale.evaluation.text import in_data_order
from s2s_scale.generation.shrinking import generate
from s2s_scale.generation.static import StaticGenerator
from s2s_scale.loss.losses import TokenLoss
from s2s_scale.trainer.metrics import EvaluationMeter
from s2s_scale.utils import IGNORE_INDEX

if TYPE_CHECKING:
    from s2s_scale.evaluation.text import TextEvaluation
    from s2s_scale.generation.ctranslate2 import CTranslate2Engine

TextEvaluationFor = Callable[[Any, str], "TextEvaluation"]
"""(data set, metric prefix) -> what decodes, scores and writes the texts of that evaluation."""
MOST_ROWS = 4
"""A batch of short rows holds at most this many times ``per_device_eval_batch_size`` rows."""
ComputeMetrics = Callable[..., dict[str, float]]


class EvaluationLoader(DataLoader):  # type: ignore[type-arg]
    """This rank's batches of rows of similar length, longest first, within a token budget.

    Rows keep the data's order where their lengths are unknown without reading all of them.

    Attributes:
        rounds: for each batch the row ids of all ranks, rank after rank; ids below 0 stand for no
            row and fill up the last batches of some ranks.
        row_order: ``rounds`` in one array.
        source: the data set itself, whatever its rows are read through.
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
    """The most source and target tokens, pads included, of a rank's evaluation batch.

    If none is ``given``, as many as ``rows_per_batch`` of the longest rows have.

    Raises:
        UserError: the longest row exceeds the budget given.
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
    """At most ``num_buckets`` shapes, and the one that each round of batches is padded to.

    Without ``num_buckets`` both are None: batches are as wide as their longest row.
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


class EvaluationStopped(BaseException):
    """All ranks leave an evaluation between two batches, since the run was asked to stop."""


class Evaluation:
    """What one evaluation loop collects: sums of losses and, if wanted, generated text.

    Args:
        dataloader: the batches; texts need an ``EvaluationLoader``.
        text_evaluation_for: makes the ``TextEvaluation`` on rank 0; None: tokens are returned.
        prefix: of the metrics' names.
    """

    def __init__(
        self,
        backend: Backend,
        device: torch.device,
        dataloader: DataLoader[Any],
        text_evaluation_for: TextEvaluationFor | None = None,
        *,
        prefix: str = "eval",
    ) -> None:
        loader = dataloader if isinstance(dataloader, EvaluationLoader) else None
        self._backend = backend
        self._meter = EvaluationMeter(device)
        self._order = None if loader is None else loader.row_order
        self._prefix = prefix
        self._text: TextEvaluation | None = None
        self._rounds: Iterator[list[int]] | None = None
        if loader is not None and text_evaluation_for is not None:
            self._rounds = iter(loader.rounds)
            if backend.collectives.rank == 0:
                self._text = text_evaluation_for(loader.source, prefix)
                self._text.start(int((loader.row_order >= 0).sum()))

    @property
    def gathers_text(self) -> bool:
        """Whether generated rows go to a ``TextEvaluation`` and are not returned."""
        return self._rounds is not None

    def add_loss(self, sums: TokenLoss) -> None:
        """Add one batch's sums."""
        self._meter.add(sums)

    def next_rows(self) -> list[int] | None:
        """Row ids of all ranks' next batches, rank after rank; ids below 0 stand for no row.

        None if no text is gathered.
        """
        return None if self._rounds is None else next(self._rounds)

    def add_text(
        self, generated: Tensor, labels: Tensor | None, rows: list[int], *, padding: int
    ) -> None:
        """Gather all ranks' generated rows [B * R, T] of a batch on rank 0, which scores them.

        ``rows``: as ``next_rows`` gave them. Every rank must call it.
        """
        generated = self._backend.collectives.gather_rows(generated, padding)
        if labels is not None:
            labels = self._backend.collectives.gather_rows(labels, IGNORE_INDEX)
        if self._text is None:
            return
        real = [place for place, row in enumerate(rows) if row >= 0]
        returned = generated.view(len(rows), -1, generated.shape[-1])[real]
        self._text.add(
            [rows[place] for place in real],
            returned.flatten(0, 1),
            None if labels is None else labels[real],
        )

    def ordered(self, compute_metrics: ComputeMetrics | None) -> ComputeMetrics | None:
        """``compute_metrics`` that is called with rows in the data's order."""
        order = self._order
        if compute_metrics is None or order is None:
            return compute_metrics

        def compute_ordered(prediction: EvalPrediction) -> dict[str, float]:
            return compute_metrics(
                EvalPrediction(
                    predictions=in_data_order(prediction.predictions, order),
                    label_ids=in_data_order(prediction.label_ids, order),
                    inputs=in_data_order(prediction.inputs, order),
                    losses=prediction.losses,
                )
            )

        return compute_ordered

    def finish(self, output: EvalLoopOutput) -> EvalLoopOutput:
        """The loop's output with our metrics and with rows in the data's order.

        Every rank must call it, and gets all metrics.
        """
        collectives = self._backend.collectives
        own = self._meter.read(collectives.all_reduce_sum)
        text = self._text.finish() if self._text is not None else {}
        own |= collectives.gather_objects(text)[0]
        metrics = dict(output.metrics or {})
        metrics |= {f"{self._prefix}_{name}": value for name, value in own.items()}
        if self._order is None:
            return output._replace(metrics=metrics)
        return output._replace(
            metrics=metrics,
            predictions=in_data_order(output.predictions, self._order),
            label_ids=in_data_order(output.label_ids, self._order),
        )


class Generator:
    """Generates target rows with the engine chosen by ``generation_engine``.

    Args:
        args: the training arguments.
        padding_id: gives the token id that fills rows.
        pad_to: pads rows [B, T] to a length with it.
    """

    def __init__(
        self,
        args: Seq2SeqTrainingArguments,
        backend: Backend,
        *,
        padding_id: Callable[[], int],
        pad_to: Callable[[Tensor, int], Tensor],
    ) -> None:
        self._args, self._backend = args, backend
        self._padding_id, self._pad_to = padding_id, pad_to
        self._static: StaticGenerator | None = None
        self._static_model: Any = None
        self._engine: CTranslate2Engine | None = None

    def options(self, given: Mapping[str, Any], data_args: Any) -> dict[str, Any]:
        """Keywords for ``generate``; ``data_args`` fill in what call and arguments do not say."""
        options = dict(given)
        length = getattr(data_args, "evaluation_target_length", None) or getattr(
            data_args, "val_max_target_length", None
        )
        limited = options.get("max_length") or options.get("max_new_tokens")
        if length and not limited and self._args.generation_max_length is None:
            options["max_length"] = length
        beams = getattr(data_args, "eval_beams", None)
        if beams and not options.get("num_beams") and self._args.generation_num_beams is None:
            options["num_beams"] = beams
        return options

    @contextmanager
    def weights_of(self, model: Any, *, generates: bool) -> Iterator[None]:
        """Context of an evaluation of ``model`` with the weights that it has now."""
        if not generates or self._args.generation_engine != "ctranslate2":
            yield
            return
        from s2s_scale.generation.ctranslate2 import ctranslate2_engine

        with ctranslate2_engine(model) as self._engine:
            try:
                yield
            finally:
                self._engine = None

    def generate(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        options: Mapping[str, Any],
        rows: list[int] | None = None,
    ) -> Tensor:
        """``model.generate`` on a batch's source: [B * num_return_sequences, length].

        The result is in host memory if the device compiles every new shape. ``rows``: row ids of
        all ranks' batches, if known. Every rank must call it.
        """
        target_side = ("labels", "decoder_input_ids", "decoder_attention_mask")
        sources = {name: value for name, value in inputs.items() if name not in target_side}
        if self._engine is not None:
            return self._engine.generate(**sources, **options).to(self._args.device)
        with self._backend.generation(model) as extra:
            if not self._backend.static_shapes:
                generated: Tensor = generate(model, **sources, **{**extra, **options})
                return generated
            if self._static is None or self._static_model is not model:
                self._static_model = model
                self._static = StaticGenerator(
                    model, sync=self._backend.flush, to_host=self._backend.collectives.to_host
                )
            count, active = len(sources["input_ids"]), None
            if rows is not None:
                first = 0 if len(rows) == count else self._backend.collectives.rank * count
                active = torch.tensor(rows[first : first + count]) >= 0
            with self._backend.autocast():
                return self._static.generate(**sources, active=active, **{**extra, **options})

    def predict(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        options: Mapping[str, Any],
        evaluation: Evaluation | None,
        mean_loss: Callable[[], Tensor],
    ) -> tuple[Any, Any, Any]:
        """Loss, generated rows [B * R, L] and labels [B, L] of a batch. Every rank must call it.

        If ``evaluation`` gathers text, the rows go there and only the loss is returned, as with
        ``prediction_loss_only``. ``mean_loss`` computes the batch's loss.
        """
        options = {name: value for name, value in options.items() if value is not None}
        labels = inputs.get("labels")
        rows = evaluation.next_rows() if evaluation is not None else None
        generated = self.generate(model, inputs, options, rows)
        loss = None if labels is None else mean_loss()
        if evaluation is not None and rows is not None:
            if self._backend.static_shapes:
                labels = self.on_host(labels)
            evaluation.add_text(generated, labels, rows, padding=self._padding_id())
            return loss, None, None
        if self._args.prediction_loss_only:
            return loss, None, None
        length = generation_length(options, model.generation_config)
        # Labels too, as transformers pads them: scripts decode them without looking for -100.
        padded = None if labels is None else self._pad_to(labels, length)
        return loss, self._pad_to(generated, length), padded

    def on_host(self, values: Any) -> Any:
        """Tensors, alone or in tuples and lists, in host memory; None stays None."""
        if isinstance(values, (tuple, list)):
            return type(values)(self.on_host(value) for value in values)
        held = isinstance(values, Tensor) and values.device.type != "cpu"
        return self._backend.collectives.to_host(values) if held else values


def generation_length(options: Mapping[str, Any], settings: Any) -> int:
    """Tokens, the start token included, at which generation stops.

    ``settings``: the model's generation config, which ``options`` override.
    """
    if options.get("max_length"):
        return int(options["max_length"])
    new_tokens = options.get("max_new_tokens") or settings.max_new_tokens
    if new_tokens:
        return int(new_tokens) + 1
    return int(settings.max_length or 20)
