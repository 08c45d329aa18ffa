"""Several pairs in one row on stock models: each attends to itself, and counts its own positions.

A packed row holds pairs one after the other. ``segments`` say which pair each position belongs to:
1, 2, … from left to right, in source and target alike, and 0 for pads. For the span of one call the
modules that look at positions, and those that build attention masks, get values made from the
segments; everything else is the model's own code, called as ever.

Shapes: R packed rows, S source positions, T target positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from s2s_scale.cpu.packed_attention import attended_by_pairs
from s2s_scale.data.collators import DecoderStart
from s2s_scale.errors import UserError
from s2s_scale.models.families import FAMILIES, start_token

ATTENTION = ("eager", "sdpa")


MASKED = -3e4
"""Added to scores that must not count: softmax makes it 0. Finite in every type, fp16 included: a
pad that may look at nothing would become NaN with infinity."""


def positions_within(segments: Tensor) -> Tensor:
    """Each position's number in its segment, from 0, for ``segments`` [R, S]."""
    places = torch.arange(segments.shape[1], device=segments.device)
    begins = torch.ones_like(segments)
    begins[:, 1:] = segments[:, 1:].ne(segments[:, :-1])
    number = begins.cumsum(dim=1)
    # A segment begins after all positions of earlier ones. A running maximum would be shorter, but
    # XLA cannot divide its rows over devices.
    return places - number.unsqueeze(1).lt(number.unsqueeze(2)).sum(dim=2)


def same_segment(queries: Tensor, keys: Tensor, *, causal: bool = False) -> Tensor:
    """Bool [R, 1, Q, K]: which ``keys`` [R, K] each of ``queries`` [R, Q] may look at."""
    mask = queries.unsqueeze(2) == keys.unsqueeze(1)
    if causal:
        mask = mask.tril()
    return mask.unsqueeze(1)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as numbers added to attention scores: 0 where it is true, else ``MASKED``."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, MASKED)


def packing_problem(model: Any) -> str | None:
    """Why ``model`` cannot run on packed rows; None where it can.

    The rule: a model of a family in the table, with transformers' own forward method, whose
    attention takes a mask of queries and keys.
    """
    if not isinstance(model, PreTrainedModel):
        return f"{type(model).__name__} is no transformers model"
    if model.config.model_type not in FAMILIES:
        names = ", ".join(sorted(FAMILIES))
        return f"models of type '{model.config.model_type}' are not among those that can: {names}"
    if not type(model).forward.__module__.startswith("transformers.models."):
        return f"{type(model).__name__} has a forward method of its own"
    attention = getattr(model.config, "_attn_implementation", None)
    if attention not in (None, *ATTENTION):
        return f"attention '{attention}' takes no masks of pairs, expected {' or '.join(ATTENTION)}"
    return None


def decoder_start(config: PreTrainedConfig) -> DecoderStart:
    """What each pair's decoder inputs begin with. Raises ``UserError`` where the config lacks it"""
    if FAMILIES[config.model_type].decoder_inputs == "wrap_last_token":
        return DecoderStart(None)
    return DecoderStart(start_token(config))


class PackedModel:
    """Runs a stock ``model`` on packed rows.

    Raises:
        UserError: the model is not one of those that can.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        problem = packing_problem(model)
        if problem is not None:
            raise UserError(
                f"batching=packed: cannot take effect, since {problem}; use --batching tokens"
            )
        self.model, self._family = model, FAMILIES[model.config.model_type]

    @contextmanager
    def packs(self, source: Tensor, target: Tensor) -> Iterator[dict[str, Tensor]]:
        """Context of one call of the model; gives keywords that this call needs beside token ids.

        ``source`` [R, S] and ``target`` [R, T] are segments. The model gets no masks but these.
        """
        device = source.device.type
        low = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if low else self.model.dtype
        encoder = additive(same_segment(source, source), dtype)
        decoder = additive(same_segment(target, target, causal=True), dtype)
        cross = additive(same_segment(target, source), dtype)
        with ExitStack() as replaced:
            if device == "cpu":
                masks = [
                    (encoder, source, source, False),
                    (decoder, target, target, True),
                    (cross, target, source, False),
                ]
                replaced.enter_context(attended_by_pairs(masks, MASKED))
            for side, segments in (("encoder", source), ("decoder", target)):
                self._place(replaced, getattr(self._parts, side), segments)
            if self._family.masks_in_attention:
                self._mask_attention(replaced, encoder, decoder, cross)
                yield {}
            else:
                replaced.enter_context(
                    _replaced(self._parts.encoder, _with(attention_mask=encoder))
                )
                yield {"attention_mask": cross, "decoder_attention_mask": decoder}

    @property
    def _parts(self) -> Any:
        """The module that holds ``encoder`` and ``decoder``."""
        return self.model if hasattr(self.model, "encoder") else self.model.model

    def _place(self, replaced: ExitStack, side: Any, segments: Tensor) -> None:
        """Positions that begin anew with each pair; relative ones (T5) do that by themselves."""
        module = getattr(side, "embed_positions", None)
        if module is None:
            return
        positions = positions_within(segments)
        if self._family.positions_skip_pads:
            positions = (positions + 1).masked_fill(segments == 0, 0) + module.padding_idx

        def embedded(original: Callable[..., Tensor], *_args: Any, **_options: Any) -> Tensor:
            del original
            offset = getattr(module, "offset", 0)
            return nn.Embedding.forward(module, positions + offset)

        replaced.enter_context(_replaced(module, embedded))

    def _mask_attention(
        self, replaced: ExitStack, encoder: Tensor, decoder: Tensor, cross: Tensor
    ) -> None:
        """Masks for attention modules that get no mask of both queries and keys otherwise."""
        for layer in self._parts.encoder.layers:
            masked = _with(attn_mask=encoder, key_padding_mask=None)
            replaced.enter_context(_replaced(layer.self_attn, masked))
        for layer in self._parts.decoder.layers:
            for module, mask in ((layer.self_attn, decoder), (layer.encoder_attn, cross)):
                masked = _with(attn_mask=mask, key_padding_mask=None)
                replaced.enter_context(_replaced(module, masked))


def _with(**fixed: Any) -> Callable[..., Any]:
    """A call of the original with these keywords, whatever the caller gave for them."""

    def call(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return original(*args, **{**options, **fixed})

    return call


@contextmanager
def _replaced(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """``forward`` in the place of the module's own, which it gets as its first argument."""
    before = vars(module).get("forward")
    original = module.forward

    def call(*args: Any, **options: Any) -> Any:
        return forward(original, *args, **options)

    module.forward = call
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
