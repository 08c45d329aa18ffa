"""How a trainer is constructed: its own arguments, defaults, checks, and components."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, cast

import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_utils import has_length

from s2s_scale.arguments import Seq2SeqTrainingArguments
from s2s_scale.backends import Backend
from s2s_scale.cpu import CpuFunctions
from s2s_scale.data.streaming import StreamedExamples
from s2s_scale.errors import UserError, raise_problems
from s2s_scale.generation.ctranslate2 import family_problems
from s2s_scale.models import apply_dropout_settings, check_precision
from s2s_scale.trainer.bad_steps import BadSteps
from s2s_scale.trainer.callbacks import (
    PreemptionCallback,
    SeedCallback,
    SettleCallback,
    StepCallback,
)
from s2s_scale.trainer.checkpointing import Checkpointer, Trained
from s2s_scale.trainer.dataloaders import StepBatches, TrainDataLoaders
from s2s_scale.trainer.evaluation import Generator
from s2s_scale.trainer.loss import CROSS_ENTROPY, MODEL, SMOOTHED, LossComputer
from s2s_scale.trainer.metrics import CompilationWatch, TrainingMeter
from s2s_scale.trainer.run_state import Data, RunState
from s2s_scale.trainer.streaming import streaming_problems

logger = transformers.utils.logging.get_logger(__name__)

P = ParamSpec("P")


def takes_config_first(init: Callable[P, None]) -> Callable[P, None]:
    """Let ``(config, data_args, model, args, …)``, the legacy order, be given by position too."""

    @functools.wraps(init)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        if len(args) > 1 and isinstance(args[1], PreTrainedConfig):
            itself, *first = args[:3]
            legacy = dict(zip(("config", "data_args"), first, strict=False))
            cast("Any", init)(itself, *args[3:], **legacy, **kwargs)
        else:
            init(*args, **kwargs)

    return wrapper


def copy_of(args: TrainingArguments | None) -> Seq2SeqTrainingArguments:
    """A copy of the arguments that the trainer may change."""
    if args is None:
        return Seq2SeqTrainingArguments(output_dir="tmp_trainer")
    if not isinstance(args, Seq2SeqTrainingArguments):
        return Seq2SeqTrainingArguments.from_transformers(args)
    own = copy.copy(args)
    kinds = (dict, list)
    vars(own).update({k: copy.copy(v) for k, v in vars(args).items() if isinstance(v, kinds)})
    return own


def check_model(model: Any, config: PreTrainedConfig | None) -> None:
    """Refuse a model whose vocabulary and special tokens are unknown.

    Raises:
        ValueError: there is neither a config nor a model that has one.
    """
    if config is None and model is not None and not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"config: without one the model must be a PreTrainedModel, but it is a "
            f"{type(model).__name__}; pass config=…"
        )


def one_tokenizer(tokenizer: Any, processing_class: Any) -> Any:
    """The tokenizer, which may be passed under either name.

    Raises:
        ValueError: two different ones were passed.
    """
    if tokenizer is not None and processing_class not in (None, tokenizer):
        raise ValueError(
            "tokenizer and processing_class name the same thing but two different ones were "
            "given; pass one of them"
        )
    return processing_class if tokenizer is None else tokenizer


def settle_batching(args: Seq2SeqTrainingArguments, backend: Backend, rows: Any) -> None:
    """Choose the batching mode that suits data and device, unless one was given.

    Raises:
        UserError: settings that a stream cannot follow.
    """
    compiles = backend.static_shapes or args.torch_compile
    if isinstance(rows, StreamedExamples):
        args.batching_by_default("tokens")
        args.settle_token_sizes()
        raise_problems(streaming_problems(args, static_shapes=compiles))
        args.ignore_data_skip = True  # the stream itself begins where it left off
    elif compiles and has_length(rows):
        args.batching_by_default("tokens")


def check_settings(
    args: Seq2SeqTrainingArguments, config: PreTrainedConfig, *, static_shapes: bool
) -> None:
    """Refuse settings that cannot take effect with this model on this device.

    Raises:
        UserError: says why, with a remedy.
    """
    if args.generation_engine == "ctranslate2":
        raise_problems(family_problems(config.model_type))
        if static_shapes:
            raise UserError(
                "generation_engine=ctranslate2: runs on CPUs and GPUs only; leave "
                "--generation_engine out, or evaluate under another profile"
            )
    if static_shapes and args.eval_tokens_per_device is not None:
        raise UserError(
            f"eval_tokens_per_device={args.eval_tokens_per_device}: has no effect where the "
            "device wants few shapes of batches; use --per_device_eval_batch_size"
        )
    if not static_shapes and (args.max_compilations is not None or args.strict_compilations):
        raise UserError(
            "max_compilations, strict_compilations: have no effect here, nothing is compiled "
            "for each shape; leave them out, or take a profile with backend xla"
        )
    check_precision(config, fp16=args.fp16)
    names = ("dropout", "attention_dropout", "encoder_layerdrop", "decoder_layerdrop")
    given = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
    wanted = copy.copy(config)
    apply_dropout_settings(wanted, **given)
    if wanted.to_dict() != config.to_dict():
        settings = ", ".join(f"{name}={value}" for name, value in given.items())
        raise UserError(
            f"{settings}: differs from the model's config, and a model that is built already "
            "cannot take it; load it with s2s_scale.models.load(…, dropout=…), or set the "
            "config before the model is made"
        )


@dataclass(frozen=True)
class Components:
    """The components that a trainer's hooks delegate to."""

    loss: LossComputer
    loaders: TrainDataLoaders
    batches: StepBatches
    meter: TrainingMeter
    bad_steps: BadSteps
    compilations: CompilationWatch
    generator: Generator
    run_state: RunState
    checkpointer: Checkpointer
    preemption: PreemptionCallback
    callbacks: tuple[TrainerCallback, ...]

    def resume(
        self,
        folder: Path,
        model: nn.Module,
        data: Data,
        max_steps: int,
        prepare: Callable[[], Any],
        trained: Callable[[], Trained],
    ) -> Any:
        """Resume from a checkpoint; returns what ``prepare`` returns. Every rank must call it.

        ``prepare`` wraps model and optimizer; ``trained`` then tells what is to be loaded.

        Raises:
            UserError: it is another run's checkpoint.
        """
        self.loaders.enter_stream(folder)
        name = self.run_state.optimizer_name
        with self.checkpointer.open(folder, model, optimizer_name=name) as saved:
            self.run_state.resume(folder, saved.run, data, max_steps=max_steps)
            prepared = prepare()
            schedule = self.run_state.schedule_identity(max_steps=max_steps)
            self.checkpointer.load(saved, trained(), schedule_identity=schedule)
        return prepared


def make_components(
    args: Seq2SeqTrainingArguments,
    backend: Backend,
    config: PreTrainedConfig,
    plain: nn.Module,
    *,
    padding_id: Callable[[], int],
    pad_to: Callable[[Tensor, int], Tensor],
    rows_per_device: Callable[[], int],
    ignores_pads: bool,
    loss_function: bool,
    own_loss: str | None,
    own_steps: bool,
    packable: bool,
) -> Components:
    """The components for ``args``, in which the batching mode may be settled here.

    Args:
        plain: the model inside its wrappers.
        padding_id: gives the token id that fills rows.
        pad_to: pads rows [B, T] to a length with it.
        rows_per_device: gives the rows of a device's micro-batch, where the mode counts rows.
        ignores_pads: pads are excluded from the loss.
        loss_function: ``compute_loss_func`` computes the loss.
        own_loss: name of the subclass that overrides ``_compute_loss``, if there is one.
        own_steps: a subclass overrides the loss or the training step.
        packable: data and collator allow packing.

    Raises:
        ValueError: the loss needs a pad token id that is missing.
        UserError: a setting cannot take effect with this model or backend.
    """
    static = backend.static_shapes
    check_settings(args, config, static_shapes=static)
    mode = _loss_mode(args, config, ignores_pads=ignores_pads)
    reader, obstacle = _loss_limits(args, loss_function=loss_function, own_loss=own_loss)
    loss = LossComputer(
        config,
        mode=mode,
        smoothing=args.label_smoothing or 0.0,
        reduction=args.loss_reduction,
        linear=args.linear_cross_entropy,
        logits_reader=reader,
        packing_obstacle=obstacle,
        static_shapes=static,
        compiled=args.torch_compile,
        padding_id=padding_id,
    )
    if static and packable and not own_steps and loss.packing_problem(plain) is None:
        args.batching_by_default("packed")
    loss.check(plain, packs=args.batching == "packed")
    # Not where a forward pass is traced, or repeated in the backward pass.
    once = not (args.torch_compile or args.gradient_checkpointing)
    fits = once and args.cpu_functions == "auto" and backend.takes_cpu_functions
    # In place where only the trainer asks for gradients, and nothing waits for them.
    alone = backend.plain_backward and backend.collectives.world_size == 1
    in_place = alone and not (own_steps or loss_function)
    on_cpu = fits and backend.device == "cpu"
    backend.cpu_functions = CpuFunctions(in_place=in_place) if on_cpu else None
    loaders = TrainDataLoaders(
        args, backend, padding_id=padding_id, rows_per_device=rows_per_device
    )
    bad_steps = BadSteps(
        backend,
        limit=args.max_nonfinite_steps,
        output_dir=Path(str(args.output_dir)),
        device=args.device,
        spike_factor=args.loss_spike_factor,
        max_spikes=args.max_loss_spikes,
    )
    compilations = CompilationWatch(
        backend.compilations, limit=args.max_compilations, strict=args.strict_compilations
    )
    checkpointer, preemption = Checkpointer(args, backend), PreemptionCallback(backend)
    return Components(
        loss,
        loaders,
        StepBatches(backend.place_batches, loss.count_tokens),
        TrainingMeter(args.device),
        bad_steps,
        compilations,
        Generator(args, backend, padding_id=padding_id, pad_to=pad_to),
        RunState(args, backend, bad_steps, loss_mode=mode),
        checkpointer,
        preemption,
        (
            StepCallback(backend, bad_steps, compilations, sampler=lambda: loaders.train_sampler),
            SeedCallback(backend.seed, rank=backend.collectives.rank),
            SettleCallback(checkpointer.settle),
            preemption,
        ),
    )


def _loss_mode(
    args: Seq2SeqTrainingArguments, config: PreTrainedConfig, *, ignores_pads: bool
) -> str:
    pad, eos = config.pad_token_id, config.eos_token_id
    mode = SMOOTHED if args.label_smoothing else CROSS_ENTROPY if ignores_pads else MODEL
    if pad is None and mode != MODEL:
        raise ValueError(
            "config.pad_token_id is None, but label smoothing and pad exclusion need it; set "
            "it to the tokenizer's pad token id, or train with label_smoothing=0 and "
            "ignore_pad_token_for_loss=False"
        )
    if pad is None and eos is not None:
        logger.warning(
            f"config.pad_token_id is None: config.eos_token_id = {eos} is used for padding."
        )
    return mode


def _loss_limits(
    args: Seq2SeqTrainingArguments, *, loss_function: bool, own_loss: str | None
) -> tuple[str | None, str | None]:
    """Who needs logits, and what prevents packing, other than the model."""
    reader = obstacle = None
    if args.n_gpu > 1:
        reader = obstacle = "DataParallel copies the model to several devices within the process"
    if own_loss is not None:
        reader = f"{own_loss} has a _compute_loss of its own, which may read logits"
    if args.torch_compile:
        obstacle = "torch_compile would compile each step anew: masks are put in for one call"
    if loss_function:
        reader = "compute_loss_func takes the model's outputs"
        obstacle = "compute_loss_func takes outputs of one pair a row"
    return reader, obstacle


def padding_id(tokenizer: Any, config: PreTrainedConfig) -> int:
    """Token id that fills rows: the tokenizer's pad, the config's, else its EOS.

    Raises:
        ValueError: none of them is defined.
    """
    candidates = (
        getattr(tokenizer, "pad_token_id", None),
        config.pad_token_id,
        getattr(tokenizer, "eos_token_id", None),
        config.eos_token_id,
    )
    for candidate in candidates:
        if candidate is not None:
            return int(candidate[0] if isinstance(candidate, list) else candidate)
    raise ValueError(
        "neither config.pad_token_id nor config.eos_token_id is defined: one of them is needed "
        "to pad tensors; set config.pad_token_id"
    )
