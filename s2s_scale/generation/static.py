"""The loop: one graph for encoder and first token, one for every further token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from s2s_scale.generation.logits_rules import make_rules
from s2s_scale.generation.options import SearchSettings, read_settings
from s2s_scale.generation.search import BeamSearch, GreedySearch
from s2s_scale.generation.static_cache import StaticDecoder

#: steps between two looks at the device's answer whether all rows have ended
CHECK_EVERY = 8
SHORTEST_WIDTH = 16


class StaticGenerator:
    """``model.generate`` for devices that compile every new shape.

    Tokens, scores, beams and caches are tensors of fixed shapes, and the number of the step is one
    too; so a shape of batch costs two compilations, whatever its rows and their lengths: encoder
    with the first token, and every further token. The result is ``model.generate``'s on the CPU.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        sync: Callable[[], None] | None = None,
        fetch: Callable[[Tensor], Tensor] = Tensor.cpu,
        check_every: int = CHECK_EVERY,
    ) -> None:
        """Prepare ``model``, which stays where it is.

        Args:
            sync: ends a graph: all pending work of the device is sent off (``torch_xla.sync``).
            fetch: brings the result [B, ...] to the CPU: all of its rows, where they are shared out
                over devices.
            check_every: steps between two reads of the flag that all rows have ended. The read
                waits for the device, and up to ``check_every - 1`` steps are computed in vain.

        Raises:
            UserError: the model's decoder cannot work on a static cache.
        """
        self._decoder = StaticDecoder(model)
        self._model = model
        self._sync = sync or (lambda: None)
        self._fetch = fetch
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
            attention_mask: [B, S], 0 for padding; ``None``: all are tokens.
            active: BoolTensor[B] on the CPU, false for rows that only fill the batch up: they end
                at once and do not count in T. ``None``: all count.
            options: those of ``model.generate``, over the model's generation config.

        Raises:
            UserError: options that cannot be static, and lengths that the model has no
                positions for.
        """
        settings = read_settings(self._model, options)
        self._decoder.check_lengths(source=input_ids.shape[1], target=settings.max_length)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if active is None:
            active = torch.ones(len(input_ids), dtype=torch.bool)
        search = self._search(settings, input_ids.device)
        with self._decoder.fixed_positions(settings.max_length):
            state = self._run(search, input_ids, attention_mask.bool(), active)
        # One tensor, as the last step left it: whatever is done to it before is one more graph.
        tokens = self._fetch(search.best(state)).reshape(len(input_ids), -1, settings.max_length)
        tokens = tokens[:, : settings.num_return_sequences]
        return tokens[..., : longest_text(tokens[active], settings.ends)].flatten(0, 1)

    def _search(self, settings: SearchSettings, device: torch.device) -> Any:
        rules = make_rules(
            settings.processors,
            vocab_size=self._decoder.vocab_size,
            max_length=settings.max_length,
            device=device,
        )
        ends = torch.tensor(settings.ends, dtype=torch.long).to(device)
        kind = GreedySearch if settings.num_beams == 1 else BeamSearch
        return kind(settings, rules, ends)

    def _run(self, search: Any, input_ids: Tensor, mask: Tensor, active: Tensor) -> Any:
        """The last state: one step per token until the limit, or until all rows have ended."""
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
            del logits, caches  # nothing but the state may cross from graph to graph
            self._sync()
        return state


def longest_text(tokens: Tensor, ends: tuple[int, ...]) -> int:
    """Tokens of the longest row of ``tokens`` [..., L], up to its first end token."""
    if tokens.numel() == 0:
        return 1
    ended = torch.isin(tokens[..., 1:], torch.tensor(ends, dtype=torch.long))
    open_places = (ended.long().cumsum(-1) == 0).sum(-1)  # before the end token
    return min(int(open_places.max()) + 2, tokens.shape[-1])


def static_width(longest: int, limit: int) -> int:
    """The width that a batch of sources up to ``longest`` tokens is padded to, at most ``limit``.

    Powers of two from 16 on: no more than seven widths up to 1,024 tokens.
    """
    width = SHORTEST_WIDTH
    while width < longest:
        width *= 2
    return max(min(width, limit), longest)
