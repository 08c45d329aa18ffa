"""transformers' logits processors over tokens of a fixed length.

Each rule does what the processor of the same name does, but reads the number of tokens so far from
a tensor, so that one compiled graph serves every step.

Shapes: N rows (batch times beams), L longest length, S source length, V target vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s2s_scale.errors import UserError


@dataclass(frozen=True)
class History:
    """What has been written so far."""

    #: LongTensor[N, L]; places from ``length`` on hold no text yet
    tokens: Tensor
    #: LongTensor[]: tokens so far, the start token included; on the device
    length: Tensor
    #: LongTensor[N, S]
    source: Tensor


Rule = Callable[[History, Tensor], Tensor]


def make_rules(
    processors: Iterable[Any], *, vocab_size: int, max_length: int, device: torch.device
) -> list[Rule]:
    """The static rule for each of transformers' ``processors``, in their order.

    A rule takes the history and scores FloatTensor[N, V] and returns new scores. Raises
    ``UserError`` for a processor that has no static version.
    """
    rules = []
    for processor in processors:
        name = type(processor).__name__
        if name not in _MAKERS:
            raise UserError(
                f"{name}: this rule on the scores has no version with static shapes; leave its "
                "option out, or generate on a CPU or GPU profile"
            )
        rules.append(_MAKERS[name](processor, _Place(vocab_size, max_length, device)))
    return rules


@dataclass(frozen=True)
class _Place:
    vocab_size: int
    max_length: int
    device: torch.device

    def tokens_mask(self, ids: Iterable[int]) -> Tensor:
        """BoolTensor[V], true for ``ids``. Made on the host, once for all steps."""
        mask = torch.zeros(self.vocab_size, dtype=torch.bool)
        mask[list(ids)] = True
        return mask.to(self.device)

    def tensor(self, values: Sequence[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(self.device)


def _sequence_bias(processor: Any, place: _Place) -> Rule:
    bias_of: dict[tuple[int, ...], float] = processor.sequence_bias
    beyond = [ids for ids in bias_of if max(ids) >= place.vocab_size]
    if beyond:
        raise UserError(
            f"sequence_bias or bad_words_ids {list(beyond[0])}: the model's vocabulary ends at "
            f"{place.vocab_size - 1}"
        )
    always = torch.zeros(place.vocab_size)
    for ids, bias in bias_of.items():
        if len(ids) == 1:
            always[ids[0]] = bias
    always = always.to(place.device)
    groups = []
    for size in sorted({len(ids) for ids in bias_of if len(ids) > 1}):
        members = {ids: bias for ids, bias in bias_of.items() if len(ids) == size}
        groups.append(
            (
                place.tensor([ids[:-1] for ids in members], torch.long),
                place.tensor([ids[-1] for ids in members], torch.long),
                place.tensor(list(members.values()), torch.float32),
            )
        )

    def rule(history: History, scores: Tensor) -> Tensor:
        bias = always.expand(scores.shape).clone()
        for prefixes, last, values in groups:
            recent, known = _recent(history, prefixes.shape[1])
            matches = (recent[:, None, :] == prefixes).all(-1) & known
            bias = bias.index_add(1, last, torch.where(matches, values, 0.0))
        return scores + bias

    return rule


def _repetition_penalty(processor: Any, place: _Place) -> Rule:
    penalty = float(processor.penalty)

    def rule(history: History, scores: Tensor) -> Tensor:
        written = _positions(history.tokens) < history.length
        seen = _mark(torch.where(written, history.tokens, place.vocab_size), place.vocab_size)
        return torch.where(seen, _penalised(scores, penalty), scores)

    return rule


def _encoder_repetition_penalty(processor: Any, place: _Place) -> Rule:
    penalty = float(processor.penalty)

    def rule(history: History, scores: Tensor) -> Tensor:
        seen = _mark(history.source, place.vocab_size)
        return torch.where(seen, _penalised(scores, penalty), scores)

    return rule


def _no_repeat_ngram(processor: Any, place: _Place) -> Rule:
    size = int(processor.ngram_size)

    def rule(history: History, scores: Tensor) -> Tensor:
        if size > history.tokens.shape[1]:
            return scores
        ends = torch.arange(size - 1, history.tokens.shape[1], device=scores.device)
        return _ban(history, history.tokens, size, ends < history.length, scores)

    return rule


def _encoder_no_repeat_ngram(processor: Any, place: _Place) -> Rule:
    size = int(processor.ngram_size)

    def rule(history: History, scores: Tensor) -> Tensor:
        if size > history.source.shape[1]:
            return scores
        windows = history.source.shape[1] - size + 1
        known = torch.ones(windows, dtype=torch.bool, device=scores.device)
        return _ban(history, history.source, size, known, scores)

    return rule


def _ban(history: History, text: Tensor, size: int, known: Tensor, scores: Tensor) -> Tensor:
    """-inf for every token that would repeat an n-gram of ``text`` [N, T] in ``history``.

    ``known`` BoolTensor[T - size + 1] says which windows of ``text`` are there.
    """
    windows = text.shape[1] - size + 1
    recent, enough = _recent(history, size - 1)
    matches = (known & enough).expand(len(text), windows)
    for place in range(size - 1):
        matches = matches & (text[:, place : place + windows] == recent[:, place : place + 1])
    vocab_size = scores.shape[-1]
    banned = _mark(torch.where(matches, text[:, size - 1 :], vocab_size), vocab_size)
    return scores.masked_fill(banned, -math.inf)


def _min_length(processor: Any, place: _Place) -> Rule:
    ends = place.tokens_mask(processor.eos_token_id.tolist())
    if hasattr(processor, "min_new_tokens"):
        shortest = int(processor.prompt_length_to_skip) + int(processor.min_new_tokens)
    else:
        shortest = int(processor.min_length)

    def rule(history: History, scores: Tensor) -> Tensor:
        return scores.masked_fill(ends & (history.length < shortest), -math.inf)

    return rule


def _forced(ids: Sequence[int], at: int, place: _Place) -> Rule:
    wanted = place.tokens_mask(ids)

    def rule(history: History, scores: Tensor) -> Tensor:
        forced = torch.where(wanted, 0.0, -math.inf).expand(scores.shape)
        return torch.where(history.length == at, forced, scores)

    return rule


def _forced_bos(processor: Any, place: _Place) -> Rule:
    return _forced([int(processor.bos_token_id)], 1, place)


def _forced_eos(processor: Any, place: _Place) -> Rule:
    ids = processor.eos_token_id.reshape(-1).tolist()
    return _forced(ids, int(processor.max_length) - 1, place)


def _remove_invalid(processor: Any, place: _Place) -> Rule:
    def rule(history: History, scores: Tensor) -> Tensor:
        largest = torch.finfo(scores.dtype)
        clean = torch.where(scores != scores, 0.0, scores)
        return clean.clamp(largest.min, largest.max)

    return rule


def _exponential_decay(processor: Any, place: _Place) -> Rule:
    start, factor = int(processor.regulation_start), float(processor.regulation_factor)
    ends = place.tokens_mask(processor.eos_token_id.reshape(-1).tolist())
    growth = [pow(factor, max(n - start, 0)) - 1 for n in range(place.max_length + 1)]
    table = place.tensor(growth, torch.float32)

    def rule(history: History, scores: Tensor) -> Tensor:
        extra = scores.abs() * table.index_select(0, history.length.view(1))
        return torch.where(ends & scores.isfinite(), scores + extra, scores)

    return rule


def _suppress(processor: Any, place: _Place) -> Rule:
    banned = place.tokens_mask(processor.suppress_tokens.tolist())
    return lambda history, scores: scores.masked_fill(banned, -math.inf)


def _suppress_at_begin(processor: Any, place: _Place) -> Rule:
    banned = place.tokens_mask(processor.begin_suppress_tokens.tolist())
    begin = int(processor.begin_index)

    def rule(history: History, scores: Tensor) -> Tensor:
        return scores.masked_fill(banned & (history.length == begin), -math.inf)

    return rule


def _normalize(processor: Any, place: _Place) -> Rule:
    return lambda history, scores: scores.log_softmax(dim=-1)


def _positions(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device)


def _recent(history: History, count: int) -> tuple[Tensor, Tensor]:
    """The last ``count`` tokens LongTensor[N, count], and whether there are as many (Bool[])."""
    first = history.length - count
    places = (first + torch.arange(count, device=first.device)).clamp(min=0)
    return history.tokens.index_select(1, places), first >= 0


def _mark(ids: Tensor, vocab_size: int) -> Tensor:
    """BoolTensor[N, V], true for each row's ``ids`` [N, T]; ids from V on mark nothing."""
    marks = torch.zeros(len(ids), vocab_size + 1, dtype=torch.bool, device=ids.device)
    return marks.scatter(1, ids.clamp(max=vocab_size), True)[:, :vocab_size]


def _penalised(scores: Tensor, penalty: float) -> Tensor:
    return torch.where(scores < 0, scores * penalty, scores / penalty)


_MAKERS: dict[str, Callable[[Any, _Place], Rule]] = {
    "SequenceBiasLogitsProcessor": _sequence_bias,
    "NoBadWordsLogitsProcessor": _sequence_bias,
    "RepetitionPenaltyLogitsProcessor": _repetition_penalty,
    "EncoderRepetitionPenaltyLogitsProcessor": _encoder_repetition_penalty,
    "NoRepeatNGramLogitsProcessor": _no_repeat_ngram,
    "EncoderNoRepeatNGramLogitsProcessor": _encoder_no_repeat_ngram,
    "MinLengthLogitsProcessor": _min_length,
    "MinNewTokensLengthLogitsProcessor": _min_length,
    "ForcedBOSTokenLogitsProcessor": _forced_bos,
    "ForcedEOSTokenLogitsProcessor": _forced_eos,
    "InfNanRemoveLogitsProcessor": _remove_invalid,
    "ExponentialDecayLengthPenalty": _exponential_decay,
    "SuppressTokensLogitsProcessor": _suppress,
    "SuppressTokensAtBeginLogitsProcessor": _suppress_at_begin,
    "LogitNormalization": _normalize,
}
