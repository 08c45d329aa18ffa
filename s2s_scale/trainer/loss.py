"""The loss: three modes, and one divisor for the whole optimizer step.

Shapes used below: B rows, T target positions, V target vocabulary.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import Seq2SeqLMOutput

from s2s_scale.data.collators import SEGMENT_IDS, count_pads
from s2s_scale.errors import UserError
from s2s_scale.loss.losses import TokenLoss, count_tokens, cross_entropy, mask_pads, of_model_mean
from s2s_scale.models import LossHead, decoder_inputs_from_labels, loss_head_problem
from s2s_scale.models.packed_attention import PackedModel, packing_problem
from s2s_scale.trainer.base import TrainerBase


class LossTrainer(TrainerBase):
    """Computes, scales and logs the loss."""

    _builds_logits = True
    """Whether logits are wanted beside the loss; only ``compute_loss`` can know that not."""
    _loss_head: LossHead | None = None

    _packed_model: PackedModel | None = None

    def _check_loss(self) -> None:
        if self.args.batching == "packed" and (reason := self._no_packing_reason()):
            raise UserError(
                f"batching=packed: cannot take effect, since {reason}; use --batching tokens"
            )
        if self.args.linear_cross_entropy == "on" and (reason := self._logits_reason()):
            raise UserError(
                f"linear_cross_entropy=on: cannot take effect, since {reason}; expected auto or "
                "off here; leave --linear_cross_entropy out"
            )

    def _logits_reason(self) -> str | None:
        """Why each loss here is computed from whole logits; None where it need not be."""
        if self.args.linear_cross_entropy == "off":
            return "it is switched off"
        if self._loss_mode == "model":
            return "the model computes its own loss (no smoothing, no exclusion of pads)"
        if self.compute_loss_func is not None:
            return "compute_loss_func takes the model's outputs"
        if type(self)._compute_loss is not LossTrainer._compute_loss:
            return f"{type(self).__name__} has a _compute_loss of its own, which may read logits"
        if self.args.n_gpu > 1:
            return "DataParallel copies the model to several devices within the process"
        return loss_head_problem(self._plain_model())

    def _no_packing_reason(self) -> str | None:
        """Why pairs cannot share rows here; None where they can."""
        if self.compute_loss_func is not None:
            return "compute_loss_func takes outputs of one pair a row"
        if self.args.torch_compile:
            return "torch_compile would compile each step anew: masks are put in for one call"
        if self.args.n_gpu > 1:
            return "DataParallel copies the model to several devices within the process"
        return packing_problem(self._plain_model())

    def _plain_model(self) -> Any:
        """The model within all wrappers; autocast around its forward stays."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _head(self) -> LossHead | None:
        """What lets the model's forward pass end in the loss; None where logits must be built."""
        if self._builds_logits:
            return None
        model = self._plain_model()
        if self._loss_head is None or self._loss_head.model is not model:
            if self._logits_reason() is not None:
                return None
            self._loss_head = LossHead(
                model,
                smoothing=self.args.label_smoothing or 0.0,
                static_shapes=self.backend.static_shapes,
                compiled=self.args.torch_compile,
            )
        return self._loss_head

    def _targets(self, labels: Tensor) -> Tensor:
        """Labels [B, T] with -100 wherever this loss mode counts no target."""
        if self._loss_mode == "model":
            return labels
        return mask_pads(labels, self.config.pad_token_id, self.config.eos_token_id)

    def _with_decoder_inputs(self, inputs: Mapping[str, Any], labels: Tensor) -> dict[str, Any]:
        """Model inputs without labels but with decoder inputs, derived from labels if absent."""
        model_inputs = {name: value for name, value in inputs.items() if name != "labels"}
        if model_inputs.get("decoder_input_ids") is None:
            plain = self.accelerator.unwrap_model(self.model)
            # A module that came with a config of its own need not carry it as an attribute.
            source = plain if hasattr(plain, "config") else SimpleNamespace(config=self.config)
            model_inputs["decoder_input_ids"] = decoder_inputs_from_labels(
                source, labels, self._padding_id()
            )
        return model_inputs

    def _token_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], labels: Tensor
    ) -> tuple[TokenLoss, Tensor | None]:
        """Sums over one batch's targets, and the logits [B, T, V] if they were built."""
        with self._masked(self._with_decoder_inputs(inputs, labels)) as model_inputs:
            if self._loss_mode == "model":
                loss, logits = model(**model_inputs, labels=labels, use_cache=False)[:2]
                return of_model_mean(loss, labels), logits
            targets, head = self._targets(labels), self._head()
            if head is not None:
                with head.ends_in_loss(targets):
                    return head.read(model(**model_inputs, use_cache=False)[0], targets), None
            logits = model(**model_inputs, use_cache=False)[0]
            smoothing = self.args.label_smoothing or 0.0
            return cross_entropy(logits, targets, smoothing=smoothing), logits

    @contextmanager
    def _masked(self, inputs: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        """The inputs as the model takes them; for packed rows with the masks of their pairs."""
        if SEGMENT_IDS[0] not in inputs:
            yield inputs
            return
        if self._packed_model is None or self._packed_model.model is not self._plain_model():
            self._packed_model = PackedModel(self._plain_model())
        left_out = {*SEGMENT_IDS, "attention_mask"}
        plain = {name: value for name, value in inputs.items() if name not in left_out}
        with self._packed_model.packs(*(inputs[name] for name in SEGMENT_IDS)) as masks:
            yield {**plain, **masks}

    def _compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], labels: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Loss and logits [B, T, V] of one batch.

        The loss is the mean over the batch's target tokens, or their sum with
        ``loss_reduction="sum"``. Override this to train with another loss per token: what it gets
        from ``super()`` then always holds logits. They are None only where ``compute_loss`` was
        not asked for outputs and linear cross entropy has computed the loss without them.
        """
        part, logits = self._token_loss(model, inputs, labels)
        self._batch_nll = part.nll
        if self.args.loss_reduction == "sum":
            return part.loss, logits
        return part.loss / part.tokens.clamp(min=1), logits

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """A batch's share of its step's loss: summed over the batch, divided by the step's tokens.

        ``num_items_in_batch`` is the number of target tokens of the whole step (all micro-batches,
        all ranks); without it the batch's own number is used. The shares add up to the step's
        loss on any number of ranks and micro-batches.
        """
        if "labels" not in inputs:
            raise ValueError(
                f"a batch needs labels to have a loss; it has: {', '.join(inputs)}; let the "
                "collator return 'labels'"
            )
        labels = inputs["labels"]
        if self.compute_loss_func is not None:
            inputs = {**self._with_decoder_inputs(inputs, labels), "labels": labels}
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._batch_nll = None
        self._builds_logits = return_outputs
        try:
            loss, logits = self._compute_loss(model, inputs, labels)
        finally:
            self._builds_logits = True
        tokens = count_tokens(self._targets(labels))
        share = torch.ones_like(loss)
        if self.args.loss_reduction == "mean" and num_items_in_batch is not None:
            share = tokens / torch.as_tensor(num_items_in_batch, device=tokens.device)
        self._note(loss, tokens, num_items_in_batch)
        # Ranks average their gradients; the shares must add up instead.
        loss = loss * share * self.backend.averaged_ranks
        return (loss, Seq2SeqLMOutput(loss=loss, logits=logits)) if return_outputs else loss

    def _note(self, loss: Tensor, tokens: Tensor, step_tokens: Tensor | int | None) -> None:
        """Keep a batch's sums for the next log: training or evaluation, whichever is running."""
        mean = self.args.loss_reduction == "mean"
        total = loss.detach() * tokens if mean else loss.detach()
        # A subclass with a `_compute_loss` of its own may know no other loss than the one it gives.
        nll = total if self._batch_nll is None else self._batch_nll
        if self._evaluation_meter is not None:
            self._evaluation_meter.add(TokenLoss(total, nll, tokens))
        elif self.is_in_train:
            divisor = tokens.clamp(min=1) if step_tokens is None else step_tokens
            self._meter.add(nll / divisor)

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Any]], device: torch.device
    ) -> Tensor | None:
        """Target tokens that count in ``batch_samples`` on all ranks; every rank must call."""
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        counts = [count_tokens(self._targets(batch["labels"])) for batch in batch_samples]
        tokens = torch.stack(counts).sum().to(device)
        return self.backend.collectives.all_reduce_sum(tokens)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The next step's micro-batches, placed, and its target tokens on all ranks."""
        started = time.perf_counter()
        if epoch_iterator is not self._epoch_iterator:
            self._epoch_iterator = epoch_iterator
            self._pads_ahead.clear()
            self._placed = self.backend.place_batches(self._counted(epoch_iterator))
        pairs = list(itertools.islice(self._placed, num_batches))
        self._meter.wait(time.perf_counter() - started)
        for _ in pairs:
            self._meter.count_pads(*self._pads_ahead.popleft())
        batches = [batch for _, batch in pairs]
        if not batches or "labels" not in batches[0]:
            return batches, None
        step_tokens = self.backend.collectives.sum_counts(sum(count for count, _ in pairs), device)
        self._meter.start_step(step_tokens)
        return batches, step_tokens

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' ``train``; nothing is read ahead once it has ended."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._epoch_iterator, self._placed = None, iter(())

    def _counted(self, batches: Iterator[Any]) -> Iterator[tuple[int, Any]]:
        """Each batch behind its number of target tokens, counted where the batch was made.

        That may be a thread that is some batches ahead of the step.
        """
        for batch in batches:
            labels = batch.get("labels")
            self._pads_ahead.append(count_pads(batch))
            yield 0 if labels is None else int(count_tokens(self._targets(labels))), batch

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        self._guard.observe(loss)
        self._guard.add_loss(loss)
        if not self.args.logging_nan_inf_filter:
            loss = torch.where(torch.isfinite(loss), loss, torch.zeros_like(loss))
        self.backend.finish_micro_batch(self.model, last=self.accelerator.sync_gradients)
        return loss

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        return self.backend.autocast()

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return super()._prepare_inputs(dict(self.backend.place_batch(inputs)))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # With a loss scaler an infinite norm is the scaler's signal to halve the scale.
        if not self.args.fp16:
            self._guard.observe(norm)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if ("loss" in logs or "train_loss" in logs) and self.is_in_train:
            self._guard.read(self.optimizer, self.backend)
        if "loss" in logs and self.is_in_train:
            logs.update(self._meter.read(self.backend.collectives.all_reduce_sum))
            if self._guard.steps:
                logs["nonfinite_steps"] = len(self._guard.steps)
            if self._guard.spikes:
                logs["loss_spikes"] = len(self._guard.spikes)
            if self.args.fp16:
                logs["overflow_steps"] = self._step_callback.overflow_steps
        if "train_loss" in logs:  # the summary at the end, which becomes the results
            logs["train_nonfinite_steps"] = len(self._guard.steps)
            if self._guard.detector is not None:
                logs["train_loss_spikes"] = len(self._guard.spikes)
            if self._guard.rolls_back:
                logs["train_rollbacks"] = len(self._guard.left_out)
            if self._meter.pad_share is not None:
                logs["train_pad_share"] = self._meter.pad_share
            if self.args.fp16:
                logs["train_overflow_steps"] = self._step_callback.overflow_steps
        super().log(logs, start_time)

    @contextmanager
    def _not_training(self) -> Iterator[None]:
        """Time spent inside does not count as training time."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._meter.pause(time.perf_counter() - started)
