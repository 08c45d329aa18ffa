"""What generation uses of the private parts of transformers."""

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
    reason="generate completes its settings in private methods, and a search of ours must read "
    "the same ones",
    uses={f"{MIXIN}._prepare_generation_config": ("generation_config", "kwargs")},
)
def generation_config(
    model: Any, base: Any, options: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The generation config of ``model.generate(generation_config=base, **options)``.

    With the options that it does not know.

    Raises:
        ValueError: transformers refuses a value.
    """
    config, unknown = model._prepare_generation_config(base, **options)
    return config, unknown


@relies_on(
    "transformers",
    checked=CHECKED,
    reason="a private method makes limits of the whole length from max_new_tokens and "
    "min_new_tokens",
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
    """Write the limits into ``config.max_length`` and ``min_length``, for one start token.

    ``default_max``, ``default_min``: the limit was not given, so that it is a default.
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
    reason="generate makes its score processors, and checks its mode, in private methods",
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
def score_processors(model: Any, config: Any) -> tuple[Any, ...]:
    """transformers' score processors for ``config``, in its order; prepares its special tokens.

    Raises:
        ValueError: transformers refuses a value.
    """
    model._prepare_special_tokens(config, True, device="cpu")
    model._validate_generation_mode(config.get_generation_mode(None), config, {})
    return tuple(
        model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=1,
            encoder_input_ids=torch.zeros(1, 8, dtype=torch.long),  # its options alone are read
            device="cpu",
        )
    )


@relies_on(
    "transformers",
    checked=CHECKED,
    reason="which special tokens generate has settled on is kept in private attributes of its "
    "config",
    uses={f"{MIXIN}._prepare_special_tokens": None},
)
def special_tokens(config: Any) -> dict[str, tuple[int, ...]]:
    """Token ids as ``generate`` has prepared them in its config: ``start``, ``end`` and ``pad``."""

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
    reason="a model that reorders its cache by a method of its own can be told by that alone",
    uses={MIXIN: None},
)
def reorders_own_cache(model: Any) -> bool:
    """Whether the model's class has a way of its own to reorder keys and values."""
    return hasattr(model, "_reorder_cache")


@relies_on(
    "transformers",
    checked=CHECKED,
    reason="generate's agreement between ranks on whether to go on is a private method, and ranks "
    "that use ours must agree with those that use its",
    uses={f"{MIXIN}._has_unfinished_sequences": ("this_peer_finished", "synced_gpus", "device")},
)
def any_rank_goes_on(model: Any, *, finished: bool) -> bool:
    """Whether any rank is not ``finished``. Every rank must call it before each step."""
    return bool(model._has_unfinished_sequences(finished, True, model.device))


@relies_on(
    "transformers",
    checked=CHECKED,
    reason="which attention a model computes with has no public name",
    uses={"transformers.PreTrainedConfig._attn_implementation": None},
)
def attention_of(config: Any) -> str | None:
    """The name of the attention implementation, such as sdpa."""
    return getattr(config, "_attn_implementation", None)
