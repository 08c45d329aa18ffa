"""Logits processors of transformers as functions of tensors with fixed shapes.

Each rule computes what the processor of the same name computes, but reads the number of tokens
generated so far from a tensor, so that a single compiled graph serves every step.

Shapes: N rows (batch times beams), L maximum length, S source length, V target vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from s2s_scale.errors import UserError


@dataclass(frozen=True)
class History:
    """The tokens generated so far."""

    #: LongTensor[N, L]; positions from ``length`` on are not generated yet
    tokens: Tensor
    #: LongTensor[]: number of tokens so far, including the start token; on the device
    length: Tensor
    #: LongTensor[N, S]
    source: Tensor


Rule = Callable[[History, Tensor], Tensor]


def make_rules(
    processors: Iterable[Any], *, vocab_size: int, max_length: int, device: torch.device
) -> list[Rule]:
    """The rule for each of transformers' ``processors``, in the same order.

    A rule takes the history and scores FloatTensor[N, V] and returns the new scores.

    Raises:
        UserError: a processor has no version with static shapes.
    """
    context = _Context(vocab_size, max_length, device)
    rules = []
    for processor in processors:
        name = type(processor).__name__
        if name not in _MAKERS:
            raise UserError(
                f"{name}: this logits processor has no version with static shapes; leave its "
                "option out, or generate on a CPU or GPU profile"
            )
        rules.append(_MAKERS[name](processor, context))
    return rules


@dataclass(frozen=True)
class _Context:
    vocab_size: int
    max_length: int
    device: torch.device

    def token_mask(self, ids: Iterable[int]) -> Tensor:
        """BoolTensor[V], true for ``ids``. Built on the host, once for all steps."""
        mask = torch.zeros(self.vocab_size, dtype=torch.bool)
        mask[list(ids)] = True
        return mask.to(self.device)

    def tensor(self, values: Sequence[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(self.device)


def _sequence_bias(processor: Any, context: _Context) -> Rule:
    bias_of: dict[tuple[int, ...], float] = processor.sequence_bias
    beyond = [ids for ids in bias_of if max(ids) >= context.vocab_size]
    if beyond:
        raise UserError(
            f"sequence_bias or bad_words_ids {list(beyond[0])}: expected token ids of at most "
            f"{context.vocab_size - 1}, the last one of the model's vocabulary"
        )
    unconditional = torch.zeros(context.vocab_size)
    for ids, bias in bias_of.items():
        if len(ids) == 1:
            unconditional[ids[0]] = bias
    unconditional = unconditional.to(context.device)
    by_size = []  # sequences of the same length: prefixes, last tokens, biases
    for size in sorted({len(ids) for ids in bias_of if len(ids) > 1}):
        members = {ids: bias for ids, bias in bias_of.items() if len(ids) == size}
        by_size.append(
            (
                context.tensor([ids[:-1] for ids in members], torch.long),
                context.tensor([ids[-1] for ids in members], torch.long),
                context.tensor(list(members.values()), torch.float32),
            )
        )

    def rule(history: History, scores: Tensor) -> Tensor:
        bias = unconditional.expand(scores.shape).clone()
        for prefixes, last, values in by_size:
            recent, enough = _recent(history, prefixes.shape[1])
            matches = (recent[:, None, :] == prefixes).all(-1) & enough
            bias = bias.index_add(1, last, torch.where(matches, values, 0.0))
        return scores + bias

    return rule


def _repetition_penalty(processor: Any, context: _Context, *, of_source: bool = False) -> Rule:
    penalty = float(processor.penalty)

    def rule(history: History, scores: Tensor) -> Tensor:
        if of_source:
            seen = _mark(history.source, context.vocab_size)
        else:
            positions = torch.arange(history.tokens.shape[1], device=history.tokens.device)
            ids = torch.where(positions < history.length, history.tokens, context.vocab_size)
            seen = _mark(ids, context.vocab_size)
        penalized = torch.where(scores < 0, scores * penalty, scores / penalty)
        return torch.where(seen, penalized, scores)

    return rule


def _no_repeat_ngram(processor: Any, context: _Context, *, of_source: bool = False) -> Rule:
    size = int(processor.ngram_size)

    def rule(history: History, scores: Tensor) -> Tensor:
        text = history.source if of_source else history.tokens  # [N, T]
        windows = text.shape[1] - size + 1
        if windows < 1:
            return scores
        recent, enough = _recent(history, size - 1)
        if of_source:
            complete = torch.ones(windows, dtype=torch.bool, device=scores.device)
        else:
            ends = torch.arange(size - 1, text.shape[1], device=scores.device)
            complete = ends < history.length
        matches = (complete & enough).expand(len(text), windows)
        for offset in range(size - 1):
            window = text[:, offset : offset + windows]
            matches = matches & (window == recent[:, offset : offset + 1])
        vocab_size = scores.shape[-1]
        banned = _mark(torch.where(matches, text[:, size - 1 :], vocab_size), vocab_size)
        return scores.masked_fill(banned, -math.inf)

    return rule


def _min_length(processor: Any, context: _Context) -> Rule:
    ends = context.token_mask(processor.eos_token_id.tolist())
    if hasattr(processor, "min_new_tokens"):
        shortest = int(processor.prompt_length_to_skip) + int(processor.min_new_tokens)
    else:
        shortest = int(processor.min_length)
    return lambda history, scores: scores.masked_fill(ends & (history.length < shortest), -math.inf)


def _forced_token(processor: Any, context: _Context) -> Rule:
    if hasattr(processor, "bos_token_id"):
        ids, position = [int(processor.bos_token_id)], 1
    else:
        ids = processor.eos_token_id.reshape(-1).tolist()
        position = int(processor.max_length) - 1
    wanted = context.token_mask(ids)

    def rule(history: History, scores: Tensor) -> Tensor:
        forced = torch.where(wanted, 0.0, -math.inf).expand(scores.shape)
        return torch.where(history.length == position, forced, scores)

    return rule


def _remove_invalid(processor: Any, context: _Context) -> Rule:
    def rule(history: History, scores: Tensor) -> Tensor:
        limits = torch.finfo(scores.dtype)
        without_nan = torch.where(scores != scores, 0.0, scores)
        return without_nan.clamp(limits.min, limits.max)

    return rule


def _exponential_decay(processor: Any, context: _Context) -> Rule:
    start, factor = int(processor.regulation_start), float(processor.regulation_factor)
    ends = context.token_mask(processor.eos_token_id.reshape(-1).tolist())
    growth = [pow(factor, max(n - start, 0)) - 1 for n in range(context.max_length + 1)]
    table = context.tensor(growth, torch.float32)

    def rule(history: History, scores: Tensor) -> Tensor:
        extra = scores.abs() * table.index_select(0, history.length.view(1))
        return torch.where(ends & scores.isfinite(), scores + extra, scores)

    return rule


def _suppress(processor: Any, context: _Context) -> Rule:
    if not hasattr(processor, "begin_suppress_tokens"):
        always = context.token_mask(processor.suppress_tokens.tolist())
        return lambda history, scores: scores.masked_fill(always, -math.inf)
    banned = context.token_mask(processor.begin_suppress_tokens.tolist())
    begin = int(processor.begin_index)
    return lambda history, scores: scores.masked_fill(banned & (history.length == begin), -math.inf)


def _normalize(processor: Any, context: _Context) -> Rule:
    return lambda history, scores: scores.log_softmax(dim=-1)


def _recent(history: History, count: int) -> tuple[Tensor, Tensor]:
    """The last ``count`` tokens LongTensor[N, count], and whether there are that many: Bool[]."""
    first = history.length - count
    positions = (first + torch.arange(count, device=first.device)).clamp(min=0)
    return history.tokens.index_select(1, positions), first >= 0


def _mark(ids: Tensor, vocab_size: int) -> Tensor:
    """BoolTensor[N, V], true for the ``ids`` [N, T] of each row; ids from V on are ignored."""
    marks = torch.zeros(len(ids), vocab_size + 1, dtype=torch.bool, device=ids.device)
    return marks.scatter(1, ids.clamp(max=vocab_size), True)[:, :vocab_size]


_MAKERS: dict[str, Callable[[Any, _Context], Rule]] = {
    "SequenceBiasLogitsProcessor": _sequence_bias,
    "NoBadWordsLogitsProcessor": _sequence_bias,
    "RepetitionPenaltyLogitsProcessor": _repetition_penalty,
    "EncoderRepetitionPenaltyLogitsProcessor": partial(_repetition_penalty, of_source=True),
    "NoRepeatNGramLogitsProcessor": _no_repeat_ngram,
    "EncoderNoRepeatNGramLogitsProcessor": partial(_no_repeat_ngram, of_source=True),
    "MinLengthLogitsProcessor": _min_length,
    "MinNewTokensLengthLogitsProcessor": _min_length,
    "ForcedBOSTokenLogitsProcessor": _forced_token,
    "ForcedEOSTokenLogitsProcessor": _forced_token,
    "InfNanRemoveLogitsProcessor": _remove_invalid,
    "ExponentialDecayLengthPenalty": _exponential_decay,
    "SuppressTokensLogitsProcessor": _suppress,
    "SuppressTokensAtBeginLogitsProcessor": _suppress,
    "LogitNormalization": _normalize,
}
