"""The loss: three modes, and one divisor for the whole optimizer step.

Shapes: B rows, T target positions, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from s2s_scale.data.collators import SEGMENT_IDS
from s2s_scale.errors import UserError
from s2s_scale.loss.losses import TokenLoss, count_tokens, cross_entropy, mask_pads, of_model_mean
from s2s_scale.models import LossHead, decoder_inputs_from_labels, loss_head_problem
from s2s_scale.models.packed_attention import PackedModel, packing_problem

SMOOTHED, CROSS_ENTROPY, MODEL = "smoothed", "cross_entropy", "model"
"""Modes: label-smoothed NLL, cross entropy without pads, the loss that the model computes."""


@dataclass(frozen=True)
class BatchLoss:
    """What one batch contributes.

    Attributes:
        share: the batch's part of its step's loss, to be differentiated.
        sums: loss, NLL and number of target tokens, summed over the batch, without gradients.
        nll_share: the batch's part of its step's mean NLL per token.
    """

    share: Tensor
    sums: TokenLoss
    nll_share: Tensor


class LossComputer:
    """Computes the losses of batches in one mode.

    Args:
        config: of the model; its special tokens are read when needed.
        mode: ``SMOOTHED``, ``CROSS_ENTROPY`` or ``MODEL``.
        smoothing: label smoothing epsilon.
        reduction: mean or sum over the target tokens.
        linear: ``linear_cross_entropy``: auto, on or off.
        logits_reader: why logits must be computed, if something else reads them.
        packing_obstacle: why pairs cannot be packed, other than because of the model.
        static_shapes: the device compiles each new shape.
        compiled: the model is compiled by torch.
        padding_id: the token id that fills rows.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        mode: str,
        smoothing: float = 0.0,
        reduction: str = "mean",
        linear: str = "auto",
        logits_reader: str | None = None,
        packing_obstacle: str | None = None,
        static_shapes: bool = False,
        compiled: bool = False,
        padding_id: Callable[[], int],
    ) -> None:
        self.mode = mode
        self._config = config
        self._smoothing, self._reduction, self._linear = smoothing, reduction, linear
        self._logits_reader, self._packing_obstacle = logits_reader, packing_obstacle
        self._static_shapes, self._compiled = static_shapes, compiled
        self._padding_id = padding_id
        self._wants_logits = True
        self._loss_head: LossHead | None = None
        self._packed_model: PackedModel | None = None
        self._nll: Tensor | None = None

    def check(self, plain: Any, *, packs: bool) -> None:
        """Refuse settings that cannot take effect; ``packs``: the batches are packed.

        Raises:
            UserError: one line that says why.
        """
        if packs and (reason := self.packing_problem(plain)):
            raise UserError(
                f"batching=packed: cannot take effect, since {reason}; use --batching tokens"
            )
        if self._linear == "on" and (reason := self._logits_problem(plain)):
            raise UserError(
                f"linear_cross_entropy=on: cannot take effect, since {reason}; expected auto or "
                "off here; leave --linear_cross_entropy out"
            )

    def packing_problem(self, plain: Any) -> str | None:
        """Why pairs cannot be packed; None if they can."""
        return self._packing_obstacle or packing_problem(plain)

    def _logits_problem(self, plain: Any) -> str | None:
        """Why the loss needs all logits at once; None if it does not."""
        if self._linear == "off":
            return "it is switched off"
        if self.mode == MODEL:
            return "the model computes its own loss (no smoothing, no exclusion of pads)"
        return self._logits_reader or loss_head_problem(plain)

    def targets(self, labels: Tensor) -> Tensor:
        """Labels [B, T] with -100 wherever this mode counts no target."""
        if self.mode == MODEL:
            return labels
        return mask_pads(labels, self._config.pad_token_id, self._config.eos_token_id)

    def count_tokens(self, batch: Mapping[str, Any]) -> Tensor | None:
        """Target tokens of a batch that count, a scalar; None where it has no labels."""
        labels = batch.get("labels")
        return None if labels is None else count_tokens(self.targets(labels))

    @staticmethod
    def labels_of(batch: Mapping[str, Any]) -> Tensor:
        """The labels [B, T] of a batch.

        Raises:
            ValueError: it has none.
        """
        if "labels" not in batch:
            raise ValueError(
                f"a batch needs labels to have a loss; it has: {', '.join(batch)}; let the "
                "collator return 'labels'"
            )
        labels: Tensor = batch["labels"]
        return labels

    def total_tokens(self, batches: Sequence[Mapping[str, Any]]) -> Tensor | None:
        """Target tokens of ``batches`` that count, a scalar; None where the first has no labels."""
        if not batches or "labels" not in batches[0]:
            return None
        return torch.stack([count_tokens(self.targets(batch["labels"])) for batch in batches]).sum()

    def with_decoder_inputs(
        self, inputs: Mapping[str, Any], labels: Tensor, plain: Any
    ) -> dict[str, Any]:
        """Model inputs without labels but with decoder inputs, made from ``labels`` if absent."""
        model_inputs = {name: value for name, value in inputs.items() if name != "labels"}
        if model_inputs.get("decoder_input_ids") is None:
            # A module that came with a separate config need not carry it as an attribute.
            source = plain if hasattr(plain, "config") else SimpleNamespace(config=self._config)
            model_inputs["decoder_input_ids"] = decoder_inputs_from_labels(
                source, labels, self._padding_id()
            )
        return model_inputs

    @contextmanager
    def logits_wanted(self, wanted: bool) -> Iterator[None]:
        """Context in which ``compute`` need not return logits unless ``wanted``."""
        self._nll, self._wants_logits = None, wanted
        try:
            yield
        finally:
            self._wants_logits = True

    def compute(
        self, model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, plain: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Loss of one batch, and its logits [B, T, V] if they were computed.

        The loss is the mean over the batch's target tokens, or their sum with ``reduction`` sum.
        ``plain``: the model without its wrappers.
        """
        model_inputs = self.with_decoder_inputs(inputs, labels, plain)
        with self._packing_context(model_inputs, plain) as placed:
            part, logits = self._token_loss(model, placed, labels, plain)
        self._nll = part.nll
        if self._reduction == "sum":
            return part.loss, logits
        return part.loss / part.tokens.clamp(min=1), logits

    def _token_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, plain: Any
    ) -> tuple[TokenLoss, Tensor | None]:
        if self.mode == MODEL:
            loss, logits = model(**inputs, labels=labels, use_cache=False)[:2]
            return of_model_mean(loss, labels), logits
        targets, head = self.targets(labels), self._head(plain)
        if head is not None:
            with head.ends_in_loss(targets):
                return head.read(model(**inputs, use_cache=False)[0], targets), None
        logits = model(**inputs, use_cache=False)[0]
        return cross_entropy(logits, targets, smoothing=self._smoothing), logits

    def _head(self, plain: Any) -> LossHead | None:
        """Makes the model's forward pass end in the loss; None if logits are needed."""
        if self._wants_logits:
            return None
        if self._loss_head is None or self._loss_head.model is not plain:
            if self._logits_problem(plain) is not None:
                return None
            self._loss_head = LossHead(
                plain,
                smoothing=self._smoothing,
                static_shapes=self._static_shapes,
                compiled=self._compiled,
            )
        return self._loss_head

    @contextmanager
    def _packing_context(
        self, inputs: Mapping[str, Any], plain: Any
    ) -> Iterator[Mapping[str, Any]]:
        """The inputs that the model takes; for packed rows, with masks that separate the pairs."""
        if SEGMENT_IDS[0] not in inputs:
            yield inputs
            return
        if self._packed_model is None or self._packed_model.model is not plain:
            self._packed_model = PackedModel(plain)
        left_out = {*SEGMENT_IDS, "attention_mask"}
        rest = {name: value for name, value in inputs.items() if name not in left_out}
        with self._packed_model.packs(*(inputs[name] for name in SEGMENT_IDS)) as masks:
            yield {**rest, **masks}

    def share(
        self,
        loss: Tensor,
        labels: Tensor,
        step_tokens: Tensor | int | None,
        averaged_ranks: int = 1,
    ) -> BatchLoss:
        """The part of a step's loss that a batch contributes.

        ``loss``: what ``compute``, or a subclass in its place, gave for the batch. ``step_tokens``:
        target tokens of the whole step (all micro-batches, all ranks); without it the batch's own
        number is used. The shares add up to the step's loss for any number of ranks and
        micro-batches. ``averaged_ranks``: over how many ranks gradients will be averaged.
        """
        tokens = count_tokens(self.targets(labels))
        share = torch.ones_like(loss)
        if self._reduction == "mean" and step_tokens is not None:
            share = tokens / torch.as_tensor(step_tokens, device=tokens.device)
        total = loss.detach() * tokens if self._reduction == "mean" else loss.detach()
        # A subclass with a loss of its own may know no other than the one it gives.
        nll = total if self._nll is None else self._nll
        divisor = tokens.clamp(min=1) if step_tokens is None else step_tokens
        # Ranks average their gradients; the shares must add up instead.
        return BatchLoss(
            loss * share * averaged_ranks, TokenLoss(total, nll, tokens), nll / divisor
        )
