"""Generation options, merged and checked as transformers' ``generate`` does it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from s2s_scale.errors import UserError, raise_problems
from s2s_scale.generation.compat import (
    generation_config,
    score_processors,
    set_lengths,
    special_tokens,
)

_SEARCH = "use greedy or beam search (do_sample=False, num_beams=N)"
_TOKENS = "leave it out: token ids alone are returned"
_ELSEWHERE = "leave it out, or generate on a CPU or GPU profile"

#: options that cannot be static -> (values under which they do nothing, what to use instead)
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "do_sample": ((False,), _SEARCH),
    "penalty_alpha": ((0, 0.0), _SEARCH),
    "dola_layers": ((), _SEARCH),
    "num_beam_groups": ((1,), _SEARCH),
    "diversity_penalty": ((0, 0.0), _SEARCH),
    "constraints": ((), "use forced_bos_token_id, sequence_bias or bad_words_ids"),
    "force_words_ids": ((), "use forced_bos_token_id, sequence_bias or bad_words_ids"),
    "prefix_allowed_tokens_fn": ((), "use suppress_tokens, sequence_bias or bad_words_ids"),
    "logits_processor": ((), "use the options of generation_config, or " + _ELSEWHERE),
    "stopping_criteria": ((), "use max_length or eos_token_id"),
    "max_time": ((), "use max_length or max_new_tokens"),
    "stop_strings": ((), "use eos_token_id"),
    "guidance_scale": ((1, 1.0), _ELSEWHERE),
    "watermarking_config": ((), _ELSEWHERE),
    "token_healing": ((False,), _ELSEWHERE),
    "assistant_model": ((), _SEARCH),
    "prompt_lookup_num_tokens": ((), _SEARCH),
    "assistant_early_exit": ((), _SEARCH),
    "use_mtp": ((False,), _SEARCH),
    "streamer": ((), _ELSEWHERE),
    "decoder_input_ids": ((), "use forced_bos_token_id for the first token, or " + _ELSEWHERE),
    "encoder_outputs": ((), "give input_ids"),
    "inputs_embeds": ((), "give input_ids"),
    "past_key_values": ((), _ELSEWHERE),
    "cache_implementation": (("static",), "leave it out: the cache is static always"),
    "prefill_chunk_size": ((), _ELSEWHERE),
    "low_memory": ((False,), "lower num_beams or the batch size"),
    "return_dict_in_generate": ((False,), _TOKENS),
    "output_scores": ((False,), _TOKENS),
    "output_logits": ((False,), _TOKENS),
    "output_attentions": ((False,), _TOKENS),
    "output_hidden_states": ((False,), _TOKENS),
}


@dataclass(frozen=True)
class SearchSettings:
    """What a search needs to know. Lengths count tokens, the start token included."""

    max_length: int
    num_beams: int
    num_return_sequences: int
    length_penalty: float
    early_stopping: bool | str
    start: int
    #: written after a row's end by greedy search; ``None`` only where no token ends a row
    pad: int | None
    ends: tuple[int, ...]
    #: transformers' own score processors for these options, in its order
    processors: tuple[Any, ...]

    @property
    def filler(self) -> int:
        """What beam search fills unused places with (where the pad id is 0: the end token)."""
        if not self.ends:
            return -1
        return self.pad or self.ends[0]


def read_settings(
    model: PreTrainedModel,
    options: Mapping[str, Any],
    *,
    where: str = "generation with static shapes",
) -> SearchSettings:
    """``options`` (those of ``generate``) over the model's own generation config.

    ``where``: what reads them. Raises one ``UserError`` for all options that cannot be had there,
    each with what to use instead, and for values that transformers refuses.
    """
    given = {name: value for name, value in options.items() if value is not None}
    _refuse(given, where)
    base = given.pop("generation_config", None)
    try:
        config, unknown = generation_config(model, base, given)
        _refuse(vars(config), where)
        raise_problems([f"unknown generation option '{name}'" for name in unknown])
        _settle_lengths(model, config, base, given)
        processors = score_processors(model, config)
    except ValueError as error:
        raise UserError(f"generation settings: {' '.join(str(error).split())}") from error
    _check_mode(config)
    return settings_of(config, start=_start_token(config), processors=processors)


def settings_of(config: Any, *, start: int, processors: tuple[Any, ...]) -> SearchSettings:
    """The settings in a generation config whose special tokens ``generate`` has prepared."""
    tokens = special_tokens(config)
    return SearchSettings(
        max_length=int(config.max_length),
        num_beams=int(config.num_beams),
        num_return_sequences=int(config.num_return_sequences),
        length_penalty=float(config.length_penalty),
        early_stopping=config.early_stopping,
        start=start,
        pad=tokens["pad"][0] if tokens["pad"] else None,
        ends=tokens["end"],
        processors=processors,
    )


def _refuse(values: Mapping[str, Any], where: str) -> None:
    raise_problems(
        [
            f"{name}={_short(values[name])}: cannot be had in {where}; {remedy}"
            for name, (idle, remedy) in _REFUSED.items()
            if values.get(name) is not None and values[name] not in idle
        ]
    )


def _short(value: Any) -> str:
    return str(value) if isinstance(value, (bool, int, float, str)) else type(value).__name__


def _settle_lengths(
    model: Any, config: GenerationConfig, base: GenerationConfig | None, given: Mapping[str, Any]
) -> None:
    """Write the limits into ``config.max_length`` and ``min_length``, for one start token."""

    def is_default(name: str) -> bool:
        sources = (
            given.get(name),
            getattr(base, name, None),
            getattr(model.generation_config, name),
        )
        return all(value is None for value in sources)

    set_lengths(
        model,
        config,
        default_max=is_default("max_length"),
        default_min=is_default("min_length"),
    )
    if config.max_length < 2:
        raise UserError(
            f"max_length={config.max_length}: no room after the start token; expected at least 2"
        )


def _check_mode(config: GenerationConfig) -> None:
    mode = config.get_generation_mode(None)
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.BEAM_SEARCH):
        raise UserError(f"generation mode '{mode}': cannot have static shapes; {_SEARCH}")


def _start_token(config: Any) -> int:
    tokens = special_tokens(config)["start"]
    if len(tokens) != 1:
        raise UserError(
            f"decoder_start_token_id={list(tokens)}: expected one token id for all rows"
        )
    return tokens[0]
