"""Generation in fixed shapes: one graph for encoder and first token, one for all further tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from s2s_scale.generation.logits_rules import make_rules
from s2s_scale.generation.options import read_settings
from s2s_scale.generation.search import BeamSearch, GreedySearch
from s2s_scale.generation.static_cache import StaticDecoder

#: steps between two reads of the device's flag that all rows have ended
CHECK_EVERY = 8
MIN_WIDTH = 16


class StaticGenerator:
    """``model.generate`` for devices that compile every new shape.

    Tokens, scores, beams and caches are tensors of fixed shapes, and the step number is a tensor
    too. A batch shape therefore costs two compilations, whatever its rows and their lengths: one
    for the encoder and the first token, and one for all further tokens. The result is the same as
    that of ``model.generate`` on the CPU.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        sync: Callable[[], None] | None = None,
        to_host: Callable[[Tensor], Tensor] = Tensor.cpu,
        check_every: int = CHECK_EVERY,
    ) -> None:
        """Prepare ``model``, which stays on its device.

        Args:
            sync: ends a graph by submitting all pending work of the device (``torch_xla.sync``).
            to_host: copies the result [B, ...] to the CPU, with all of its rows if they are sharded
                over devices.
            check_every: steps between two reads of the flag that all rows have ended. A read waits
                for the device, and up to ``check_every - 1`` steps are computed needlessly.

        Raises:
            UserError: the model's decoder does not support a static cache.
        """
        self._decoder = StaticDecoder(model)
        self._model = model
        self._sync = sync or (lambda: None)
        self._to_host = to_host
        self._check_every = check_every

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        active: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Token ids LongTensor[B * num_return_sequences, T] on the CPU, start token first.

        Args:
            input_ids: LongTensor[B, S] on the model's device.
            attention_mask: [B, S], 0 for padding; ``None`` if there is none.
            active: BoolTensor[B] on the CPU, false for filler rows, which end at once and do not
                count towards T; ``None`` if there are none.
            options: those of ``model.generate``, which override the model's generation config.

        Raises:
            UserError: options that need dynamic shapes, and lengths beyond the model's positions.
        """
        settings = read_settings(self._model, options)
        self._decoder.check_lengths(source=input_ids.shape[1], target=settings.max_length)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if active is None:
            active = torch.ones(len(input_ids), dtype=torch.bool)
        rules = make_rules(
            settings.processors,
            vocab_size=self._decoder.vocab_size,
            max_length=settings.max_length,
            device=input_ids.device,
        )
        ends = torch.tensor(settings.ends, dtype=torch.long).to(input_ids.device)
        search = (GreedySearch if settings.num_beams == 1 else BeamSearch)(settings, rules, ends)
        with self._decoder.fixed_positions(settings.max_length):
            state = self._run(search, input_ids, attention_mask.bool(), active)
        # Copied as the last step left it: any operation on the device would be one more graph.
        tokens = self._to_host(search.best(state)).reshape(len(input_ids), -1, settings.max_length)
        tokens = tokens[:, : settings.num_return_sequences]
        return tokens[..., : longest_text(tokens[active], settings.ends)].flatten(0, 1)

    def _run(self, search: Any, input_ids: Tensor, mask: Tensor, active: Tensor) -> Any:
        """The final state, after one step per token up to the limit or until all rows end."""
        settings = search.settings
        logits, caches = self._decoder.first(
            input_ids,
            mask,
            settings.start,
            length=settings.max_length,
            beams=settings.num_beams,
        )
        state = search.begin(input_ids, active.to(input_ids.device), caches)
        state = search.advance(state, logits, caches)
        del logits, caches
        self._sync()
        for step in range(1, settings.max_length - 1):
            if step % self._check_every == 0 and bool(state.stopped):
                break
            logits, caches = self._decoder.next(
                state.last_tokens(), state.length - 1, state.caches, state.beams
            )
            state = search.advance(state, logits, caches)
            del logits, caches  # only the state may pass from one graph to the next
            self._sync()
        return state


def longest_text(tokens: Tensor, ends: tuple[int, ...]) -> int:
    """Number of tokens of the longest row of ``tokens`` [..., L], up to its first end token."""
    if tokens.numel() == 0:
        return 1
    ended = torch.isin(tokens[..., 1:], torch.tensor(ends, dtype=torch.long))
    before_end = (ended.long().cumsum(-1) == 0).sum(-1)
    return min(int(before_end.max()) + 2, tokens.shape[-1])


def static_width(longest: int, limit: int) -> int:
    """The width to which sources of up to ``longest`` tokens are padded, at most ``limit``.

    Powers of two from 16 on, which makes seven widths up to 1,024 tokens.
    """
    width = MIN_WIDTH
    while width < longest:
        width *= 2
    return max(min(width, limit), longest)
