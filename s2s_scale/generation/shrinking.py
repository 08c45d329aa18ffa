"""``model.generate`` in batches that shrink: rows that have ended are no longer computed.

transformers prepares everything (options, encoder output, caches, logits processors) and calls the
loop in this file through its ``custom_generate`` option; calls that this loop does not support run
in transformers' own. Tokens are chosen by ``BeamSearch`` and ``GreedySearch``, whose results equal
those of transformers.

Three things save work, and none changes what is computed for a row: rows that have ended leave the
batch; the first token is computed once per row instead of once per beam; and the keys and values of
the source, which all beams of a row share, are not reordered at every step.

Shapes: B rows, K beams, N = B * K, S source length, L maximum length, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import BaseModelOutput

from s2s_scale.generation.compat import any_rank_unfinished, reorders_own_cache
from s2s_scale.generation.logits_rules import Rule, make_rules
from s2s_scale.generation.options import SearchSettings, settings_of
from s2s_scale.generation.search import BeamSearch, GreedySearch
from s2s_scale.generation.static import longest_text
from s2s_scale.generation.static_cache import NO_CACHES

CHECK_EVERY = 8
"""Steps between two reads from an accelerator of which rows have ended: each read waits for it."""
MIN_SHARE = 8
"""Rows leave once they are one in this many, since the caches of the others are then copied."""

_OTHER_LOOPS = ("assistant_model", "streamer", "custom_generate", "tokenizer", "stop_strings")
_UNSUPPORTED = (
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
    "prefill_chunk_size",
    "low_memory",
    "token_healing",
)
_SUPPORTED_INPUTS = {
    "attention_mask",
    "encoder_outputs",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
}
#: transformers' logits processors that depend on nothing but a row's own tokens
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
#: those that use the sources of the whole batch, or loop over rows in Python; ours do neither
_REPLACED = {"NoRepeatNGramLogitsProcessor", "EncoderNoRepeatNGramLogitsProcessor"}


class _UnsupportedCallError(Exception):
    """Only transformers' own loop supports the prepared call."""


def generate(model: PreTrainedModel, *, synced_gpus: bool = False, **options: Any) -> Any:
    """``model.generate(**options)``, in a batch that shrinks if the options allow it.

    Greedy and beam search of encoder-decoder models shrink. Sampling, assisted generation, outputs
    other than token ids, other kinds of caches, and logits processors or stopping criteria that may
    depend on the whole batch run in transformers' own loop.

    Args:
        model: the model, whose generation config applies.
        synced_gpus: every rank takes part in every step until all ranks have finished, which ZeRO 3
            needs; every rank must call.
        options: those of ``model.generate``.
    """
    whole: Any = model.generate
    if synced_gpus:
        options["synced_gpus"] = True
    if any(options.get(name) is not None for name in _OTHER_LOOPS):
        return whole(**options)
    try:
        return whole(**options, custom_generate=_ShrinkingLoop(synced_gpus))
    except _UnsupportedCallError:
        return whole(**options)


class _ShrinkingLoop:
    """What transformers' ``generate`` calls in place of its own loop."""

    def __init__(self, synced: bool) -> None:
        self._synced = synced
        self._length = 1  # number of tokens so far, including the start token

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
        config, mode = generation_config, generation_config.get_generation_mode()
        supported = (
            mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.BEAM_SEARCH)
            and input_ids.shape[1] == 1
            and bool((input_ids == input_ids[0]).all())
            and config.use_cache
            and not any(getattr(config, name, None) for name in _UNSUPPORTED)
            and all(type(c) in (MaxLengthCriteria, EosTokenCriteria) for c in stopping_criteria)
            and all(type(p).__name__ in _ROW_BY_ROW | _REPLACED for p in logits_processor)
            and _supports_inputs(model, inputs_tensor, input_ids, model_kwargs)
        )
        if not supported:
            raise _UnsupportedCallError
        processors = tuple(logits_processor)
        settings = settings_of(config, start=int(input_ids[0]), processors=processors)
        decoder = _Decoder(model, model_kwargs, beams=settings.num_beams)
        return self._run(decoder, settings, inputs_tensor)

    def _run(self, decoder: _Decoder, settings: SearchSettings, source: Tensor) -> Tensor:
        """One step per token, up to the limit or until all rows have ended."""
        device, beams = source.device, settings.num_beams
        kind: Any = GreedySearch if beams == 1 else BeamSearch
        ends = torch.tensor(settings.ends, dtype=torch.long, device=device)
        logits = decoder.first(torch.full_like(source[:, :1], settings.start))
        rules = [self._rule(p, logits, settings.max_length) for p in settings.processors]
        search = kind(settings, rules, ends)
        all_active = torch.ones(len(source), dtype=torch.bool, device=device)
        state = search.begin(source, all_active, NO_CACHES)
        results = search.best(state).clone()
        rows = torch.arange(len(source), device=device)  # the rows that are in the batch
        check_every = 1 if self._synced or device.type == "cpu" else CHECK_EVERY
        while True:
            state = search.advance(state, logits, NO_CACHES)
            self._length += 1
            over, stay = self._length == settings.max_length, None
            if not over and self._length % check_every == 0:
                ended = search.ended(state) | state.stopped
                stay = (~ended).nonzero().squeeze(1)
                over, gone = len(stay) == 0, len(ended) - len(stay)
                if gone == 0 or gone * MIN_SHARE < len(ended):
                    stay = None
            if over:
                break
            if self._synced:
                any_rank_unfinished(decoder.model, finished=False)
            order = stay  # which of the N running texts each of the next ones continues
            if state.beams is not None:
                first = torch.arange(len(state.beams), device=device)[:, None] * beams
                order = first + state.beams
                order = (order if stay is None else order[stay]).flatten()
            if stay is not None:
                results[rows] = search.best(state)
                state, rows = state.select_rows(stay), rows[stay]
                decoder.keep_rows(stay)
            logits = decoder.next(state.last_tokens(), order)
        results[rows] = search.best(state)
        while self._synced and any_rank_unfinished(decoder.model, finished=True):
            decoder.next(state.last_tokens(), None)
        results = results.view(len(source), -1, settings.max_length)
        results = results[:, : settings.num_return_sequences].flatten(0, 1)
        return results[:, : longest_text(results, settings.ends)]

    def _rule(self, processor: Any, logits: Tensor, max_length: int) -> Rule:
        """transformers' ``processor`` as a rule, or our version of it if theirs will not do."""
        if type(processor).__name__ in _REPLACED:
            vocab_size = logits.shape[-1]
            (rule,) = make_rules(
                [processor], vocab_size=vocab_size, max_length=max_length, device=logits.device
            )
            return rule
        return lambda history, scores: processor(history.tokens[:, : self._length], scores)


def _supports_inputs(
    model: Any, source: Tensor, starts: Tensor, model_kwargs: Mapping[str, Any]
) -> bool:
    given = {name for name, value in model_kwargs.items() if value is not None}
    cache = model_kwargs.get("past_key_values")
    return (
        given <= _SUPPORTED_INPUTS
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


class _Decoder:
    """Scores next tokens, with the caches that ``generate`` has prepared."""

    def __init__(self, model: Any, model_kwargs: Mapping[str, Any], *, beams: int) -> None:
        """``model_kwargs``: tensors [N, ...], the beams of a row next to each other."""
        self.model = model
        self._beams = beams
        self._inputs = dict(model_kwargs)

    def first(self, starts: Tensor) -> Tensor:
        """Logits [B, V] after the start tokens [B, 1], when all beams of a row are equal."""
        once = dict(self._inputs)
        for name, value in once.items():
            if isinstance(value, Tensor):
                once[name] = value[:: self._beams]
            elif hasattr(value, "last_hidden_state"):
                once[name] = BaseModelOutput(value.last_hidden_state[:: self._beams])
        logits = self._call(starts, once, is_first_iteration=True)
        cache: EncoderDecoderCache = self._inputs["past_key_values"]
        layers = [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
        if any(type(layer) is not DynamicLayer for layer in layers):
            raise _UnsupportedCallError
        if self._beams > 1:
            cache.batch_repeat_interleave(self._beams)
        return logits

    def next(self, tokens: Tensor, order: Tensor | None) -> Tensor:
        """Logits [N, V] after ``tokens`` [B, K].

        ``order`` LongTensor[N]: which of the previous texts each one continues; ``None`` if each
        continues itself.
        """
        if order is not None:
            self._inputs["past_key_values"].self_attention_cache.reorder_cache(order)
        return self._call(tokens.reshape(-1, 1), self._inputs, is_first_iteration=False)

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all other rows, except from the target's keys and values, which ``next`` reorders.

        ``rows``: LongTensor of positions in the batch.
        """
        beams = torch.arange(self._beams, device=rows.device)
        indices = (rows[:, None] * self._beams + beams).flatten()
        self._inputs["past_key_values"].cross_attention_cache.reorder_cache(indices)
        encoded = self._inputs["encoder_outputs"].last_hidden_state
        self._inputs["encoder_outputs"] = BaseModelOutput(encoded.index_select(0, indices))
        if (mask := self._inputs.get("attention_mask")) is not None:
            self._inputs["attention_mask"] = mask.index_select(0, indices)

    def _call(self, tokens: Tensor, inputs: Mapping[str, Any], **options: Any) -> Tensor:
        prepared = self.model.prepare_inputs_for_generation(
            tokens, next_sequence_length=1, **options, **inputs
        )
        logits: Tensor = self.model(**prepared, return_dict=True).logits[:, -1]
        return logits
