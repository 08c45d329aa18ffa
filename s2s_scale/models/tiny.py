"""Tiny random models of the six families, for ``doctor`` and for tests.

Special ids follow the published models, whatever the vocabulary: T5 and Pegasus pad with 0 and end
with 1, Marian pads with its last id and ends with 0, the others pad with 1 and end with 2. Ids from
``FIRST_WORD_ID`` to ``last_word_id(model)`` are plain words in all of them.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    FSMTConfig,
    FSMTForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

FAMILY_NAMES = ("bart", "t5", "mbart", "fsmt", "pegasus", "marian")
FIRST_WORD_ID = 6

_CLASSES: dict[str, tuple[type[Any], type[Any]]] = {
    "bart": (BartConfig, BartForConditionalGeneration),
    "t5": (T5Config, T5ForConditionalGeneration),
    "mbart": (MBartConfig, MBartForConditionalGeneration),
    "fsmt": (FSMTConfig, FSMTForConditionalGeneration),
    "pegasus": (PegasusConfig, PegasusForConditionalGeneration),
    "marian": (MarianConfig, MarianMTModel),
}


def tiny_model(
    name: str,
    *,
    seed: int = 0,
    vocab_size: int = 96,
    dropout: float = 0.0,
    d_model: int = 16,
    layers: int = 1,
    **overrides: Any,
) -> PreTrainedModel:
    """A random model of family ``name``: the same weights for the same arguments, in eval mode.

    ``vocab_size`` is the target vocabulary; FSMT's source vocabulary is 8 larger, so that a test
    which confuses the two fails. ``dropout`` sets every dropout field of the family. ``overrides``
    are config fields. The caller's random state is not changed.
    """
    config_class, model_class = _CLASSES[name]
    fields = _t5_fields if name == "t5" else _bart_like_fields
    values = fields(dropout=dropout, d_model=d_model, layers=layers)
    values.update(_special_fields(name, vocab_size))
    values.update(overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(**values))
    return model.eval()


def last_word_id(model: PreTrainedModel) -> int:
    """The largest id of a plain target word (Marian's last id is its pad)."""
    size: int = getattr(model.config, "tgt_vocab_size", None) or model.config.vocab_size
    return size - 2 if model.config.model_type == "marian" else size - 1


def ragged_rows(
    model: PreTrainedModel, count: int, *, seed: int = 0, longest: int = 10
) -> list[dict[str, list[int]]]:
    """Rows with input_ids and labels of random lengths, EOS (and mBART's language code) last."""
    chance = random.Random(seed)
    end = [model.config.eos_token_id] + ([5] if model.config.model_type == "mbart" else [])

    def ids() -> list[int]:
        length = chance.randint(1, longest)
        return [chance.randint(FIRST_WORD_ID, last_word_id(model)) for _ in range(length)] + end

    return [{"input_ids": ids(), "labels": ids()} for _ in range(count)]


def _t5_fields(*, dropout: float, d_model: int, layers: int) -> dict[str, Any]:
    return {
        "d_model": d_model,
        "d_kv": d_model // 2,
        "d_ff": 2 * d_model,
        "num_layers": layers,
        "num_decoder_layers": layers,
        "num_heads": 2,
        "dropout_rate": dropout,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20,
    }


def _bart_like_fields(*, dropout: float, d_model: int, layers: int) -> dict[str, Any]:
    sides = {
        f"{side}_{field}": value
        for side in ("encoder", "decoder")
        for field, value in (("layers", layers), ("ffn_dim", 2 * d_model), ("attention_heads", 2))
    }
    return {
        **sides,
        "d_model": d_model,
        "max_position_embeddings": 64,
        "dropout": dropout,
        "attention_dropout": dropout,
        "activation_dropout": dropout,
    }


def _special_fields(name: str, vocab_size: int) -> dict[str, Any]:
    """Vocabulary sizes and special ids, as in the published models."""
    if name == "fsmt":
        return {
            "src_vocab_size": vocab_size + 8,
            "tgt_vocab_size": vocab_size,
            "langs": ["en", "de"],
            "num_beams": 1,
            "max_length": 20,
        }
    if name == "t5":
        return {"vocab_size": vocab_size, "decoder_start_token_id": 0}
    if name == "marian":
        last = vocab_size - 1
        return {"vocab_size": vocab_size, "pad_token_id": last, "decoder_start_token_id": last}
    if name == "mbart":
        return {"vocab_size": vocab_size, "decoder_start_token_id": 5}
    return {"vocab_size": vocab_size}
