"""Batches and saved folders of the tiny models, for every test that needs one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from s2s_scale.models.tiny import FAMILY_NAMES, FIRST_WORD_ID, last_word_id, tiny_model

__all__ = [
    "FAMILY_NAMES",
    "FIRST_WORD_ID",
    "TINY_TEXTS",
    "last_word_id",
    "tiny_batch",
    "tiny_folder",
    "tiny_model",
    "tiny_tokenizer",
]
TINY_TEXTS = [
    "the cat sees the dog",
    "a dog runs to the red house",
    "we go home in May 2021",
    "wir gehen im März nach Hause, schöne Grüße",
    "le garçon a été très naïf à Noël",
    "el și ea merg în oraș, știți când",
    "the 27 houses, 3 dogs and 4 cats cost 1568.90 euro",
]


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
    from s2s_scale.models.create import new_model

    options = {"texts": TINY_TEXTS, "vocab_size": 300, **options}
    new_model(architecture=name, size="tiny", output_dir=folder, **options)
    return folder


def tiny_tokenizer(name: str, folder: Path) -> PreTrainedTokenizerBase:
    """A tokenizer of family ``name`` trained on ``TINY_TEXTS`` (written to ``folder``)."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_folder(name, folder))  # type: ignore[no-any-return]


def wide_model(d_ff: int) -> Any:
    """A T5 nearly all of whose weights are in 32 equal matrices, which any sharing divides."""
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=64,
            d_model=128,
            d_kv=16,
            num_heads=2,
            d_ff=d_ff,
            num_layers=8,
            decoder_start_token_id=0,
            dropout_rate=0.0,
        )
    )
