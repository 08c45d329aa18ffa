"""Private parts of transformers that generation relies on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from s2s_scale.compat import relies_on

CHECKED = ("5.17", "5.23")
MIXIN = "transformers.generation.utils.GenerationMixin"


@relies_on(
    "transformers",
    checked=CHECKED,
    reason="generate completes its settings in private methods, and our searches must read the "
    "same ones",
    uses={f"{MIXIN}._prepare_generation_config": ("generation_config", "kwargs")},
)
def generation_config(
    model: Any, base: Any, options: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The config of ``model.generate(generation_config=base, **options)``, and unknown options.

    Raises:
        ValueError: transformers rejects a value.
    """
    config, unknown = model._prepare_generation_config(base, **options)
    return config, unknown


@relies_on(
    "transformers",
    checked=CHECKED,
    reason="a private method converts max_new_tokens and min_new_tokens to limits of the total "
    "length",
    uses={
        f"{MIXIN}._prepare_generated_length": (
            "generation_config",
            "has_default_max_length",
            "has_default_min_length",
            "model_input_name",
            "input_ids_length",
            "inputs_tensor",
        )
    },
)
def set_lengths(model: Any, config: Any, *, default_max: bool, default_min: bool) -> None:
    """Set ``config.max_length`` and ``config.min_length``, for one start token.

    ``default_max``, ``default_min``: whether the limit is a default, which the user did not give.
    """
    model._prepare_generated_length(
        generation_config=config,
        has_default_max_length=default_max,
        has_default_min_length=default_min,
        model_input_name="input_ids",
        input_ids_length=1,
        inputs_tensor=None,
    )


@relies_on(
    "transformers",
    checked=CHECKED,
    reason="generate builds its logits processors, and checks its mode, in private methods",
    uses={
        f"{MIXIN}._prepare_special_tokens": None,
        f"{MIXIN}._validate_generation_mode": (
            "generation_mode",
            "generation_config",
            "generation_mode_kwargs",
        ),
        f"{MIXIN}._get_logits_processor": None,
    },
)
def logits_processors(model: Any, config: Any) -> tuple[Any, ...]:
    """transformers' logits processors for ``config``, in its order; prepares its special tokens.

    Raises:
        ValueError: transformers rejects a value.
    """
    model._prepare_special_tokens(config, True, device="cpu")
    model._validate_generation_mode(config.get_generation_mode(None), config, {})
    return tuple(
        model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=1,
            encoder_input_ids=torch.zeros(
                1, 8, dtype=torch.long
            ),  # only the processors' options are read
            device="cpu",
        )
    )


@relies_on(
    "transformers",
    checked=CHECKED,
    reason="generate keeps the special tokens that it has chosen in private attributes of its "
    "config",
    uses={f"{MIXIN}._prepare_special_tokens": None},
)
def special_tokens(config: Any) -> dict[str, tuple[int, ...]]:
    """The ``start``, ``end`` and ``pad`` token ids that ``generate`` has prepared in its config."""

    def ids(tokens: Tensor | None) -> tuple[int, ...]:
        return () if tokens is None else tuple(tokens.reshape(-1).tolist())

    return {
        "start": ids(config._decoder_start_token_tensor),
        "end": ids(config._eos_token_tensor),
        "pad": ids(config._pad_token_tensor),
    }


@relies_on(
    "transformers",
    checked=CHECKED,
    reason="nothing but this method tells that a model reorders its cache by code of its own",
    uses={MIXIN: None},
)
def reorders_own_cache(model: Any) -> bool:
    """Whether the model reorders keys and values by a method of its own."""
    return hasattr(model, "_reorder_cache")


@relies_on(
    "transformers",
    checked=CHECKED,
    reason="generate's ranks agree on whether to go on by a private method, and ranks that run our "
    "loop must agree with ranks that run transformers'",
    uses={f"{MIXIN}._has_unfinished_sequences": ("this_peer_finished", "synced_gpus", "device")},
)
def any_rank_unfinished(model: Any, *, finished: bool) -> bool:
    """Whether any rank is not ``finished``. Every rank must call it before each step."""
    return bool(model._has_unfinished_sequences(finished, True, model.device))


@relies_on(
    "transformers",
    checked=CHECKED,
    reason="there is no public name for the attention implementation of a model",
    uses={"transformers.PreTrainedConfig._attn_implementation": None},
)
def attention_of(config: Any) -> str | None:
    """The name of the attention implementation, such as ``sdpa``."""
    return getattr(config, "_attn_implementation", None)
