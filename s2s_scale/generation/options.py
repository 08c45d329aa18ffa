"""Generation options: checked by name and value, and merged as ``generate`` merges them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from s2s_scale.errors import UserError, raise_problems, unknown_name
from s2s_scale.generation.compat import (
    generation_config,
    logits_processors,
    set_lengths,
    special_tokens,
)

_INTEGERS = frozenset(
    "max_length max_new_tokens min_length min_new_tokens num_beams num_return_sequences "
    "no_repeat_ngram_size encoder_no_repeat_ngram_size top_k".split()
)
_POSITIVE = frozenset("num_beams num_return_sequences max_new_tokens max_length".split())
_NUMBERS = frozenset(
    "length_penalty repetition_penalty temperature top_p min_p typical_p max_time".split()
)
_FLAGS = frozenset("do_sample use_cache renormalize_logits remove_invalid_values".split())

_SEARCH = "use greedy or beam search (do_sample=False, num_beams=N)"
_TOKENS = "leave it out: only token ids are returned"
_ELSEWHERE = "leave it out, or generate on a CPU or GPU profile"

#: options that our searches do not support -> (values that have no effect, what to use instead)
_UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
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
    "cache_implementation": (("static",), "leave it out: the cache is always static"),
    "prefill_chunk_size": ((), _ELSEWHERE),
    "low_memory": ((False,), "lower num_beams or the batch size"),
    "return_dict_in_generate": ((False,), _TOKENS),
    "output_scores": ((False,), _TOKENS),
    "output_logits": ((False,), _TOKENS),
    "output_attentions": ((False,), _TOKENS),
    "output_hidden_states": ((False,), _TOKENS),
}


def check_generation(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` (fields of ``GenerationConfig``) without those that are ``None``.

    Raises:
        UserError: unknown names, and values that are impossible alone or together.
    """
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    given = {name: value for name, value in options.items() if value is not None}
    problems: list[str] = []
    for name, value in given.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        expected = None
        if name not in known:
            problems += unknown_name("generation setting", name, known).problems
        elif name in _INTEGERS and not (number and value == int(value) and value >= 0):
            expected = "a whole number of at least 0"
        elif name in _NUMBERS and not number:
            expected = "a number"
        elif name in _FLAGS and not isinstance(value, bool):
            expected = "true or false"
        elif name in _POSITIVE and value < 1:
            expected = "a whole number of at least 1"
        if expected is not None:
            problems.append(f"{name}={value}: expected {expected}")
    raise_problems(problems)
    try:
        GenerationConfig(**given).validate()
    except ValueError as error:
        raise settings_error(error) from error
    return given


def settings_error(error: ValueError) -> UserError:
    """transformers' objection to generation settings as an error of one line."""
    return UserError(f"generation settings: {' '.join(str(error).split())}")


def unify_limits(model: PreTrainedModel, options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` with the length limit under the name that the model's generation config uses.

    transformers gives ``max_new_tokens`` precedence over ``max_length`` even if the former is the
    model's default and the latter was given by the user, and warns at every batch.

    Raises:
        UserError: both limits are given.
    """
    options = dict(options)
    if "max_length" in options and "max_new_tokens" in options:
        raise UserError(
            f"max_length={options['max_length']} and max_new_tokens={options['max_new_tokens']}: "
            "both limit the length; give one of them"
        )
    new_tokens = model.generation_config.max_new_tokens is not None
    if new_tokens and "max_length" in options:  # max_length includes the start token
        options["max_new_tokens"] = max(options.pop("max_length") - 1, 1)
    elif not new_tokens and "max_new_tokens" in options:
        options["max_length"] = options.pop("max_new_tokens") + 1
    return options


def parse_grid(text: str) -> list[dict[str, Any]]:
    """Every combination of ``"num_beams=4:8 length_penalty=0.8:1.0 early_stopping=true:false"``.

    The last option varies fastest.

    Raises:
        UserError: unknown names, bad values and parts without ``=``, all reported together.
    """
    axes: dict[str, list[Any]] = {}
    problems: list[str] = []
    for part in text.split():
        name, equals, values = part.partition("=")
        if not equals or not name or not all(values.split(":")):
            problems.append(f"search '{part}': expected name=value or name=value:value")
        elif name in axes:
            problems.append(f"search '{name}': given twice; join the values with ':'")
        else:
            axes[name] = list(dict.fromkeys(_literal(value) for value in values.split(":")))
            for value in axes[name]:
                try:
                    check_generation({name: value})
                except UserError as error:
                    problems += [p for p in error.problems if p not in problems]
    if not axes and not problems:
        problems.append("search is empty: expected options such as 'num_beams=4:8'")
    raise_problems(problems)
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _literal(text: str) -> Any:
    """``text`` as a bool, a number or ``None`` if it reads as one, unchanged otherwise."""
    lowered = text.lower()
    if lowered in ("true", "false", "null", "none"):
        return {"true": True, "false": False}.get(lowered)
    try:
        return json.loads(text)
    except ValueError:
        return text


@dataclass(frozen=True)
class SearchSettings:
    """The settings of a greedy or beam search. Lengths include the start token."""

    max_length: int
    num_beams: int
    num_return_sequences: int
    length_penalty: float
    early_stopping: bool | str
    start: int
    #: what greedy search writes after the end of a row; ``None`` only if no token ends a row
    pad: int | None
    ends: tuple[int, ...]
    #: transformers' own logits processors for these options, in its order
    processors: tuple[Any, ...]

    @property
    def filler(self) -> int:
        """What beam search writes to unused positions: the pad id, or the end token if that is 0.

        -1 if no token ends a row.
        """
        if not self.ends:
            return -1
        return self.pad or self.ends[0]


def read_settings(
    model: PreTrainedModel,
    options: Mapping[str, Any],
    *,
    where: str = "generation with static shapes",
) -> SearchSettings:
    """The search that ``model.generate(**options)`` would run.

    Options that are not given have the values of the model's generation config.

    Args:
        model: an encoder-decoder model.
        options: keyword arguments of ``generate``, without the model's inputs.
        where: the implementation that reads them, for messages.

    Raises:
        UserError: options that greedy and beam search do not support (all reported together, each
            with what to use instead), and values that transformers rejects.
    """
    given = {name: value for name, value in options.items() if value is not None}
    _check_supported(given, where)
    base = given.pop("generation_config", None)

    def is_default(name: str) -> bool:
        own = getattr(model.generation_config, name)
        return all(value is None for value in (given.get(name), getattr(base, name, None), own))

    try:
        config, unknown = generation_config(model, base, given)
        _check_supported(vars(config), where)
        raise_problems([f"unknown generation option '{name}'" for name in unknown])
        default_max, default_min = is_default("max_length"), is_default("min_length")
        set_lengths(model, config, default_max=default_max, default_min=default_min)
        if config.max_length < 2:
            raise UserError(
                f"max_length={config.max_length}: leaves no room after the start token; expected "
                "at least 2"
            )
        processors = logits_processors(model, config)
    except UserError:
        raise
    except ValueError as error:
        raise settings_error(error) from error
    mode = config.get_generation_mode(None)
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.BEAM_SEARCH):
        raise UserError(f"generation mode '{mode}': not supported by {where}; {_SEARCH}")
    starts = special_tokens(config)["start"]
    if len(starts) != 1:
        raise UserError(
            f"decoder_start_token_id={list(starts)}: expected one token id for all rows"
        )
    return settings_of(config, start=starts[0], processors=processors)


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


def _check_supported(values: Mapping[str, Any], where: str) -> None:
    problems = []
    for name, (idle, remedy) in _UNSUPPORTED.items():
        value = values.get(name)
        if value is not None and value not in idle:
            plain = isinstance(value, (bool, int, float, str))
            shown = value if plain else type(value).__name__
            problems.append(f"{name}={shown}: not supported by {where}; {remedy}")
    raise_problems(problems)
