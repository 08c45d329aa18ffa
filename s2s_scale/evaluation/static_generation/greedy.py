"""Greedy search over tensors of fixed shapes.

Shapes: B rows, L longest length, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from s2s_scale.evaluation.static_generation.decoding import Caches
from s2s_scale.evaluation.static_generation.rules import History, Rule
from s2s_scale.evaluation.static_generation.settings import SearchSettings


@dataclass(frozen=True)
class GreedyState:
    """Everything that greedy search carries from step to step."""

    #: LongTensor[B, L]
    tokens: Tensor
    #: BoolTensor[B]: rows that have ended
    done: Tensor
    #: LongTensor[]: tokens so far, of the longest row
    length: Tensor
    #: BoolTensor[]: no row goes on
    stopped: Tensor
    source: Tensor
    caches: Caches

    #: each row goes on from itself
    beams = None

    def last_tokens(self) -> Tensor:
        """LongTensor[B, 1]: what the decoder reads next."""
        return self.tokens.index_select(1, (self.length - 1).view(1))

    def of_rows(self, rows: Tensor) -> GreedyState:
        """The state of the chosen ``rows`` (LongTensor) alone, where caches are kept elsewhere."""
        return replace(
            self, tokens=self.tokens[rows], done=self.done[rows], source=self.source[rows]
        )


class GreedySearch:
    """Takes the best token, step by step."""

    def __init__(self, settings: SearchSettings, rules: Sequence[Rule], ends: Tensor) -> None:
        """``ends`` LongTensor[number of end tokens], on the device."""
        self.settings, self.rules, self.ends = settings, rules, ends

    def begin(self, source: Tensor, active: Tensor, caches: Caches) -> GreedyState:
        """The state before the first token; rows that are not ``active`` [B] have ended."""
        shape = (len(source), self.settings.max_length)
        fill = self.settings.start if self.settings.pad is None else self.settings.pad
        tokens = torch.full(shape, fill, dtype=torch.long, device=source.device)
        tokens[:, 0] = self.settings.start
        one = torch.ones_like(source[0, 0])
        return GreedyState(tokens, ~active, one, (~active).all(), source, caches)

    def advance(self, state: GreedyState, logits: Tensor, caches: Caches) -> GreedyState:
        """The state after one more token, by ``logits`` [B, V]."""
        scores = logits.float()
        for rule in self.rules:
            scores = rule(History(state.tokens, state.length, state.source), scores)
        chosen = scores.argmax(dim=-1)
        if self.settings.pad is not None:
            chosen = torch.where(state.done, self.settings.pad, chosen)
        here = torch.arange(state.tokens.shape[1], device=chosen.device) == state.length
        done = state.done | (chosen[:, None] == self.ends).any(-1)
        return GreedyState(
            tokens=torch.where(here, chosen[:, None], state.tokens),
            done=done,
            length=state.length + 1,
            stopped=done.all(),
            source=state.source,
            caches=caches,
        )

    def ended(self, state: GreedyState) -> Tensor:
        """BoolTensor[B]: rows whose text does not change any more."""
        return state.done

    def best(self, state: GreedyState) -> Tensor:
        """Tokens [B, L]."""
        return state.tokens
