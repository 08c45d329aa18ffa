"""Makes the forward pass of a stock model end in its loss instead of logits.

A model computes logits with one module, its output projection. For the duration of one call its
``forward`` is replaced by a function that takes the hidden states and returns the sums of the loss.
The module is still called by the model, so hooks on it work (ZeRO 3 gathers its weight before the
call and again for the backward pass). And the sums are the output of the model, so wrappers of the
whole model work, too (DistributedDataParallel, autocast).

Shapes: B rows, T target positions, D model width, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from s2s_scale.loss.linear_cross_entropy import linear_cross_entropy
from s2s_scale.loss.losses import TokenLoss, count_tokens
from s2s_scale.models.families import FAMILIES


def loss_head_problem(model: Any) -> str | None:
    """Why ``model`` cannot end in its loss; None if it can.

    It can if its family is in the table, its forward method is transformers' own, and its output
    projection is a plain ``nn.Linear``. In all other cases it is unknown what happens between
    hidden states and logits.
    """
    if not isinstance(model, PreTrainedModel):
        return f"{type(model).__name__} is not a transformers model"
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        return f"models of type '{model.config.model_type}' are not in the table of families"
    if not type(model).forward.__module__.startswith("transformers.models."):
        return f"{type(model).__name__} has a forward method of its own"
    try:
        projection = model.get_submodule(family.output_projection)
    except AttributeError:
        return f"{type(model).__name__} has no output projection '{family.output_projection}'"
    if type(projection) is not nn.Linear or "forward" in vars(projection):
        return f"the output projection '{family.output_projection}' is not a plain nn.Linear"
    return None


class LossHead:
    """The output projection of ``model``, which can compute the loss instead of logits.

    Args:
        model: a model for which ``loss_head_problem`` is None, without its wrappers.
        smoothing: label smoothing epsilon.
        static_shapes: see ``linear_cross_entropy``.
        compiled: whether ``torch.compile`` was applied to the model. It cannot trace the loss,
            which then runs between two graphs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        smoothing: float = 0.0,
        static_shapes: bool = False,
        compiled: bool = False,
    ) -> None:
        family = FAMILIES[model.config.model_type]
        self.model = model
        self._projection: Any = model.get_submodule(family.output_projection)
        self._bias_name = family.logits_bias
        self._smoothing, self._static_shapes = smoothing, static_shapes
        self._labels: Tensor | None = None
        self._logits_bias: Tensor | None = None
        # One function object for all calls: torch.compile would recompile for another one.
        self._forward = torch.compiler.disable(self._sums) if compiled else self._sums
        self._no_bias: Tensor | None = None

    @contextmanager
    def ends_in_loss(self, labels: Tensor) -> Iterator[None]:
        """Context in which one call of the model returns sums instead of logits; see ``read``.

        ``labels`` [B, T] are the targets; -100 is ignored. The model must not be given labels, or
        it would compute a loss from what it takes for logits.
        """
        self._labels = labels
        self._projection.forward = self._forward
        if self._bias_name is not None:
            # The model adds it to the output of the projection; here the loss takes it.
            self._logits_bias = getattr(self.model, self._bias_name)
            if self._no_bias is None or self._no_bias.device != self._logits_bias.device:
                self._no_bias = self._logits_bias.new_zeros(1, 1)
            setattr(self.model, self._bias_name, self._no_bias)
        try:
            yield
        finally:
            del self._projection.forward
            if self._bias_name is not None:
                setattr(self.model, self._bias_name, self._logits_bias)
            self._labels = self._logits_bias = None

    def read(self, output: Tensor, labels: Tensor) -> TokenLoss:
        """The loss from the ``logits`` of a call in ``ends_in_loss``."""
        if output.shape != (1, 1, 2):
            raise RuntimeError(
                f"{type(self.model).__name__} returned {tuple(output.shape)} for the sums of its "
                "loss, expected (1, 1, 2): it does not use its output projection as the table of "
                "families says"
            )
        loss, nll = output.flatten().unbind()
        return TokenLoss(loss, nll.detach(), count_tokens(labels))

    def _sums(self, hidden: Tensor) -> Tensor:
        """Loss and NLL [1, 1, 2] of hidden states [B, T, D], instead of logits [B, T, V]."""
        assert self._labels is not None
        biases = [
            bias.flatten()
            for bias in (self._projection.bias, self._logits_bias)
            if bias is not None
        ]
        part = linear_cross_entropy(
            hidden,
            self._projection.weight,
            self._labels.to(hidden.device),
            bias=torch.stack(biases).sum(0) if biases else None,
            smoothing=self._smoothing,
            static_shapes=self._static_shapes,
        )
        return torch.stack([part.loss, part.nll]).view(1, 1, 2)
