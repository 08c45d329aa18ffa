"""Packed attention on stock models: several pairs in one row, each of which attends to itself.

A packed row holds pairs one after the other. Its segment ids number the pair of each position: 1,
2, … from left to right, the same in source and target, and 0 for pads. For the duration of one call
position embeddings get positions that restart at each pair, and attention gets masks that keep the
pairs apart; all other code of the model is unchanged.

Shapes: R packed rows, S source positions, T target positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from s2s_scale.cpu.packed_attention import packed_attention
from s2s_scale.data.collators import DecoderStart
from s2s_scale.errors import UserError
from s2s_scale.models.compat import attention_of
from s2s_scale.models.families import FAMILIES, start_token

ATTENTION = ("eager", "sdpa")
MASKED = -3e4
"""Added to scores that must not count, so that their softmax is 0. Finite in every type, fp16
included: with infinity, a pad without any key would become NaN."""


def positions_within(segment_ids: Tensor) -> Tensor:
    """Each position's number in its segment, from 0, for ``segment_ids`` [R, S]."""
    places = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    begins = torch.ones_like(segment_ids)
    begins[:, 1:] = segment_ids[:, 1:].ne(segment_ids[:, :-1])
    number = begins.cumsum(dim=1)
    # A segment begins after all positions of earlier ones. A running maximum would be shorter, but
    # XLA cannot shard its rows over devices.
    return places - number.unsqueeze(1).lt(number.unsqueeze(2)).sum(dim=2)


def same_segment(queries: Tensor, keys: Tensor, *, causal: bool = False) -> Tensor:
    """Bool [R, 1, Q, K]: which keys each query attends to, from segment ids [R, Q] and [R, K]."""
    mask = queries.unsqueeze(2) == keys.unsqueeze(1)
    if causal:
        mask = mask.tril()
    return mask.unsqueeze(1)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as values added to attention scores: 0 where it is true, else ``MASKED``."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, MASKED)


def packing_problem(model: Any) -> str | None:
    """Why ``model`` cannot run on packed rows; None if it can.

    It can if its family is in the table, its forward method is transformers' own, and its attention
    takes a mask of queries and keys.
    """
    if not isinstance(model, PreTrainedModel):
        return f"{type(model).__name__} is not a transformers model"
    if model.config.model_type not in FAMILIES:
        names = ", ".join(sorted(FAMILIES))
        return f"models of type '{model.config.model_type}' are not among those that can: {names}"
    if not type(model).forward.__module__.startswith("transformers.models."):
        return f"{type(model).__name__} has a forward method of its own"
    attention = attention_of(model.config)
    if attention not in (None, *ATTENTION):
        return f"attention '{attention}' takes no masks of pairs, expected {' or '.join(ATTENTION)}"
    return None


def decoder_start(config: PreTrainedConfig) -> DecoderStart:
    """What each pair's decoder inputs begin with; ``UserError`` if the config does not say."""
    if FAMILIES[config.model_type].decoder_inputs == "wrap_last_token":
        return DecoderStart(None)
    return DecoderStart(start_token(config))


class PackedModel:
    """Runs a stock ``model`` on packed rows.

    Raises:
        UserError: the model cannot (see ``packing_problem``).
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
        """Context of one call of the model; yields keyword arguments for it, besides token ids.

        ``source`` [R, S] and ``target`` [R, T] are segment ids. The model must not be given other
        masks.
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
                replaced.enter_context(packed_attention(masks, MASKED))
            parts = self._parts
            for side, segment_ids in ((parts.encoder, source), (parts.decoder, target)):
                self._restart_positions(replaced, side, segment_ids)
            if not self._family.masks_in_attention:
                replaced.enter_context(_replaced(parts.encoder, _with(attention_mask=encoder)))
                yield {"attention_mask": cross, "decoder_attention_mask": decoder}
                return
            attentions = [(layer.self_attn, encoder) for layer in parts.encoder.layers]
            for layer in parts.decoder.layers:
                attentions += [(layer.self_attn, decoder), (layer.encoder_attn, cross)]
            for module, mask in attentions:
                masked = _with(attn_mask=mask, key_padding_mask=None)
                replaced.enter_context(_replaced(module, masked))
            yield {}

    @property
    def _parts(self) -> Any:
        """The module with the attributes ``encoder`` and ``decoder``."""
        return self.model if hasattr(self.model, "encoder") else self.model.model

    def _restart_positions(self, replaced: ExitStack, side: Any, segment_ids: Tensor) -> None:
        """Make positions restart at each pair; relative ones (T5's) need no change."""
        module = getattr(side, "embed_positions", None)
        if module is None:
            return
        positions = positions_within(segment_ids)
        if self._family.positions_skip_pads:
            positions = (positions + 1).masked_fill(segment_ids == 0, 0) + module.padding_idx

        def embed(_original: Callable[..., Tensor], *_args: Any, **_options: Any) -> Tensor:
            offset = getattr(module, "offset", 0)
            return nn.Embedding.forward(module, positions + offset)

        replaced.enter_context(_replaced(module, embed))


def _with(**fixed: Any) -> Callable[..., Any]:
    """A call of the original with these keyword arguments in place of the caller's."""

    def call(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return original(*args, **{**options, **fixed})

    return call


@contextmanager
def _replaced(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Replaces the ``forward`` of a module; the original is passed as the first argument."""
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
