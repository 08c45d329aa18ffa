"""Encoder and decoder over caches of a fixed length.

The caches have the interface that transformers' models call, but hold something else:
self-attention keys and values for L - 1 tokens, written at a position given by a tensor, and
cross-attention keys and values, which are computed once and stored once per source row, however
many beams it has.

Shapes: B rows, K beams, N = B * K, H heads, L maximum length, S source length, D head size,
V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache, StaticLayer
from transformers.modeling_outputs import BaseModelOutput

from s2s_scale.errors import UserError
from s2s_scale.generation.compat import attention_of

#: model types whose decoders accept a cache whose length is a tensor
STATIC_MODEL_TYPES = ("bart", "t5", "mbart", "fsmt", "pegasus", "marian", "mt5", "m2m_100")


@dataclass(frozen=True)
class Caches:
    """Keys and values of all decoder layers between two steps."""

    #: (keys, values) of the tokens so far, each [B, K, H, L - 1, D]
    own: tuple[tuple[Tensor, Tensor], ...]
    #: (keys, values) of the source, each [B, H, S, D]
    source: tuple[tuple[Tensor, Tensor], ...]
    #: BoolTensor[B, S]: true for tokens, false for padding
    source_mask: Tensor


NO_CACHES = Caches(own=(), source=(), source_mask=torch.empty(0))
"""For a search that does not carry the caches."""


class StaticDecoder:
    """Scores next tokens with a transformers model, in tensors of fixed shapes.

    Raises:
        UserError: the model's decoder does not support a static cache.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        kind = model.config.model_type
        if kind not in STATIC_MODEL_TYPES:
            raise UserError(
                f"model type '{kind}': generation with static shapes supports "
                f"{', '.join(STATIC_MODEL_TYPES)}; generate on a CPU or GPU profile"
            )
        attention = attention_of(model.config)
        self._own_masks = kind == "fsmt"  # its decoder applies only the masks that it is given
        if not self._own_masks and attention not in ("sdpa", "eager"):
            raise UserError(
                f"attn_implementation={attention}: expected sdpa or eager for generation with "
                "static shapes; load the model with one of them"
            )
        self.model: Any = model

    @property
    def vocab_size(self) -> int:
        """V, as the output embeddings have it."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    def check_lengths(self, *, source: int, target: int) -> None:
        """Check that the model has positions for ``source`` and ``target`` tokens.

        A compiled graph does not report an index past the end of an embedding: it reads the last
        row.

        Raises:
            UserError: the model has too few positions.
        """
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if positions is None or self._own_masks:  # FSMT extends its positions as needed
            return
        if target - 1 > positions:
            raise UserError(
                f"max_length={target}: the model has positions for {positions} tokens; give "
                f"max_length={positions + 1} or less"
            )
        if source > positions:
            raise UserError(
                f"a source of {source} tokens: the model has positions for {positions}; truncate "
                f"it (max_source_length={positions})"
            )

    @contextmanager
    def fixed_positions(self, length: int) -> Iterator[None]:
        """Context for all calls: FSMT's positions are prepared for ``length`` tokens at once.

        FSMT's own lookup compares the position with the size of its table in Python, which would
        read the position from the device at each step. No effect on other models.
        """
        table: Any = getattr(self.model.get_decoder(), "embed_positions", None)
        if not hasattr(table, "make_weight"):
            yield
            return
        needed = int(table.padding_idx) + 1 + length
        if needed > table.weight.shape[0]:
            table.make_weight(needed, table.embedding_dim, table.padding_idx)

        def look_up(tokens: Tensor, *, past_key_values_length: Any = 0) -> Tensor:
            positions = table.make_positions(tokens, table.padding_idx) + past_key_values_length
            return nn.functional.embedding(positions, table.weight)

        table.forward = look_up
        try:
            yield
        finally:
            del table.forward

    def first(
        self, input_ids: Tensor, source_mask: Tensor, start: int, *, length: int, beams: int
    ) -> tuple[Tensor, Caches]:
        """Encode ``input_ids`` [B, S] and decode ``start``: logits [B, V], and caches for K beams.

        All beams of a row are equal at this point, so only one is computed.
        """
        encoder_mask = source_mask.long() if self._own_masks else self._mask(source_mask)
        encoded = self.model.get_encoder()(
            input_ids=input_ids, attention_mask=encoder_mask, return_dict=True
        )
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        tokens = torch.full_like(input_ids[:, :1], start)
        written = torch.ones_like(tokens, dtype=torch.bool)
        logits = self._decode(tokens, encoded[0], source_mask, written, cache)

        def extended(states: Tensor) -> Tensor:
            full = nn.functional.pad(states, (0, 0, 0, length - 2))
            return full[:, None].expand(-1, beams, -1, -1, -1).contiguous()

        own: list[Any] = [*cache.self_attention_cache.layers]
        source: list[Any] = [*cache.cross_attention_cache.layers]
        return logits, Caches(
            own=tuple((extended(layer.keys), extended(layer.values)) for layer in own),
            source=tuple((layer.keys, layer.values) for layer in source),
            source_mask=source_mask,
        )

    def next(
        self, tokens: Tensor, position: Tensor, caches: Caches, beams: Tensor | None
    ) -> tuple[Tensor, Caches]:
        """Decode the last token of each beam: logits [N, V], and the caches with this token.

        Args:
            tokens: LongTensor[B, K].
            position: LongTensor[], the position of ``tokens``.
            caches: those of the previous step.
            beams: LongTensor[B, K], the beam of the previous step that each beam continues;
                ``None`` if each beam continues itself.
        """
        width = tokens.shape[1]
        own = [_OwnLayer(keys, values, position, beams) for keys, values in caches.own]
        source = [_SourceLayer(keys, values, width) for keys, values in caches.source]
        cache = EncoderDecoderCache(Cache(layers=[*own]), Cache(layers=[*source]))
        written = torch.arange(own[0].max_cache_len, device=tokens.device) <= position
        logits = self._decode(
            tokens.reshape(-1, 1),
            None,
            _repeat(caches.source_mask, width),
            written.expand(tokens.numel(), -1),
            cache,
        )
        after = tuple((layer.kept_keys, layer.kept_values) for layer in own)
        return logits, replace(caches, own=after)

    def _decode(
        self,
        tokens: Tensor,
        encoded: Tensor | None,
        source_mask: Tensor,
        written: Tensor,
        cache: EncoderDecoderCache,
    ) -> Tensor:
        """Logits [N, V] after ``tokens`` [N, 1]; ``written`` [N, cache length] is attended to."""
        if encoded is None:  # the decoder takes the source's keys and values from the cache
            encoded = torch.empty(
                (*source_mask.shape, 1), dtype=self.model.dtype, device=tokens.device
            )
        if self._own_masks:
            output = self.model.get_decoder()(
                tokens, encoded, source_mask.long(), ~written, None,
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
            return output.last_hidden_state[:, -1]
        output = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
            attention_mask=self._mask(source_mask),
            decoder_input_ids=tokens,
            decoder_attention_mask=self._mask(written),
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        )
        return output.logits[:, -1]

    def _mask(self, seen: Tensor) -> Tensor:
        """``seen`` [N, T] as the mask [N, 1, 1, T] that the model's attention expects.

        transformers checks on the host whether a two-dimensional mask hides anything, which would
        break the graph; one of four dimensions is used as it is.
        """
        wide = seen[:, None, None, :]
        if attention_of(self.model.config) == "sdpa":
            return wide
        dtype = self.model.dtype
        hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=seen.device)
        return torch.where(wide, torch.zeros_like(hidden), hidden)


class _OwnLayer(StaticLayer):
    """Self-attention keys and values of one layer and step, reordered and written together."""

    def __init__(
        self, keys: Tensor, values: Tensor, position: Tensor, beams: Tensor | None
    ) -> None:
        super().__init__(max_cache_len=keys.shape[-2])
        self.kept_keys, self.kept_values = keys, values
        self.position, self.beams = position, beams
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.kept_keys = self._written(self.kept_keys, key_states)
        self.kept_values = self._written(self.kept_values, value_states)
        return self.kept_keys.flatten(0, 1), self.kept_values.flatten(0, 1)

    def get_seq_length(self) -> Any:
        return self.position

    def _written(self, old: Tensor, new: Tensor) -> Tensor:
        """``old`` [B, K, H, L - 1, D] of the chosen beams, with ``new`` [N, H, 1, D] written.

        It is written by a comparison and not by an index, so that each device needs its own rows
        only.
        """
        if self.beams is not None:
            old = take_beams(old, self.beams)
        here = torch.arange(self.max_cache_len, device=old.device)[:, None] == self.position
        return torch.where(here, new.unflatten(0, old.shape[:2]), old)


class _SourceLayer(StaticLayer):
    """Cross-attention keys and values of one layer, the same for all beams of a row."""

    def __init__(self, keys: Tensor, values: Tensor, beams: int) -> None:
        super().__init__(max_cache_len=keys.shape[-2])
        self.keys, self.values = _repeat(keys, beams), _repeat(values, beams)
        self.is_initialized = True

    def get_seq_length(self) -> Any:
        return self.max_cache_len


def _repeat(rows: Tensor, beams: int) -> Tensor:
    """[B, ...] with each row repeated ``beams`` times: [N, ...]."""
    if beams == 1:
        return rows
    return rows[:, None].expand(-1, beams, *rows.shape[1:]).flatten(0, 1)


def take_beams(values: Tensor, beams: Tensor) -> Tensor:
    """``values`` [B, X, ...] of the chosen ``beams`` [B, Y]: [B, Y, ...].

    Gathers along the beams only, so that rows sharded over devices stay where they are. (Indexing
    by row and beam made XLA gather every cache on every device.)
    """
    index = beams.reshape(*beams.shape, *[1] * (values.dim() - 2))
    return torch.take_along_dim(values, index, dim=1)
