"""Beam search over tensors of fixed shapes, with transformers' semantics.

The semantics are those of ``GenerationMixin._beam_search`` of transformers 5: candidates are the
best ``max(2, 1 + end tokens) * K`` continuations of each row, hypotheses that end within the first
K of them are kept by score over length to the power of ``length_penalty``, and all rows go on until
none can improve. What it computes in Python numbers (lengths, powers of them, the decision to stop)
stays on the device here.

Shapes: B rows, K beams, C candidates, L longest length, V target vocabulary.

Greedy search over tensors of fixed shapes.

Shapes: B rows, L longest length, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from s2s_scale.generation.logits_rules import History, Rule
from s2s_scale.generation.options import SearchSettings
from s2s_scale.generation.static_cache import Caches, take_beams

#: transformers' score of what must not be chosen
NEVER = -1.0e9


@dataclass(frozen=True)
class Finished:
    """The best ended hypotheses of each row, best first."""

    #: LongTensor[B, K, L]
    tokens: Tensor
    #: FloatTensor[B, K], with the length penalty
    scores: Tensor
    #: BoolTensor[B, K]: whether the place holds a hypothesis yet
    taken: Tensor


@dataclass(frozen=True)
class BeamState:
    """Everything that beam search carries from step to step."""

    #: LongTensor[B, K, L]: the beams that go on
    tokens: Tensor
    #: FloatTensor[B, K]: their summed log probabilities
    scores: Tensor
    #: LongTensor[B, K]: the beam of the last step that each goes on from
    beams: Tensor
    finished: Finished
    #: BoolTensor[B, 1]: a beam that goes on can still be better than what has ended
    improvable: Tensor
    #: BoolTensor[B]: rows that stand for something
    active: Tensor
    #: LongTensor[]: tokens so far, the start token included
    length: Tensor
    #: BoolTensor[]: the search is over; what has ended does not change any more
    stopped: Tensor
    source: Tensor
    caches: Caches

    def last_tokens(self) -> Tensor:
        """LongTensor[B, K]: what the decoder reads next."""
        return self.tokens.index_select(2, (self.length - 1).view(1)).squeeze(2)

    def of_rows(self, rows: Tensor) -> BeamState:
        """The state of the chosen ``rows`` (LongTensor) alone, where caches are kept elsewhere."""
        old = self.finished
        return replace(
            self,
            tokens=self.tokens[rows],
            scores=self.scores[rows],
            beams=self.beams[rows],
            finished=Finished(old.tokens[rows], old.scores[rows], old.taken[rows]),
            improvable=self.improvable[rows],
            active=self.active[rows],
            source=self.source.unflatten(0, self.scores.shape)[rows].flatten(0, 1),
        )


@dataclass(frozen=True)
class _Candidates:
    """The best continuations [B, C] of each row."""

    tokens: Tensor
    scores: Tensor
    beams: Tensor
    #: whether the continuation ends here
    hits: Tensor


class BeamSearch:
    """Keeps the K best beams, step by step."""

    def __init__(self, settings: SearchSettings, rules: Sequence[Rule], ends: Tensor) -> None:
        """``ends`` LongTensor[number of end tokens], on the device."""
        self.settings, self.rules, self.ends = settings, rules, ends
        powers = [max(n, 1) ** settings.length_penalty for n in range(settings.max_length + 1)]
        self._powers = torch.tensor(powers, dtype=torch.float32).to(ends.device)

    def begin(self, source: Tensor, active: Tensor, caches: Caches) -> BeamState:
        """The state before the first token; rows that are not ``active`` [B] never go on."""
        beams = self.settings.num_beams
        shape = (len(source), beams, self.settings.max_length)
        tokens = torch.full(shape, self.settings.filler, dtype=torch.long, device=source.device)
        tokens[:, :, 0] = self.settings.start
        nothing = torch.full(shape[:2], NEVER, device=source.device)
        scores = nothing.clone()
        scores[:, 0] = 0.0  # one beam alone goes on from the start token: the others equal it
        zeros = torch.zeros(shape[:2], dtype=torch.long, device=source.device)
        idle = (~active)[:, None].expand(shape[:2])
        return BeamState(
            tokens=tokens,
            scores=scores,
            beams=zeros,
            finished=Finished(tokens.clone(), nothing, idle.clone()),
            improvable=active[:, None],
            active=active,
            length=zeros[0, 0] + 1,
            stopped=(~active).all(),
            source=source.repeat_interleave(beams, dim=0),
            caches=caches,
        )

    def advance(self, state: BeamState, logits: Tensor, caches: Caches) -> BeamState:
        """The state after one more token, by ``logits`` [B * K, V] (or [B, V]: all beams alike)."""
        rows, beams = state.scores.shape
        log_probs = logits.float().log_softmax(dim=-1)
        if len(log_probs) == rows != rows * beams:
            log_probs = log_probs.repeat_interleave(beams, dim=0)
        history = History(state.tokens.flatten(0, 1), state.length, state.source)
        for rule in self.rules:
            log_probs = rule(history, log_probs)
        candidates = self._candidates(state, log_probs)
        finished = self._finish(state, candidates)
        state = replace(self._go_on(state, candidates), caches=caches, finished=finished)
        return self._judge(state, candidates)

    def ended(self, state: BeamState) -> Tensor:
        """BoolTensor[B]: rows whose hypotheses do not change any more."""
        ended = ~state.improvable.squeeze(1)
        if self.settings.early_stopping is True:
            ended = ended | state.finished.taken.all(1)
        return ended

    def best(self, state: BeamState) -> Tensor:
        """Tokens [B, K, L] of each row's hypotheses, best first."""
        return state.finished.tokens

    def _candidates(self, state: BeamState, log_probs: Tensor) -> _Candidates:
        rows, beams = state.scores.shape
        vocab_size = log_probs.shape[-1]
        count = max(2, 1 + len(self.settings.ends)) * beams
        summed = log_probs.unflatten(0, (rows, beams)) + state.scores[:, :, None]
        scores, places = summed.flatten(1).topk(count)
        beam = places // vocab_size
        ids = places % vocab_size
        here = torch.arange(state.tokens.shape[2], device=ids.device) == state.length
        tokens = torch.where(here, ids[:, :, None], take_beams(state.tokens, beam))
        ended = (ids[:, :, None] == self.ends).any(-1)
        full = state.length + 1 >= self.settings.max_length
        return _Candidates(tokens, scores, beam, ended | full)

    def _go_on(self, state: BeamState, candidates: _Candidates) -> BeamState:
        """The K best candidates that have not ended."""
        scores = candidates.scores + candidates.hits.float() * NEVER
        chosen = scores.topk(state.scores.shape[1])[1]
        return replace(
            state,
            tokens=take_beams(candidates.tokens, chosen),
            scores=take_beams(scores, chosen),
            beams=take_beams(candidates.beams, chosen),
            length=state.length + 1,
        )

    def _finish(self, state: BeamState, candidates: _Candidates) -> Finished:
        """The K best of what had ended and of the first K candidates that end here."""
        old, beams = state.finished, state.scores.shape[1]
        first = torch.arange(candidates.scores.shape[1], device=old.scores.device) < beams
        ended = candidates.hits & first
        # The start token does not count: this is the candidates' number of generated tokens.
        scores = candidates.scores / self._power(state.length)
        if self.settings.early_stopping is True:
            scores = scores + old.taken.all(1, keepdim=True).float() * NEVER
        scores = scores + (~state.improvable).float() * NEVER
        scores = scores + (~ended).float() * NEVER
        merged = torch.cat([old.scores, scores], dim=1)
        chosen = merged.topk(beams)[1]
        new = Finished(
            tokens=take_beams(torch.cat([old.tokens, candidates.tokens], dim=1), chosen),
            scores=take_beams(merged, chosen),
            taken=take_beams(torch.cat([old.taken, ended], dim=1), chosen),
        )
        return Finished(
            tokens=torch.where(state.stopped, old.tokens, new.tokens),
            scores=torch.where(state.stopped, old.scores, new.scores),
            taken=torch.where(state.stopped, old.taken, new.taken),
        )

    def _judge(self, state: BeamState, candidates: _Candidates) -> BeamState:
        """Whether each row can still improve, and whether the search is over."""
        finished, early = state.finished, self.settings.early_stopping
        if early == "never" and self.settings.length_penalty > 0.0:
            best_length = torch.full_like(state.length, self.settings.max_length - 1)
        else:
            best_length = state.length - 1
        best = state.scores[:, :1] / self._power(best_length)
        lowest = finished.scores.min(dim=1, keepdim=True)[0]
        to_beat = torch.where(finished.taken, lowest, NEVER)
        improvable = state.improvable & (best > to_beat).any(-1, keepdim=True)
        over = ~improvable.any() | (candidates.hits | ~state.active[:, None]).all()
        if early is True:
            over = over | finished.taken.all()
        return replace(state, improvable=improvable, stopped=state.stopped | over)

    def _power(self, length: Tensor) -> Tensor:
        """``length`` to the power of ``length_penalty``, FloatTensor[1]."""
        return self._powers.index_select(0, length.view(1))


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
