"""Evaluation: token-weighted losses, generated text, and results in the data's order.

Shapes: B rows of a batch, T target positions, L generation limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedConfig
from transformers.trainer_utils import EvalLoopOutput

from s2s_scale.arguments import Seq2SeqTrainingArguments
from s2s_scale.backends import Backend
from s2s_scale.errors import UserError, raise_problems
from s2s_scale.evaluation.text import in_data_order
from s2s_scale.generation.engines import family_problems
from s2s_scale.generation.shrinking import generate
from s2s_scale.generation.static import StaticGenerator
from s2s_scale.loss.losses import TokenLoss
from s2s_scale.trainer.dataloaders import EvaluationLoader
from s2s_scale.trainer.metrics import EvaluationMeter
from s2s_scale.utils import IGNORE_INDEX

if TYPE_CHECKING:
    from s2s_scale.evaluation.text import TextEvaluation
    from s2s_scale.generation.ctranslate2 import CTranslate2Engine

TextEvaluationFor = Callable[[Any, str], "TextEvaluation"]
"""(data set, metric prefix) -> what decodes, scores and writes the texts of that evaluation."""
ComputeMetrics = Callable[..., dict[str, float]]


class EvaluationStopped(BaseException):
    """All ranks leave an evaluation between two batches, since the run was asked to stop."""


class Evaluation:
    """What one evaluation loop gathers: sums of losses, and texts where those are wanted.

    Args:
        loader: the batches, if they are sorted by length; texts need that.
        text_evaluation_for: makes, on rank 0, what the texts go to; None: tokens are returned.
        prefix: of the metrics' names.
    """

    def __init__(
        self,
        backend: Backend,
        device: torch.device,
        loader: EvaluationLoader | None,
        *,
        text_evaluation_for: TextEvaluationFor | None = None,
        prefix: str = "eval",
    ) -> None:
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
        """Data rows of all ranks' next batches, rank after rank; ids below 0 stand for nothing.

        None where no text is gathered.
        """
        return None if self._rounds is None else next(self._rounds)

    def add_text(
        self, generated: Tensor, labels: Tensor | None, rows: list[int], *, padding: int
    ) -> None:
        """Bring all ranks' generated rows [B * R, T] of a batch to rank 0, which scores them.

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
        """``compute_metrics``, called with rows in the data's order."""
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
    """Generates the target rows of batches, by the engine that was asked for.

    Args:
        engine: ``generation_engine`` of the training arguments.
    """

    def __init__(self, backend: Backend, device: torch.device, *, engine: str) -> None:
        self._backend, self._device, self._engine_name = backend, device, engine
        self._static: StaticGenerator | None = None
        self._static_model: Any = None
        self._engine: CTranslate2Engine | None = None

    @contextmanager
    def weights_of(self, model: nn.Module, *, wanted: bool) -> Iterator[None]:
        """Context of an evaluation of ``model`` as it is; ``wanted``: it generates."""
        if not wanted or self._engine_name != "ctranslate2":
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

        In host memory where the device compiles every new shape. ``rows``: the data rows of all
        ranks' batches, where they are known. Every rank must call it.
        """
        target_side = ("labels", "decoder_input_ids", "decoder_attention_mask")
        sources = {name: value for name, value in inputs.items() if name not in target_side}
        if self._engine is not None:
            return self._engine.generate(**sources, **options).to(self._device)
        with self._backend.generation(model) as extra:
            if not self._backend.static_shapes:
                generated: Tensor = generate(model, **sources, **{**extra, **options})
                return generated
            if self._static is None or self._static_model is not model:
                self._static_model = model
                self._static = StaticGenerator(
                    model, sync=self._backend.flush, fetch=self._backend.collectives.to_host
                )
            count, active = len(sources["input_ids"]), None
            if rows is not None:
                first = 0 if len(rows) == count else self._backend.collectives.rank * count
                active = torch.tensor(rows[first : first + count]) >= 0
            with self._backend.autocast():
                return self._static.generate(**sources, active=active, **{**extra, **options})

    def on_host(self, values: Any) -> Any:
        """Tensors, alone or in tuples and lists, in host memory; None stays None."""
        if isinstance(values, (tuple, list)):
            return type(values)(self.on_host(value) for value in values)
        held = isinstance(values, Tensor) and values.device.type != "cpu"
        return self._backend.collectives.to_host(values) if held else values


def generation_defaults(
    given: Mapping[str, Any], *, length: int | None, beams: int | None
) -> dict[str, Any]:
    """Keywords for ``generate``: those ``given``, with length and beams where they are not."""
    options = dict(given)
    if length and not (options.get("max_length") or options.get("max_new_tokens")):
        options["max_length"] = length
    if beams and not options.get("num_beams"):
        options["num_beams"] = beams
    return options


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


def check_evaluation(
    args: Seq2SeqTrainingArguments, config: PreTrainedConfig, *, static_shapes: bool
) -> None:
    """Refuse settings of evaluation that cannot take effect.

    Raises:
        UserError: one line for each.
    """
    if args.generation_engine == "ctranslate2":
        raise_problems(family_problems(config.model_type))
        if static_shapes:
            raise UserError(
                "generation_engine=ctranslate2: runs on CPUs and GPUs only; leave "
                "--generation_engine out, or evaluate under another profile"
            )
    if static_shapes and args.eval_tokens_per_device is not None:
        raise UserError(
            f"eval_tokens_per_device={args.eval_tokens_per_device}: has no effect where the "
            "device wants few shapes of batches; use --per_device_eval_batch_size"
        )
