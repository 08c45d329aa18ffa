"""Tiny models and tokenizers of the six families, for every test that needs one.

Special ids of every tiny model, whatever its vocabulary (fields of ``SpecialIds``) follow the
published models: T5 and Pegasus pad with 0 and end with 1, Marian pads with its last id and ends
with 0, the others pad with 1 and end with 2. Ids from ``FIRST_WORD_ID`` up to
``last_word_id(model)`` are plain words in each of them.
"""

from __future__ import annotations

from pathlib import Path
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
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

FAMILY_NAMES = ("bart", "t5", "mbart", "fsmt", "pegasus", "marian")
FIRST_WORD_ID = 6
TINY_TEXTS = [
    "the cat sees the dog",
    "a dog runs to the red house",
    "we go home in May 2021",
    "wir gehen im März nach Hause, schöne Grüße",
    "le garçon a été très naïf à Noël",
    "el și ea merg în oraș, știți când",
    "the 27 houses, 3 dogs and 4 cats cost 1568.90 euro",
]

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
    which confuses the two fails. ``dropout`` goes to every dropout field of the family.
    ``overrides`` are config fields. The caller's random state is left as it was.
    """
    config_class, model_class = _CLASSES[name]
    fields = _t5_fields if name == "t5" else _bart_like_fields
    values = fields(dropout=dropout, d_model=d_model, layers=layers)
    values.update(_special_fields(name, vocab_size))
    values.update(overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(**values))
    return model.eval()  # type: ignore[no-any-return]


def last_word_id(model: PreTrainedModel) -> int:
    """The largest id that is a plain target word in ``model`` (Marian's last id is its pad)."""
    size: int = getattr(model.config, "tgt_vocab_size", None) or model.config.vocab_size
    return size - 2 if model.config.model_type == "marian" else size - 1


def tiny_batch(
    model: PreTrainedModel,
    *,
    rows: int = 4,
    seed: int = 0,
    longest: int = 9,
    label_pad: int | None = -100,
) -> dict[str, torch.Tensor]:
    """Ragged random rows: input_ids and attention_mask [rows, S], labels [rows, T] ending in EOS.

    Labels are padded with ``label_pad``; ``None`` pads them with the model's pad id.
    mBART's labels end in EOS and a language code (here id 5), as its tokenizer writes them.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    pad = int(config.pad_token_id)
    end = [int(config.eos_token_id)] + ([5] if config.model_type == "mbart" else [])

    def row() -> list[int]:
        length = int(torch.randint(2, longest, (1,), generator=generator))
        high = last_word_id(model) + 1
        words = torch.randint(FIRST_WORD_ID, high, (length,), generator=generator)
        return [*words.tolist(), *end]

    def padded(some: list[list[int]], value: int) -> torch.Tensor:
        width = max(map(len, some))
        return torch.tensor([ids + [value] * (width - len(ids)) for ids in some])

    sources, targets = [row() for _ in range(rows)], [row() for _ in range(rows)]
    input_ids = padded(sources, pad)
    return {
        "input_ids": input_ids,
        "attention_mask": padded([[1] * len(ids) for ids in sources], 0),
        "labels": padded(targets, pad if label_pad is None else label_pad),
    }


def tiny_folder(name: str, folder: Path, **options: Any) -> Path:
    """A saved tiny model with a trained tokenizer for ``TINY_TEXTS``, as ``new-model`` writes it.

    Loads with ``AutoModelForSeq2SeqLM`` and ``AutoTokenizer``; d_model 128, 2+2 layers.
    """
    from s2s_scale.models.new_model import new_model

    options = {"texts": TINY_TEXTS, "vocab_size": 300, **options}
    new_model(architecture=name, size="tiny", output_dir=folder, **options)
    return folder


def tiny_tokenizer(name: str, folder: Path) -> PreTrainedTokenizerBase:
    """A tokenizer of family ``name`` trained on ``TINY_TEXTS`` (written to ``folder``)."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_folder(name, folder))  # type: ignore[no-any-return]


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
    """Vocabulary sizes and special ids, laid out as in the published models."""
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
