"""Encoder and decoder over caches of a fixed length.

The decoder's caches are those of transformers in what its models call, and ours in what they hold:
self-attention keys and values for L - 1 tokens, written at the place that a tensor names, and
cross-attention keys and values computed once, kept once per source row whatever the beams.

Shapes: B rows, K beams, N = B * K, H heads, L longest length, S source length, D head size,
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

#: model types whose decoders take a cache whose length is a tensor
STATIC_MODEL_TYPES = ("bart", "t5", "mbart", "fsmt", "pegasus", "marian", "mt5", "m2m_100")


@dataclass(frozen=True)
class Caches:
    """The decoder's memory between two steps, layer by layer."""

    #: (keys, values) of the tokens so far, each [B, K, H, L - 1, D]
    own: tuple[tuple[Tensor, Tensor], ...]
    #: (keys, values) of the source, each [B, H, S, D]
    source: tuple[tuple[Tensor, Tensor], ...]
    #: BoolTensor[B, S]: which source places hold tokens
    source_mask: Tensor


NO_CACHES = Caches(own=(), source=(), source_mask=torch.empty(0))
"""For a search whose caches are kept elsewhere."""


class StaticDecoder:
    """Scores next tokens with a transformers model, in tensors of fixed shapes."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises ``UserError`` for a model whose decoder cannot work on a static cache."""
        kind = model.config.model_type
        if kind not in STATIC_MODEL_TYPES:
            raise UserError(
                f"model type '{kind}': generation with static shapes is known to work for "
                f"{', '.join(STATIC_MODEL_TYPES)}; generate on a CPU or GPU profile"
            )
        attention = attention_of(model.config)
        self._own_masks = kind == "fsmt"  # whose decoder masks only what it is told to mask
        if not self._own_masks and attention not in ("sdpa", "eager"):
            raise UserError(
                f"attn_implementation={attention}: generation with static shapes needs sdpa or "
                "eager; load the model with one of them"
            )
        self.model: Any = model

    @property
    def vocab_size(self) -> int:
        return int(self.model.get_output_embeddings().weight.shape[0])

    def check_lengths(self, *, source: int, target: int) -> None:
        """Raises ``UserError`` where the model has no positions for so many tokens.

        A device that compiles does not notice an index beyond a table's end: it reads the last row.
        """
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if positions is None or self._own_masks:  # FSMT makes the positions that it needs
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
        """Context for all calls: FSMT's positions are made for ``length`` tokens, and not per step.

        Its own lookup compares the position with the table's size in Python, which would read the
        position from the device at each step.
        """
        table: Any = getattr(self.model.get_decoder(), "embed_positions", None)
        if not hasattr(table, "make_weight"):
            yield
            return
        needed = int(table.padding_idx) + 1 + length
        if needed > table.weight.shape[0]:
            table.make_weight(needed, table.embedding_dim, table.padding_idx)

        def look_up(tokens: Tensor, *, past_key_values_length: Any = 0) -> Tensor:
            places = table.make_positions(tokens, table.padding_idx) + past_key_values_length
            return nn.functional.embedding(places, table.weight)

        table.forward = look_up
        try:
            yield
        finally:
            del table.forward

    def first(
        self, input_ids: Tensor, source_mask: Tensor, start: int, *, length: int, beams: int
    ) -> tuple[Tensor, Caches]:
        """Encode ``input_ids`` [B, S] and decode ``start``: logits [B, V], and caches for K beams.

        All beams of a row are equal at this point, so that one is computed.
        """
        encoder_mask = source_mask.long() if self._own_masks else self._mask(source_mask)
        encoded = self.model.get_encoder()(
            input_ids=input_ids, attention_mask=encoder_mask, return_dict=True
        )
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        tokens = torch.full_like(input_ids[:, :1], start)
        written = torch.ones_like(tokens, dtype=torch.bool)
        logits = self._decode(tokens, encoded[0], source_mask, written, cache)

        def grown(states: Tensor) -> Tensor:
            full = nn.functional.pad(states, (0, 0, 0, length - 2))
            return full[:, None].expand(-1, beams, -1, -1, -1).contiguous()

        own: list[Any] = [*cache.self_attention_cache.layers]
        source: list[Any] = [*cache.cross_attention_cache.layers]
        return logits, Caches(
            own=tuple((grown(layer.keys), grown(layer.values)) for layer in own),
            source=tuple((layer.keys, layer.values) for layer in source),
            source_mask=source_mask,
        )

    def next(
        self, tokens: Tensor, place: Tensor, caches: Caches, beams: Tensor | None
    ) -> tuple[Tensor, Caches]:
        """Decode each beam's last token [B, K], which stands at ``place`` (LongTensor[]).

        ``beams`` LongTensor[B, K] says which beam of the last step each beam goes on from; ``None``
        where each goes on from itself. Returns logits [N, V] and the caches with this token.
        """
        width = tokens.shape[1]
        own = [_OwnLayer(keys, values, place, beams) for keys, values in caches.own]
        source = [_SourceLayer(keys, values, width) for keys, values in caches.source]
        cache = EncoderDecoderCache(Cache(layers=[*own]), Cache(layers=[*source]))
        written = torch.arange(own[0].max_cache_len, device=tokens.device) <= place
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
        """Logits [N, V] after ``tokens`` [N, 1]; ``written`` [N, cache length] can be seen."""
        if encoded is None:  # the cache holds all that the decoder wants of it
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
        """``seen`` [N, T] as the model's attention takes it, [N, 1, 1, T].

        Given whole, because transformers asks a two-dimensional mask on the host whether it hides
        anything, which would end the graph.
        """
        wide = seen[:, None, None, :]
        if attention_of(self.model.config) == "sdpa":
            return wide
        dtype = self.model.dtype
        hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=seen.device)
        return torch.where(wide, torch.zeros_like(hidden), hidden)


class _OwnLayer(StaticLayer):
    """Self-attention keys and values of one layer and step; reordering and writing in one go."""

    def __init__(self, keys: Tensor, values: Tensor, place: Tensor, beams: Tensor | None) -> None:
        super().__init__(max_cache_len=keys.shape[-2])
        self.kept_keys, self.kept_values = keys, values
        self.place, self.beams = place, beams
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.kept_keys = self._written(self.kept_keys, key_states)
        self.kept_values = self._written(self.kept_values, value_states)
        return self.kept_keys.flatten(0, 1), self.kept_values.flatten(0, 1)

    def get_seq_length(self) -> Any:
        return self.place

    def _written(self, old: Tensor, new: Tensor) -> Tensor:
        """``old`` [B, K, H, L - 1, D] of the chosen beams, with ``new`` [N, H, 1, D] in its place.

        A comparison writes the place, not an index: each device then needs its own rows only.
        """
        if self.beams is not None:
            old = take_beams(old, self.beams)
        here = torch.arange(self.max_cache_len, device=old.device)[:, None] == self.place
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
    """[B, ...] with each row K times: [N, ...]."""
    if beams == 1:
        return rows
    return rows[:, None].expand(-1, beams, *rows.shape[1:]).flatten(0, 1)


def take_beams(values: Tensor, beams: Tensor) -> Tensor:
    """``values`` [B, X, ...] of the chosen ``beams`` [B, Y]: [B, Y, ...].

    Along the beams alone: rows that are shared out over devices stay where they are. (Indexing by
    row and beam made XLA collect every cache on every device.)
    """
    index = beams.reshape(*beams.shape, *[1] * (values.dim() - 2))
    return torch.take_along_dim(values, index, dim=1)
