"""What a model's folder must hold, checked without reading weights, each mistake in one line."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from s2s_scale.errors import UserError

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
VOCABULARY_FILES = (
    "tokenizer.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "source.spm",
    "vocab.json",
    "vocab-src.json",
    "vocab.txt",
)
#: tokenizer classes that work on bytes and so have no vocabulary file
CLASSES_WITHOUT_VOCABULARY = ("ByT5Tokenizer",)


def check_folder(name: str, *, what: str, weights: bool) -> None:
    """Raise ``UserError`` for a folder that is missing or lacks config or weights; hub ids pass."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise UserError(f"{name}: expected the folder of a {what}, found a file")
        here = "/" in name and Path(name.split("/")[0]).is_dir()  # 'models/new', not a hub id
        if here or name.startswith((".", "~", os.sep)) or name.count("/") > 1 or name[-1:] == "/":
            taken = f" ('{name.split('/')[0]}' is a folder here, so it is no hub id)" * here
            raise UserError(f"{name}: no such folder{taken}; expected one that holds a {what}")
        return
    if what == "tokenizer":
        return
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise UserError(
            f"{name}: no config.json in this folder; expected a model saved by save_pretrained "
            "or by s2s-scale new-model"
        )
    try:
        json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{config_file}: not valid JSON ({error}); restore the file") from error
    if weights:
        _check_weight_files(folder)


def _check_weight_files(folder: Path) -> None:
    found = next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise UserError(
            f"{folder}: no weights in this folder; expected one of {', '.join(WEIGHT_FILES)}; "
            "save the model there again or give another --model_name_or_path"
        )
    if not found.endswith(".index.json"):
        return
    try:
        index = json.loads((folder / found).read_text(encoding="utf-8"))
        shards = sorted(set(index["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{folder / found}: not a valid weight index ({error!r})") from error
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise UserError(
            f"{folder}: {found} names {len(missing)} weight files that are not there: "
            f"{', '.join(missing[:3])}; copy them into the folder"
        )


def has_vocabulary(folder: Path) -> bool:
    """Whether the folder holds a tokenizer that can cut text."""
    if any((folder / name).is_file() for name in VOCABULARY_FILES):
        return True
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return settings.get("tokenizer_class") in CLASSES_WITHOUT_VOCABULARY or "auto_map" in settings


@contextmanager
def readable(what: str, name: str) -> Iterator[None]:
    """Turn what transformers raises for unusable files or hub ids into one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
        SafetensorError,
        pickle.UnpicklingError,
    ) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if "trust_remote_code" in str(error):
            remedy = (
                "it runs Python code of its own; choose another, or give --trust_remote_code if "
                "you trust that code"
            )
        elif Path(name).is_dir():
            remedy = "check its files"
        else:
            remedy = (
                "there is no such folder here, and as a hub id it is unknown, private or out of "
                "reach; give a folder that exists or connect to the hub"
            )
        raise UserError(f"could not load the {what}: {remedy} ({reason})") from error
