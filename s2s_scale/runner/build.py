"""Builds the parts of a run from the settings: backend, arguments, model, examples, trainer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

from s2s_scale import models
from s2s_scale.arguments import Seq2SeqTrainingArguments
from s2s_scale.backends import Backend, make_backend
from s2s_scale.config import (
    DEFAULT_FAULT_SECONDS,
    DEFAULT_SHUFFLE_BUFFER,
    DataArguments,
    ModelArguments,
)
from s2s_scale.cpu import bf16_is_native
from s2s_scale.data.collators import Seq2SeqCollator
from s2s_scale.data.readers import PairReader
from s2s_scale.data.sources import Split
from s2s_scale.data.streaming import StreamedExamples
from s2s_scale.data.tokenize import check_token_ids, tokenize_pairs
from s2s_scale.errors import UserError, raise_problems
from s2s_scale.evaluation.text import TextEvaluation
from s2s_scale.resilience.watchdog import watching
from s2s_scale.settings import Settings, split_settings
from s2s_scale.settings.profiles import AUTO, LauncherProfile, deepspeed_config_path
from s2s_scale.trainer import Seq2SeqTrainer
from s2s_scale.trainer.callbacks import LineProgressCallback, WatchdogCallback

SAMPLES = 8


@dataclass
class Run:
    """The settings of a run, as the dataclasses that its parts take."""

    model_args: ModelArguments
    data_args: DataArguments
    training_args: Seq2SeqTrainingArguments
    given: dict[str, tuple[Any, str]]
    """Setting -> (value, origin), for the report."""
    texts: dict[str, TextEvaluation] = field(default_factory=dict)
    """Metric prefix -> the latest text evaluation with that prefix."""

    @property
    def output_dir(self) -> Path:
        return Path(str(self.training_args.output_dir))


@contextmanager
def open_backend(settings: Settings) -> Iterator[Backend]:
    """Yield the profile's backend, prepared for this process; it is closed even after an error."""
    assert settings.profile is not None, "a command that trains or evaluates has a profile"
    profile = settings.profile
    backend = make_backend(profile.backend, profile.device, profile.mesh)
    raise_problems(list(backend.problems()))
    backend.prepare_process()
    fault_seconds = float(settings.get("fault_timeout_seconds", DEFAULT_FAULT_SECONDS))
    # Progress bars over the shards of a file would add nothing to this package's own messages.
    transformers.utils.logging.disable_progress_bar()
    try:
        with watching(
            backend.collectives.rank,
            backend.collectives.world_size,
            gather_objects=backend.collectives.gather_objects,
            fault_seconds=fault_seconds,
        ):
            yield backend
    finally:
        backend.close()


def read_settings(
    settings: Settings, backend: Backend, extra: dict[str, Any] | None = None, *, trains: bool
) -> Run:
    """Convert the settings to dataclasses.

    Args:
        extra: defaults of the command.
        trains: whether an optimizer will be created.

    Raises:
        UserError: a value is invalid, by this package's checks or by transformers'.
    """
    values = {**(extra or {}), **settings.values}
    profile = settings.profile
    if profile is not None:
        if profile.device == "cpu" and not profile.mesh:
            values.setdefault("use_cpu", True)
        if values.get("deepspeed"):
            values["deepspeed"] = str(deepspeed_config_path(values["deepspeed"]))
        elif profile.deepspeed_config:
            values["deepspeed"] = str(deepspeed_config_path(profile.deepspeed_config, profile))
        if trains:
            values |= _precision(profile, values)
    model, data, training = split_settings(
        values, ModelArguments, DataArguments, Seq2SeqTrainingArguments
    )
    data_args = DataArguments(**data)
    data_args.validate()
    training = backend.training_overrides(training, trains=trains)
    try:
        training_args = Seq2SeqTrainingArguments(**training)
    except UserError:
        raise
    except (ValueError, ImportError) as error:
        # transformers' own checks; some messages span several lines
        raise UserError(" ".join(str(error).split())) from error
    given = {name: (value, settings.origins.get(name, "command")) for name, value in values.items()}
    return Run(ModelArguments(**model), data_args, training_args, given)


def _precision(profile: LauncherProfile, values: Mapping[str, Any]) -> dict[str, bool]:
    """bf16 if the profile's precision is automatic, the device supports it and no flag decides."""
    flags = ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "deepspeed", "tf32")
    if profile.precision != AUTO or any(values.get(flag) is not None for flag in flags):
        return {}
    on_gpu = profile.device == "cuda" and not values.get("use_cpu")
    supported = torch.cuda.is_bf16_supported if on_gpu else bf16_is_native
    return {"bf16": True} if supported() else {}


def load_model(run: Run) -> models.Loaded:
    data, args = run.data_args, run.training_args
    return models.load(
        run.model_args,
        src_lang=data.src_lang,
        tgt_lang=data.tgt_lang,
        task=data.task,
        dropout=args.dropout,
        attention_dropout=args.attention_dropout,
        encoder_layerdrop=args.encoder_layerdrop,
        decoder_layerdrop=args.decoder_layerdrop,
        fp16=args.fp16 or args.fp16_full_eval,
    )


def tokenize(
    run: Run, loaded: models.Loaded, backend: Backend, pairs: datasets.Dataset, split: Split
) -> datasets.Dataset:
    """Tokenize a split and check the ids against the vocabulary. Every rank must call it."""
    with backend.collectives.main_first():  # the other ranks read the examples from the cache
        examples = tokenize_with(loaded.tokenizer, loaded.config, run, pairs, split)
    check_token_ids(
        examples,
        source_vocab_size=models.source_vocab_size(loaded.config),
        target_vocab_size=models.target_vocab_size(loaded.config),
    )
    return examples


def tokenize_with(
    tokenizer: transformers.PreTrainedTokenizerBase,
    config: transformers.PreTrainedConfig,
    run: Run,
    pairs: datasets.Dataset,
    split: Split,
) -> datasets.Dataset:
    """Tokenize a split, or read its token ids from the cache."""
    data = run.data_args
    limit = data.max_target_length if split == "train" else data.evaluation_target_length
    return tokenize_pairs(
        pairs,
        tokenizer,
        source_prefix=source_prefix_of(data, config),
        max_source_length=data.max_source_length,
        max_target_length=limit,
        long_rows=data.long_rows,
        cache_dir=Path(data.data_cache_dir) if data.data_cache_dir else None,
        num_workers=data.preprocessing_num_workers,
        overwrite=data.overwrite_cache,
        progress=not run.training_args.disable_tqdm,
    )


def stream_examples(run: Run, loaded: models.Loaded, pairs: PairReader) -> StreamedExamples:
    """The training split, read and tokenized during training."""
    data = run.data_args
    return StreamedExamples(
        pairs,
        loaded.tokenizer,
        vocab_sizes=(
            models.source_vocab_size(loaded.config),
            models.target_vocab_size(loaded.config),
        ),
        source_prefix=source_prefix_of(data, loaded.config),
        max_source_length=data.max_source_length,
        max_target_length=data.max_target_length,
        long_rows=data.long_rows,
        buffer=data.shuffle_buffer or DEFAULT_SHUFFLE_BUFFER,
        limit=None if data.n_train < 0 else data.n_train,
    )


def source_prefix_of(data: DataArguments, config: transformers.PreTrainedConfig) -> str:
    """The prefix given by the user, else the one in the parameters of ``--task``."""
    if data.source_prefix is not None:
        return data.source_prefix
    return getattr(config, "prefix", None) or "" if data.task else ""


def build_trainer(
    run: Run,
    loaded: models.Loaded,
    backend: Backend,
    examples: dict[Split, Any],
) -> Seq2SeqTrainer:
    args = run.training_args

    def text_evaluation_for(rows: datasets.Dataset, prefix: str) -> TextEvaluation:
        final = prefix in ("val", "test")
        text = TextEvaluation(
            loaded.tokenizer,
            metrics=run.data_args.metrics,
            references=lambda ids: list(rows[ids]["target"]),
            sources=lambda ids: list(rows[ids]["source"]),
            output_file=run.output_dir / f"{prefix}_generations.txt" if final else None,
            num_samples=SAMPLES,
        )
        run.texts[prefix] = text
        return text

    with _refuse_unusable_loggers(args.report_to or ()):
        trainer = Seq2SeqTrainer(
            loaded.model,
            args,
            config=loaded.config,
            data_args=run.data_args,
            train_dataset=examples.get("train"),
            eval_dataset=examples.get("val") if args.evaluates_while_training else None,
            data_collator=Seq2SeqCollator(loaded.config.pad_token_id),
            processing_class=loaded.tokenizer,
            backend=backend,
            text_evaluation_for=text_evaluation_for,
        )
    trainer.parts.run_state.settings = run.given
    trainer.add_callback(WatchdogCallback())
    if not args.disable_tqdm:
        trainer.remove_callback(transformers.ProgressCallback)
        trainer.add_callback(LineProgressCallback)
    return trainer


@contextmanager
def _refuse_unusable_loggers(names: Sequence[str]) -> Iterator[None]:
    """Turn the error that transformers raises for an unavailable logger into a ``UserError``."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())
        unknown = "is not supported, only" in text
        if not unknown and not re.search(r"requires .+ to be installed", text):
            raise
        raise UserError(
            f"report_to={','.join(names)}: {text}; expected installed loggers; "
            "change --report_to, or give 'none'"
        ) from error


def wanted_device(settings: Settings) -> torch.device:
    """The profile's device; the CPU with ``--use_cpu`` or without a profile."""
    on_cpu = settings.get("use_cpu", False)
    device = "cpu" if on_cpu or settings.profile is None else settings.profile.device
    return torch.device(device)
