"""Greedy search and beam search over tensors of fixed shapes.

Beam search follows ``GenerationMixin._beam_search`` of transformers 5: the candidates of a row are
its best ``max(2, 1 + number of end tokens) * K`` continuations; hypotheses that end among the first
K candidates are ranked by score divided by length to the power of ``length_penalty``; and all rows
go on until none can improve. What transformers computes as Python numbers (lengths, their powers,
the decision to stop) stays on the device here.

Shapes: B rows, K beams, C candidates, L maximum length, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from s2s_scale.generation.logits_rules import History, Rule
from s2s_scale.generation.options import SearchSettings
from s2s_scale.generation.static_cache import Caches, take_beams

#: the score of what must not be chosen, as in transformers
NEVER = -1.0e9


@dataclass(frozen=True)
class Finished:
    """The best finished hypotheses of each row, best first."""

    #: LongTensor[B, K, L]
    tokens: Tensor
    #: FloatTensor[B, K], with the length penalty applied
    scores: Tensor
    #: BoolTensor[B, K]: whether there is a hypothesis yet
    valid: Tensor


@dataclass(frozen=True)
class BeamState:
    """The state of beam search between two steps."""

    #: LongTensor[B, K, L]: the running beams
    tokens: Tensor
    #: FloatTensor[B, K]: their summed log probabilities
    scores: Tensor
    #: LongTensor[B, K]: the beam of the previous step that each one continues
    beams: Tensor
    finished: Finished
    #: BoolTensor[B, 1]: whether a running beam can still beat a finished hypothesis
    improvable: Tensor
    #: BoolTensor[B]: false for filler rows
    active: Tensor
    #: LongTensor[]: number of tokens so far, including the start token
    length: Tensor
    #: BoolTensor[]: the search is over; finished hypotheses no longer change
    stopped: Tensor
    #: LongTensor[B * K, S]
    source: Tensor
    caches: Caches

    def last_tokens(self) -> Tensor:
        """LongTensor[B, K]: the decoder's next input."""
        return self.tokens.index_select(2, (self.length - 1).view(1)).squeeze(2)

    def select_rows(self, rows: Tensor) -> BeamState:
        """The state of ``rows`` (LongTensor) only; the caches must be kept elsewhere."""
        old = self.finished
        return replace(
            self,
            tokens=self.tokens[rows],
            scores=self.scores[rows],
            beams=self.beams[rows],
            finished=Finished(old.tokens[rows], old.scores[rows], old.valid[rows]),
            improvable=self.improvable[rows],
            active=self.active[rows],
            source=self.source.unflatten(0, self.scores.shape)[rows].flatten(0, 1),
        )


@dataclass(frozen=True)
class _Candidates:
    """The best continuations [B, C] of each row, best first."""

    #: LongTensor[B, C, L]
    tokens: Tensor
    scores: Tensor
    #: the beam that each candidate continues
    beams: Tensor
    #: whether the candidate ends here
    ended: Tensor


class BeamSearch:
    """Keeps the K best beams of each row, one token per call of ``advance``."""

    def __init__(self, settings: SearchSettings, rules: Sequence[Rule], ends: Tensor) -> None:
        """``ends``: the end tokens, LongTensor[number of end tokens] on the device."""
        self.settings, self.rules, self.ends = settings, rules, ends
        powers = [max(n, 1) ** settings.length_penalty for n in range(settings.max_length + 1)]
        self._powers = torch.tensor(powers, dtype=torch.float32).to(ends.device)

    def begin(self, source: Tensor, active: Tensor, caches: Caches) -> BeamState:
        """The state before the first token; rows that are not ``active`` [B] are never extended."""
        beams = self.settings.num_beams
        shape = (len(source), beams, self.settings.max_length)
        tokens = torch.full(shape, self.settings.filler, dtype=torch.long, device=source.device)
        tokens[:, :, 0] = self.settings.start
        never = torch.full(shape[:2], NEVER, device=source.device)
        scores = never.clone()
        scores[:, 0] = 0.0  # all beams are equal at the start token, so only one is continued
        zeros = torch.zeros(shape[:2], dtype=torch.long, device=source.device)
        idle = (~active)[:, None].expand(shape[:2])
        return BeamState(
            tokens=tokens,
            scores=scores,
            beams=zeros,
            finished=Finished(tokens.clone(), never, idle.clone()),
            improvable=active[:, None],
            active=active,
            length=zeros[0, 0] + 1,
            stopped=(~active).all(),
            source=source.repeat_interleave(beams, dim=0),
            caches=caches,
        )

    def advance(self, state: BeamState, logits: Tensor, caches: Caches) -> BeamState:
        """The state after one more token, chosen by ``logits`` [B * K, V].

        With logits of shape [B, V] all beams of a row have the same ones.
        """
        rows, beams = state.scores.shape
        log_probs = logits.float().log_softmax(dim=-1)
        if len(log_probs) == rows != rows * beams:
            log_probs = log_probs.repeat_interleave(beams, dim=0)
        history = History(state.tokens.flatten(0, 1), state.length, state.source)
        for rule in self.rules:
            log_probs = rule(history, log_probs)
        candidates = self._candidates(state, log_probs)
        finished = self._merge_finished(state, candidates)
        # The K best candidates that have not ended go on.
        running = candidates.scores + candidates.ended.float() * NEVER
        chosen = running.topk(beams)[1]
        scores = take_beams(running, chosen)
        # A row goes on while its best running beam can still beat its worst finished hypothesis.
        early = self.settings.early_stopping
        best_length = state.length
        if early == "never" and self.settings.length_penalty > 0.0:
            best_length = torch.full_like(state.length, self.settings.max_length - 1)
        best = scores[:, :1] / self._power(best_length)
        worst = finished.scores.min(dim=1, keepdim=True)[0]
        to_beat = torch.where(finished.valid, worst, NEVER)
        improvable = state.improvable & (best > to_beat).any(-1, keepdim=True)
        over = ~improvable.any() | (candidates.ended | ~state.active[:, None]).all()
        if early is True:
            over = over | finished.valid.all()
        return replace(
            state,
            tokens=take_beams(candidates.tokens, chosen),
            scores=scores,
            beams=take_beams(candidates.beams, chosen),
            finished=finished,
            improvable=improvable,
            length=state.length + 1,
            stopped=state.stopped | over,
            caches=caches,
        )

    def ended(self, state: BeamState) -> Tensor:
        """BoolTensor[B]: rows whose hypotheses no longer change."""
        ended = ~state.improvable.squeeze(1)
        if self.settings.early_stopping is True:
            ended = ended | state.finished.valid.all(1)
        return ended

    def best(self, state: BeamState) -> Tensor:
        """Tokens [B, K, L] of the hypotheses of each row, best first."""
        return state.finished.tokens

    def _candidates(self, state: BeamState, log_probs: Tensor) -> _Candidates:
        rows, beams = state.scores.shape
        vocab_size = log_probs.shape[-1]
        count = max(2, 1 + len(self.settings.ends)) * beams
        summed = log_probs.unflatten(0, (rows, beams)) + state.scores[:, :, None]
        scores, indices = summed.flatten(1).topk(count)
        beam = indices // vocab_size
        ids = indices % vocab_size
        here = torch.arange(state.tokens.shape[2], device=ids.device) == state.length
        tokens = torch.where(here, ids[:, :, None], take_beams(state.tokens, beam))
        ended = (ids[:, :, None] == self.ends).any(-1)
        full = state.length + 1 >= self.settings.max_length
        return _Candidates(tokens, scores, beam, ended | full)

    def _merge_finished(self, state: BeamState, candidates: _Candidates) -> Finished:
        """The K best of the finished hypotheses and the first K candidates that end here."""
        old, beams = state.finished, state.scores.shape[1]
        first = torch.arange(candidates.scores.shape[1], device=old.scores.device) < beams
        ended = candidates.ended & first
        # Without the start token, the candidates have state.length tokens.
        scores = candidates.scores / self._power(state.length)
        if self.settings.early_stopping is True:
            scores = scores + old.valid.all(1, keepdim=True).float() * NEVER
        scores = scores + (~state.improvable).float() * NEVER
        scores = scores + (~ended).float() * NEVER
        merged = torch.cat([old.scores, scores], dim=1)
        chosen = merged.topk(beams)[1]
        new = Finished(
            tokens=take_beams(torch.cat([old.tokens, candidates.tokens], dim=1), chosen),
            scores=take_beams(merged, chosen),
            valid=take_beams(torch.cat([old.valid, ended], dim=1), chosen),
        )
        return Finished(
            tokens=torch.where(state.stopped, old.tokens, new.tokens),
            scores=torch.where(state.stopped, old.scores, new.scores),
            valid=torch.where(state.stopped, old.valid, new.valid),
        )

    def _power(self, length: Tensor) -> Tensor:
        """``length`` to the power of ``length_penalty``, FloatTensor[1]."""
        return self._powers.index_select(0, length.view(1))


@dataclass(frozen=True)
class GreedyState:
    """The state of greedy search between two steps."""

    #: LongTensor[B, L]
    tokens: Tensor
    #: BoolTensor[B]: rows that have ended
    done: Tensor
    #: LongTensor[]: number of tokens so far, including the start token
    length: Tensor
    #: BoolTensor[]: all rows have ended
    stopped: Tensor
    #: LongTensor[B, S]
    source: Tensor
    caches: Caches

    #: each row continues itself
    beams = None

    def last_tokens(self) -> Tensor:
        """LongTensor[B, 1]: the decoder's next input."""
        return self.tokens.index_select(1, (self.length - 1).view(1))

    def select_rows(self, rows: Tensor) -> GreedyState:
        """The state of ``rows`` (LongTensor) only; the caches must be kept elsewhere."""
        return replace(
            self, tokens=self.tokens[rows], done=self.done[rows], source=self.source[rows]
        )


class GreedySearch:
    """Takes the most likely token of each row, one token per call of ``advance``."""

    def __init__(self, settings: SearchSettings, rules: Sequence[Rule], ends: Tensor) -> None:
        """``ends``: the end tokens, LongTensor[number of end tokens] on the device."""
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
        """The state after one more token, chosen by ``logits`` [B, V]."""
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
        """BoolTensor[B]: rows whose text no longer changes."""
        return state.done

    def best(self, state: GreedyState) -> Tensor:
        """Tokens [B, L]."""
        return state.tokens
