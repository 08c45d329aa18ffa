"""Loads a model with its config and tokenizer, checked before any weight is read."""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from s2s_scale.config import ModelArguments
from s2s_scale.errors import UserError, did_you_mean, unknown_name
from s2s_scale.models.families import (
    apply_dropout_settings,
    check_precision,
    family_of,
)

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

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


class Loaded(NamedTuple):
    """A model in fp32, its config (``model.config``) and its tokenizer."""

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel


def load(
    model_args: ModelArguments,
    *,
    src_lang: str | None = None,
    tgt_lang: str | None = None,
    task: str | None = None,
    dropout: float | None = None,
    attention_dropout: float | None = None,
    encoder_layerdrop: float | None = None,
    decoder_layerdrop: float | None = None,
    fp16: bool = False,
) -> Loaded:
    """Load config, tokenizer and model, in this order, cheap checks first.

    Args:
        model_args: names of the model, its config and tokenizer, and where they are.
        src_lang: source language code, for families that have them.
        tgt_lang: target language code.
        task: the task whose ``task_specific_params`` of the config are applied.
        dropout: see ``apply_dropout_settings``, as for the next three.
        attention_dropout: probability.
        encoder_layerdrop: probability.
        decoder_layerdrop: probability.
        fp16: whether the model will run in half precision, which some families cannot.

    Raises:
        UserError: a folder, config, tokenizer or weights are missing or unreadable; the model is
            not an encoder-decoder; weights do not fit the config; a task or language code is
            unknown; the family lacks a dropout setting; or there is neither a pad token nor EOS.
    """
    name = _required_name(model_args)
    check_folder(name, what="model", weights=True)
    config = load_config(model_args)
    check_precision(config, fp16=fp16)
    generation_values = apply_task_parameters(config, task)
    apply_dropout_settings(
        config,
        dropout=dropout,
        attention_dropout=attention_dropout,
        encoder_layerdrop=encoder_layerdrop,
        decoder_layerdrop=decoder_layerdrop,
    )
    tokenizer = load_tokenizer(model_args, config)
    settle_pad_token(config, tokenizer)
    model = _load_weights(model_args, config)
    for key, value in generation_values.items():
        setattr(model.generation_config, key, value)
    set_languages(model, tokenizer, src_lang=src_lang, tgt_lang=tgt_lang)
    if model_args.freeze_embeds:
        freeze_embeddings(model)
    if model_args.freeze_encoder:
        freeze_encoder(model)
    return Loaded(model.config, tokenizer, model)


def load_config(model_args: ModelArguments) -> PreTrainedConfig:
    """The config; ``UserError`` if it is missing, invalid or not an encoder-decoder's."""
    from transformers import AutoConfig

    name = model_args.config_name or _required_name(model_args)
    check_folder(name, what="config", weights=False)
    with readable(f"config of '{name}'", name):
        config = AutoConfig.from_pretrained(name, **_hub_options(model_args))
    family_of(config)
    return config


def load_tokenizer(
    model_args: ModelArguments, config: PreTrainedConfig | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer; ``UserError`` if its files are missing or unreadable."""
    from transformers import AutoTokenizer

    name = model_args.tokenizer_name or _required_name(model_args)
    folder = Path(name)
    if folder.is_dir() and not has_vocabulary(folder):
        # transformers 5 would go on silently with an empty vocabulary
        raise UserError(
            f"{name}: no tokenizer in this folder; expected one of {', '.join(VOCABULARY_FILES)}; "
            "copy the tokenizer there or give --tokenizer_name"
        )
    if not folder.is_dir():
        check_folder(name, what="tokenizer", weights=False)
    options = _hub_options(model_args)
    if config is not None and model_args.config_name:
        options["config"] = config
    with readable(f"tokenizer of '{name}'", name):
        return AutoTokenizer.from_pretrained(name, **options)


def settle_pad_token(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Make sure that tokenizer and config have a pad token; return its id.

    A tokenizer without one takes the config's, else EOS, with a warning. Raises ``UserError`` if
    there is no EOS either.
    """
    if tokenizer.pad_token_id is None:
        if config.pad_token_id is not None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
        elif tokenizer.eos_token is not None:
            logger.warning(
                "The tokenizer has no pad token: its EOS token '%s' is used for padding.",
                tokenizer.eos_token,
            )
            tokenizer.pad_token = tokenizer.eos_token
        else:
            raise UserError(
                "the tokenizer has neither a pad token nor an EOS token; expected at least one; "
                "add pad_token to its tokenizer_config.json"
            )
    pad = int(tokenizer.pad_token_id)
    if config.pad_token_id is None:
        config.pad_token_id = pad
    elif config.pad_token_id != pad:
        logger.warning(
            "The tokenizer pads with id %d, the model's config says %d: do they belong together?",
            pad,
            config.pad_token_id,
        )
    return pad


def apply_task_parameters(config: PreTrainedConfig, task: str | None) -> dict[str, Any]:
    """Apply ``config.task_specific_params[task]`` to ``config``; return its generation settings.

    These belong in the model's generation config. A ``prefix`` is set as ``config.prefix``. Raises
    ``UserError`` if the config does not have the task.
    """
    from transformers import GenerationConfig

    if task is None:
        return {}
    tasks: dict[str, dict[str, Any]] = getattr(config, "task_specific_params", None) or {}
    if not tasks:
        raise UserError(
            f"task '{task}': the model's config has no task_specific_params; leave --task out"
        )
    if task not in tasks:
        raise unknown_name("task", task, tasks)
    generation_fields = vars(GenerationConfig())
    generation = {k: v for k, v in tasks[task].items() if k in generation_fields}
    for key, value in tasks[task].items():
        if key not in generation:
            setattr(config, key, value)
    return generation


def set_languages(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    src_lang: str | None,
    tgt_lang: str | None,
) -> None:
    """Set the language codes of a multilingual model's tokenizer and generation config.

    mBART's first tokenizer ends rows with the code, so decoding starts with it; those of mBART-50,
    M2M100 and NLLB begin rows with it, so it is the first generated token. Does nothing for
    families without language codes. Raises ``UserError`` for an unknown code, naming near ones, and
    if a code is missing.
    """
    if not family_of(model.config).languages:
        return
    codes = language_ids(tokenizer)
    src_lang = src_lang or getattr(tokenizer, "src_lang", None)
    tgt_lang = tgt_lang or getattr(tokenizer, "tgt_lang", None)
    if not tgt_lang or not src_lang:
        raise UserError(
            f"models of type '{model.config.model_type}' need language codes; give --src_lang "
            "and --tgt_lang, such as en_XX and de_DE"
        )
    for flag, code in (("src_lang", src_lang), ("tgt_lang", tgt_lang)):
        if code not in codes:
            raise _unknown_language(flag, code, codes)
    tokenizer.src_lang = src_lang
    tokenizer.tgt_lang = tgt_lang
    language = codes[tgt_lang]
    generation = model.generation_config
    if _language_comes_last(tokenizer, tgt_lang):
        # Labels "X </s> code" make decoder inputs "code X </s>": the code is the start token.
        # Forcing it again in second place would generate what never occurs in training.
        model.config.decoder_start_token_id = language
        generation.decoder_start_token_id = language
        generation.forced_bos_token_id = None
        return
    # Labels "code X </s>" make decoder inputs "</s> code X": the code is generated first.
    start = model.config.decoder_start_token_id
    start = model.config.eos_token_id if start is None else start
    model.config.decoder_start_token_id = start
    generation.decoder_start_token_id = start
    generation.forced_bos_token_id = language


def language_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Token id of each language code that is in the tokenizer's vocabulary."""
    codes: Iterable[str] = getattr(tokenizer, "lang_code_to_id", None) or [
        token for token in tokenizer.all_special_tokens if "_" in token
    ]
    ids = {code: _token_id(tokenizer, code) for code in codes}
    if hasattr(tokenizer, "get_lang_id"):  # M2M100 keeps code and token apart: de, __de__
        ids = {code: int(tokenizer.get_lang_id(code)) for code in codes}
    return {code: index for code, index in ids.items() if index != tokenizer.unk_token_id}


def freeze_embeddings(model: PreTrainedModel) -> None:
    """Freeze token and position embeddings of encoder and decoder, and output projections tied to
    them."""
    for part in (model.get_encoder(), model.get_decoder(), model.base_model):
        for name in ("embed_tokens", "embed_positions", "shared"):
            module = getattr(part, name, None)
            if module is not None:
                module.requires_grad_(False)


def freeze_encoder(model: PreTrainedModel) -> None:
    """Freeze the encoder, except for embeddings that it shares with the decoder."""
    encoder = model.get_encoder()
    shared = {id(p) for p in model.get_decoder().parameters()}
    for parameter in encoder.parameters():
        if id(parameter) not in shared:
            parameter.requires_grad_(False)


def check_folder(name: str, *, what: str, weights: bool) -> None:
    """Raise ``UserError`` for a missing folder, config or weight file; hub ids pass."""
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
    """Whether the folder holds a tokenizer with a vocabulary, or one that needs none."""
    if any((folder / name).is_file() for name in VOCABULARY_FILES):
        return True
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return settings.get("tokenizer_class") in CLASSES_WITHOUT_VOCABULARY or "auto_map" in settings


@contextmanager
def readable(what: str, name: str) -> Iterator[None]:
    """Turn the exceptions of transformers for unusable files or hub ids into a ``UserError``."""
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


def _required_name(model_args: ModelArguments) -> str:
    if not model_args.model_name_or_path:
        raise UserError(
            "model_name_or_path is missing; give --model_name_or_path a folder or hub id, or make "
            "a model with: s2s-scale new-model"
        )
    return model_args.model_name_or_path


def _hub_options(model_args: ModelArguments) -> dict[str, Any]:
    return {
        "cache_dir": model_args.cache_dir,
        "revision": model_args.model_revision,
        "trust_remote_code": model_args.trust_remote_code,
    }


def _load_weights(model_args: ModelArguments, config: PreTrainedConfig) -> PreTrainedModel:
    """The model in fp32; ``UserError`` if a weight is missing or has another shape."""
    import torch
    from transformers import AutoModelForSeq2SeqLM

    name = _required_name(model_args)
    with readable(f"weights of '{name}'", name):
        model, info = AutoModelForSeq2SeqLM.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            weights_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that the message below names them
            **_hub_options(model_args),
        )
    problems = []
    if info["missing_keys"]:
        problems.append(
            f"{name}: {len(info['missing_keys'])} weights of the model are not in its files: "
            f"{_some(info['missing_keys'])}; expected a whole encoder-decoder that fits its "
            "config.json"
        )
    if info["mismatched_keys"]:
        key, found, expected = sorted(info["mismatched_keys"])[0]
        problems.append(
            f"{name}: {len(info['mismatched_keys'])} weights have another shape than config.json "
            f"says, the first: {key} is {list(found)}, expected {list(expected)}"
        )
    if problems:
        raise UserError(*problems)
    if info["unexpected_keys"]:
        logger.warning(
            "%s: %d weights are not used by the model: %s",
            name,
            len(info["unexpected_keys"]),
            _some(info["unexpected_keys"]),
        )
    freeze_as_constructed(model)
    return model


def freeze_as_constructed(model: nn.Module) -> None:
    """Freeze the parameters that the model's constructor freezes, such as sinusoidal positions.

    transformers makes every parameter trainable that it loads from a file. Sinusoidal positions
    get no gradient, but backends that give every trainable parameter one (ZeRO 1 and 2, torch-xla)
    would let weight decay change them.
    """
    import torch

    with torch.device("meta"):  # no memory, and no random numbers
        constructed = type(model)(model.config)
    frozen = {name for name, p in constructed.named_parameters() if not p.requires_grad}
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (", …" if len(ordered) > 3 else "")


def _unknown_language(flag: str, code: str, codes: Iterable[str]) -> UserError:
    known = sorted(codes)
    near = [k for k in known if k[:2].lower() == code[:2].lower()]
    hint = f" (did you mean '{near[0]}'?)" if near else did_you_mean(code, known)
    return UserError(
        f"unknown language code '{code}'{hint}; expected one of: {', '.join(known)}; "
        f"change --{flag}"
    )


def _language_comes_last(tokenizer: PreTrainedTokenizerBase, tgt_lang: str) -> bool:
    """Whether target rows end with the language code, as those of mBART's first tokenizer do."""
    ids = tokenizer(text_target="a")["input_ids"]
    return bool(ids) and ids[-1] == _token_id(tokenizer, tgt_lang)


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    index: Any = tokenizer.convert_tokens_to_ids(token)
    return int(index)
