"""Small data folders and tokenizers for tests of the data part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import datasets
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

WORDS = ["<pad>", "</s>", "<unk>", "say", "one", "two", "three", "four", "five", "six"]


def word_tokenizer(words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """A fast tokenizer: one id a word, </s> at the end."""
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def pairs_of(source: Sequence[str], target: Sequence[str]) -> datasets.Dataset:
    """Pairs as ``load_pairs`` returns them."""
    return datasets.Dataset.from_dict({"source": list(source), "target": list(target)})


def write_folder(folder: Path, *, split: str = "train", source: bytes, target: bytes) -> Path:
    """A --data_dir with one split of exactly these bytes."""
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.source").write_bytes(source)
    (folder / f"{split}.target").write_bytes(target)
    return folder
