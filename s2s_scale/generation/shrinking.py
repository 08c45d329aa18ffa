"""``model.generate`` in batches that shrink: a row that has ended is not computed any more.

transformers prepares everything (options, encoder, caches, rules on the scores) and hands over to
the loop here, which it offers as ``custom_generate``; what this loop does not know runs in
transformers' own. Tokens are chosen by the searches of ``static_generation``, whose results are
transformers'.

Three things save work, and none changes what is computed for a row: rows that have ended leave the
batch; the first token is computed once per row, not once per beam; keys and values of the source,
which all beams of a row share, are not put in a new order at every step.

Shapes: B rows, K beams, N = B * K, S source length, L longest length, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import BaseModelOutput

from s2s_scale.generation.compat import any_rank_goes_on, reorders_own_cache
from s2s_scale.generation.logits_rules import History, Rule, make_rules
from s2s_scale.generation.options import SearchSettings, settings_of
from s2s_scale.generation.search import BeamSearch, GreedySearch
from s2s_scale.generation.static import longest_text
from s2s_scale.generation.static_cache import NO_CACHES

LOOK_EVERY = 8
"""Steps between two looks at an accelerator's answer which rows have ended: each waits for it."""
LEAVE_TOGETHER = 8
"""Rows leave once they are one in so many: the caches of those that stay are copied then."""

_OTHER_LOOPS = ("assistant_model", "streamer", "custom_generate", "tokenizer", "stop_strings")
_MORE_THAN_TOKENS = (
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
)
_KNOWN_INPUTS = {
    "attention_mask",
    "encoder_outputs",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
}
#: transformers' rules that look at a row's own tokens and nothing else
_ROW_BY_ROW = {
    "SequenceBiasLogitsProcessor",
    "NoBadWordsLogitsProcessor",
    "RepetitionPenaltyLogitsProcessor",
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "ExponentialDecayLengthPenalty",
    "SuppressTokensLogitsProcessor",
    "SuppressTokensAtBeginLogitsProcessor",
    "LogitNormalization",
}
#: those that look at the batch's sources, or row after row in Python: ours do neither
_OURS = {"NoRepeatNGramLogitsProcessor", "EncoderNoRepeatNGramLogitsProcessor"}


class _LeftToTransformersError(Exception):
    """The prepared call is one that transformers' own loop alone serves."""


def generate(model: PreTrainedModel, *, synced_gpus: bool = False, **options: Any) -> Any:
    """``model.generate(**options)``, in a batch that shrinks where the options allow it.

    Greedy and beam search of encoder-decoder models shrink. Sampling, assisted generation, outputs
    besides token ids, caches of other kinds, and rules on scores or stopping that may look at the
    whole batch run in transformers' own loop. ``synced_gpus``: every rank must call, and takes part
    in every step until all ranks have ended (ZeRO 3).
    """
    whole: Any = model.generate
    if synced_gpus:
        options["synced_gpus"] = True
    if any(options.get(name) is not None for name in _OTHER_LOOPS):
        return whole(**options)
    try:
        return whole(**options, custom_generate=_ShrinkingLoop(synced_gpus))
    except _LeftToTransformersError:
        return whole(**options)


class _ShrinkingLoop:
    """Called by ``generate`` of transformers in the place of its own loop."""

    def __init__(self, synced: bool) -> None:
        self._synced = synced

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        inputs_tensor: Tensor,
        **model_kwargs: Any,
    ) -> Tensor:
        """Token ids [B * num_return_sequences, T].

        ``input_ids`` [N, 1]: the start tokens; ``inputs_tensor`` [B, S]: the sources.
        """
        settings = _settings(input_ids, logits_processor, generation_config)
        known = (
            _known_options(generation_config)
            and _known_inputs(model, inputs_tensor, input_ids, model_kwargs)
            and all(type(c) in (MaxLengthCriteria, EosTokenCriteria) for c in stopping_criteria)
            and all(type(p).__name__ in _ROW_BY_ROW | _OURS for p in logits_processor)
        )
        if not known:
            raise _LeftToTransformersError
        decoder = _Decoder(model, model_kwargs, beams=settings.num_beams)
        return _run(decoder, settings, inputs_tensor, synced=self._synced)


def _settings(starts: Tensor, processors: Iterable[Any], config: Any) -> SearchSettings:
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.BEAM_SEARCH):
        raise _LeftToTransformersError
    if starts.shape[1] != 1 or bool((starts != starts[0]).any()):
        raise _LeftToTransformersError
    return settings_of(config, start=int(starts[0]), processors=tuple(processors))


def _known_options(config: Any) -> bool:
    unusual = [*_MORE_THAN_TOKENS, "prefill_chunk_size", "low_memory", "token_healing"]
    return bool(config.use_cache) and not any(getattr(config, name, None) for name in unusual)


def _known_inputs(
    model: Any, source: Tensor, starts: Tensor, model_kwargs: Mapping[str, Any]
) -> bool:
    given = {name for name, value in model_kwargs.items() if value is not None}
    cache = model_kwargs.get("past_key_values")
    return (
        given <= _KNOWN_INPUTS
        and {"encoder_outputs", "past_key_values"} <= given
        and source.dim() == 2
        and not source.is_floating_point()
        and source.device == starts.device == model.device
        and not reorders_own_cache(model)
        and type(cache) is EncoderDecoderCache
        and type(cache.self_attention_cache) is DynamicCache
        and type(cache.cross_attention_cache) is DynamicCache
        and cache.get_seq_length() == 0
    )


def _run(decoder: _Decoder, settings: SearchSettings, source: Tensor, *, synced: bool) -> Tensor:
    """The loop: one step per token until the limit, or until all rows have ended."""
    kind: Any = GreedySearch if settings.num_beams == 1 else BeamSearch
    ends = torch.tensor(settings.ends, dtype=torch.long, device=source.device)
    starts = torch.full_like(source[:, :1], settings.start)
    logits = decoder.first(starts)
    written = _Written(logits.shape[-1], settings.max_length)
    search = kind(settings, [written.rule(p, source.device) for p in settings.processors], ends)
    everyone = torch.ones(len(source), dtype=torch.bool, device=source.device)
    state = search.begin(source, everyone, NO_CACHES)
    results = search.best(state).clone()
    places = torch.arange(len(source), device=source.device)
    look_every = 1 if synced or source.device.type == "cpu" else LOOK_EVERY
    while True:
        state = search.advance(state, logits, NO_CACHES)
        written.tokens += 1
        over = written.tokens == settings.max_length
        stay = None
        if not over and written.tokens % look_every == 0:
            stay = _staying(search.ended(state) | state.stopped)
            over = stay is not None and len(stay) == 0
        if over:
            break
        if synced:
            decoder.others_go_on(finished=False)
        order = _order(state.beams, stay, settings.num_beams)
        if stay is not None:
            results[places] = search.best(state)
            state, places = state.of_rows(stay), places[stay]
            decoder.keep_rows(stay)
        logits = decoder.next(state.last_tokens(), order)
    results[places] = search.best(state)
    while synced and decoder.others_go_on(finished=True):
        decoder.next(state.last_tokens(), None)
    results = results.view(len(source), -1, settings.max_length)
    results = results[:, : settings.num_return_sequences].flatten(0, 1)
    return results[:, : longest_text(results, settings.ends)]


def _staying(ended: Tensor) -> Tensor | None:
    """Which rows of the batch go on; None where too few have ended to make it smaller."""
    stay = (~ended).nonzero().squeeze(1)
    gone = len(ended) - len(stay)
    return stay if gone and (gone * LEAVE_TOGETHER >= len(ended) or not len(stay)) else None


def _order(beams: Tensor | None, rows: Tensor | None, count: int) -> Tensor | None:
    """LongTensor: which places of the old batch [N] the new one goes on from; None: all as is.

    ``beams`` [B, K]: the beam that each beam goes on from. ``rows``: those that stay.
    """
    if beams is None:
        return rows
    first = torch.arange(len(beams), device=beams.device)[:, None] * count
    order = first + beams
    return (order if rows is None else order[rows]).flatten()


class _Written:
    """How many tokens there are, the start token included, for transformers' rules on scores."""

    def __init__(self, vocab_size: int, max_length: int) -> None:
        self.tokens = 1
        self._sizes = {"vocab_size": vocab_size, "max_length": max_length}

    def rule(self, processor: Any, device: torch.device) -> Rule:
        if type(processor).__name__ in _OURS:
            return make_rules([processor], device=device, **self._sizes)[0]

        def rule(history: History, scores: Tensor) -> Tensor:
            changed: Tensor = processor(history.tokens[:, : self.tokens], scores)
            return changed

        return rule


class _Decoder:
    """Scores next tokens, over the caches that ``generate`` has prepared."""

    def __init__(self, model: Any, model_kwargs: Mapping[str, Any], *, beams: int) -> None:
        """``model_kwargs``: tensors [N, ...], the beams of a row next to each other."""
        self._model = model
        self._beams = beams
        self._inputs = dict(model_kwargs)

    def first(self, starts: Tensor) -> Tensor:
        """Logits [B, V] after the start tokens [B, 1]; a row's beams are equal until then."""
        once = {name: self._one_beam(value) for name, value in self._inputs.items()}
        logits = self._call(starts, once, is_first_iteration=True)
        cache: EncoderDecoderCache = self._inputs["past_key_values"]
        if any(type(layer) is not DynamicLayer for layer in _layers(cache)):
            raise _LeftToTransformersError
        if self._beams > 1:
            cache.batch_repeat_interleave(self._beams)
        return logits

    def next(self, tokens: Tensor, order: Tensor | None) -> Tensor:
        """Logits [N, V] after ``tokens`` [B, K], which go on from the places ``order`` [N]."""
        if order is not None:
            self._inputs["past_key_values"].self_attention_cache.reorder_cache(order)
        return self._call(tokens.reshape(-1, 1), self._inputs, is_first_iteration=False)

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all other rows, but for the tokens' keys and values, which get a new order."""
        beams = torch.arange(self._beams, device=rows.device)
        places = (rows[:, None] * self._beams + beams).flatten()
        self._inputs["past_key_values"].cross_attention_cache.reorder_cache(places)
        encoded = self._inputs["encoder_outputs"].last_hidden_state
        self._inputs["encoder_outputs"] = BaseModelOutput(encoded.index_select(0, places))
        if (mask := self._inputs.get("attention_mask")) is not None:
            self._inputs["attention_mask"] = mask.index_select(0, places)

    def others_go_on(self, *, finished: bool) -> bool:
        """Whether any rank goes on; every rank must call it before each step."""
        return any_rank_goes_on(self._model, finished=finished)

    def _call(self, tokens: Tensor, inputs: Mapping[str, Any], **options: Any) -> Tensor:
        prepared = self._model.prepare_inputs_for_generation(
            tokens, next_sequence_length=1, **options, **inputs
        )
        logits: Tensor = self._model(**prepared, return_dict=True).logits[:, -1]
        return logits

    def _one_beam(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[:: self._beams]
        if hasattr(value, "last_hidden_state"):
            return BaseModelOutput(value.last_hidden_state[:: self._beams])
        return value


def _layers(cache: EncoderDecoderCache) -> list[Any]:
    return [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
