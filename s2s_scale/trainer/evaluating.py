"""Evaluation: token-weighted losses, generated text, and rows in the data's order.

Shapes used below: B rows, T target positions, L generation limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction
from transformers.trainer_utils import EvalLoopOutput

from s2s_scale.evaluation.text import in_data_order
from s2s_scale.generation.shrinking import generate
from s2s_scale.generation.static import StaticGenerator
from s2s_scale.trainer.batches import BatchTrainer
from s2s_scale.trainer.loaders import EvaluationLoader
from s2s_scale.trainer.meters import EvaluationMeter
from s2s_scale.utils import IGNORE_INDEX


class EvaluationTrainer(BatchTrainer):
    """Evaluates and predicts."""

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **gen_kwargs: Any,
    ) -> dict[str, float]:
        """Loss, NLL and metrics on a data set; ``gen_kwargs`` go to ``generate``.

        Every rank must call it. A dictionary of data sets is evaluated one by one, with the name
        in the metrics' prefix.
        """
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(chosen, dict):
            metrics: dict[str, float] = {}
            for name, part in chosen.items():
                prefix = f"{metric_key_prefix}_{name}"
                metrics |= self.evaluate(part, ignore_keys, prefix, **gen_kwargs)
            return metrics
        gen_kwargs = self._generation_defaults(gen_kwargs)
        with self._not_training():
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **gen_kwargs)

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        **gen_kwargs: Any,
    ) -> Any:
        """Predictions and metrics, rows in the data's order; ``gen_kwargs`` go to ``generate``."""
        gen_kwargs = self._generation_defaults(gen_kwargs)
        return super().predict(test_dataset, ignore_keys, metric_key_prefix, **gen_kwargs)

    def _generation_defaults(self, gen_kwargs: dict[str, Any]) -> dict[str, Any]:
        """``data_args`` fills in where neither the call nor the training arguments say."""
        options = dict(gen_kwargs)
        length = getattr(self.data_args, "evaluation_target_length", None) or getattr(
            self.data_args, "val_max_target_length", None
        )
        limited = options.get("max_length") or options.get("max_new_tokens")
        if length and not limited and self.args.generation_max_length is None:
            options["max_length"] = length
        beams = getattr(self.data_args, "eval_beams", None)
        if beams and not options.get("num_beams") and self.args.generation_num_beams is None:
            options["num_beams"] = beams
        return options

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """transformers' loop, with rows back in data order and token-weighted losses."""
        sorted_loader = dataloader if isinstance(dataloader, EvaluationLoader) else None
        self._evaluation_meter = EvaluationMeter(self.args.device)
        if sorted_loader is not None:
            self._start_text(sorted_loader, metric_key_prefix)
        stock_metrics, self.compute_metrics = (
            self.compute_metrics,
            self._ordered_metrics(sorted_loader),
        )
        try:
            with self._generation_engine(prediction_loss_only):
                output = super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
            metrics = dict(output.metrics or {})
            own = (
                self._evaluation_meter.read(self.backend.collectives.all_reduce_sum)
                | self._finish_text()
            )
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in own.items()}
        finally:
            self.compute_metrics = stock_metrics
            self._evaluation_meter = None
            self._text = None
            self._generates_text = False
        if sorted_loader is None:
            return output._replace(metrics=metrics)
        return output._replace(
            metrics=metrics,
            predictions=in_data_order(output.predictions, sorted_loader.row_order),
            label_ids=in_data_order(output.label_ids, sorted_loader.row_order),
        )

    @contextmanager
    def _generation_engine(self, prediction_loss_only: bool | None) -> Iterator[None]:
        """Context of an evaluation in which the engine that was asked for has these weights."""
        wanted = self.args.generation_engine == "ctranslate2" and self.args.predict_with_generate
        if not wanted or (prediction_loss_only and not self._generates_text):
            yield
            return
        from s2s_scale.generation.ctranslate2 import ctranslate2_engine

        with ctranslate2_engine(self.model) as self._engine:
            try:
                yield
            finally:
                self._engine = None

    def _start_text(self, loader: EvaluationLoader, prefix: str) -> None:
        if self.text_evaluation_for is None or not self.args.predict_with_generate:
            return
        self._generates_text = True
        self._evaluated_rows = iter(loader.rounds)
        if self.backend.collectives.rank == 0:
            self._text = self.text_evaluation_for(loader.source, prefix)
            self._text.start(int((loader.row_order >= 0).sum()))

    def _add_text(self, generated: Tensor, labels: Tensor | None, rows: list[int]) -> None:
        """Bring all ranks' generated rows [B * R, T] of a batch to rank 0, which scores them.

        ``rows``: the data rows of all ranks' batches; those below 0 stand for nothing.
        """
        generated = self.backend.collectives.gather_rows(generated, self._padding_id())
        if labels is not None:
            labels = self.backend.collectives.gather_rows(labels, IGNORE_INDEX)
        if self._text is None:
            return
        real = [place for place, row in enumerate(rows) if row >= 0]
        returned = generated.view(len(rows), -1, generated.shape[-1])[real]
        self._text.add(
            [rows[place] for place in real],
            returned.flatten(0, 1),
            None if labels is None else labels[real],
        )

    def _finish_text(self) -> dict[str, float]:
        """The text metrics, on every rank; empty where no text was generated."""
        metrics = self._text.finish() if self._text is not None else {}
        return self.backend.collectives.gather_objects(metrics)[0]

    def _ordered_metrics(
        self, loader: EvaluationLoader | None
    ) -> Callable[..., dict[str, float]] | None:
        """``compute_metrics`` of the user, called with rows in the data's order."""
        compute = self.compute_metrics
        if compute is None or loader is None:
            return compute
        order = loader.row_order

        def ordered(prediction: EvalPrediction) -> dict[str, float]:
            return compute(
                EvalPrediction(
                    predictions=in_data_order(prediction.predictions, order),
                    label_ids=in_data_order(prediction.label_ids, order),
                    inputs=in_data_order(prediction.inputs, order),
                    losses=prediction.losses,
                )
            )

        return ordered

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Any, Any, Tensor | None]:
        """Loss, generated tokens (or logits) and labels of one batch; every rank must call it.

        Generated tokens [B, L] and labels [B, L] are padded to the generation limit L. They lie in
        host memory where the device compiles every new shape: what follows has many of them.
        """
        found = self._predicted(model, inputs, prediction_loss_only, ignore_keys, gen_kwargs)
        if not self.backend.static_shapes:
            return found
        loss, outputs, labels = found
        return loss, self._on_host(outputs), self._on_host(labels)

    def _on_host(self, values: Any) -> Any:
        if isinstance(values, (tuple, list)):
            return type(values)(self._on_host(value) for value in values)
        held = isinstance(values, Tensor) and values.device.type != "cpu"
        return self.backend.collectives.to_host(values) if held else values

    def _predicted(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None,
        gen_kwargs: Mapping[str, Any],
    ) -> tuple[Any, Any, Tensor | None]:
        """As ``prediction_step``, where the model computed it."""
        generates = self.args.predict_with_generate and not prediction_loss_only
        if not generates and not self._generates_text:
            if prediction_loss_only and "labels" in inputs:
                return self._loss_alone(model, self._prepare_inputs(inputs)), None, None
            return super().prediction_step(
                model, inputs, prediction_loss_only, ignore_keys=ignore_keys
            )
        inputs = self._prepare_inputs(inputs)
        labels = inputs.get("labels")
        options = gen_kwargs or dict(getattr(self, "_gen_kwargs", {}))
        options = {name: value for name, value in options.items() if value is not None}
        rows = next(self._evaluated_rows) if self._generates_text else None
        generated = self._generate(inputs, options, rows)
        loss = None if labels is None else self._loss_alone(model, inputs)
        if rows is not None:
            if self.backend.static_shapes:
                labels = self._on_host(labels)
            self._add_text(generated, labels, rows)
            return loss, None, None
        if self.args.prediction_loss_only:
            return loss, None, None
        length = self._generation_length(options)
        generated = self._pad_tensors_to_max_len(generated, length)
        if labels is not None:
            # As transformers' does: scripts decode them without looking for -100.
            labels = self._pad_tensors_to_max_len(labels, length)
        return loss, generated, labels

    def _loss_alone(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Mean loss of one batch; no logits are asked for. Every rank must call it."""
        tokens = self._get_num_items_in_batch([inputs], self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, num_items_in_batch=tokens)
        return loss.detach().mean()

    def _generate(
        self, inputs: Mapping[str, Any], options: Mapping[str, Any], rows: list[int] | None
    ) -> Tensor:
        """``generate`` on a batch's source: [B * num_return_sequences, length].

        ``rows``: the data rows of all ranks' batches, where they are known.
        """
        target_side = ("labels", "decoder_input_ids", "decoder_attention_mask")
        sources = {name: value for name, value in inputs.items() if name not in target_side}
        if self._engine is not None:
            return self._engine.generate(**sources, **options).to(self.args.device)
        with self.backend.generation(self.model) as extra:
            if self.backend.static_shapes:
                return self._generate_statically(sources, {**extra, **options}, rows)
            generated: Tensor = generate(self.model, **sources, **{**extra, **options})
            return generated

    def _generate_statically(
        self, sources: Mapping[str, Any], options: Mapping[str, Any], rows: list[int] | None
    ) -> Tensor:
        """As ``_generate``, in few compiled graphs; in host memory."""
        if self._static_generator is None:
            self._static_generator = StaticGenerator(
                self.model, sync=self.backend.flush, fetch=self.backend.collectives.to_host
            )
        count = len(sources["input_ids"])
        active = None
        if rows is not None:
            first = 0 if len(rows) == count else self.backend.collectives.rank * count
            active = torch.tensor(rows[first : first + count]) >= 0
        with self.backend.autocast():
            return self._static_generator.generate(**sources, active=active, **options)

    def _generation_length(self, options: Mapping[str, Any]) -> int:
        """Tokens, the start token included, at which generation stops."""
        if options.get("max_length"):
            return int(options["max_length"])
        settings = self.model.generation_config
        new_tokens = options.get("max_new_tokens") or settings.max_new_tokens
        if new_tokens:
            return int(new_tokens) + 1
        return int(settings.max_length or 20)

    def _pad_tensors_to_max_len(self, tensor: Tensor, max_length: int) -> Tensor:
        """``tensor`` [B, T] padded on the right to [B, max_length]; a longer one stays as it is."""
        missing = max_length - tensor.shape[-1]
        pad = self._padding_id()
        return nn.functional.pad(tensor, (0, missing), value=pad) if missing > 0 else tensor
