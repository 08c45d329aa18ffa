"""``Seq2SeqTrainer``: transformers' trainer with our loss, batches, evaluation and checkpoints."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, cast

import datasets
import torch
import transformers
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.trainer_utils import (
    EvalLoopOutput,
    EvalPrediction,
    PredictionOutput,
    TrainOutput,
    has_length,
)

from s2s_scale.arguments import Seq2SeqTrainingArguments
from s2s_scale.backends import Backend, make_backend
from s2s_scale.checkpoint import STATE_FILE, whole_files
from s2s_scale.checkpoint.portable import SETTINGS, write_json
from s2s_scale.data.collators import Collate, Seq2SeqCollator
from s2s_scale.data.packing import PackedSampler
from s2s_scale.data.plan_summary import PlanSummary, summarise
from s2s_scale.data.prefetch import ArrowRows, reads_from_arrow
from s2s_scale.data.samplers import EpochSampler, TokenSampler
from s2s_scale.data.streaming import StreamedExamples
from s2s_scale.errors import UserError, raise_problems
from s2s_scale.models import (
    apply_dropout_settings,
    check_precision,
    source_vocab_size,
    target_vocab_size,
)
from s2s_scale.optim import build_schedule, decay_parameter_names, parameter_groups
from s2s_scale.resilience import watchdog
from s2s_scale.trainer import compat
from s2s_scale.trainer.auto_batch import Trial
from s2s_scale.trainer.bad_steps import BadSteps
from s2s_scale.trainer.callbacks import (
    PreemptionCallback,
    SeedCallback,
    SettleCallback,
    StepCallback,
)
from s2s_scale.trainer.checkpointing import (
    Checkpointer,
    Trained,
    is_portable,
    is_stock,
    load_schedule,
)
from s2s_scale.trainer.dataloaders import (
    EvaluationLoader,
    StepBatches,
    TrainDataLoaders,
    pads_only,
)
from s2s_scale.trainer.evaluation import (
    Evaluation,
    EvaluationStopped,
    Generator,
    TextEvaluationFor,
    check_evaluation,
    generation_defaults,
    generation_length,
)
from s2s_scale.trainer.loss import CROSS_ENTROPY, MODEL, SMOOTHED, LossComputer
from s2s_scale.trainer.metrics import (
    GENERATION_GRAPHS,
    CompilationWatch,
    TrainingMeter,
    batch_shape,
    check_compilation_limits,
)
from s2s_scale.trainer.run_state import (
    Data,
    RunState,
    export_callbacks,
    settings_and_versions,
    stream_position,
)
from s2s_scale.trainer.streaming import StreamLoader, streaming_problems

logger = transformers.utils.logging.get_logger(__name__)

MEASURED_STEPS = 200
P = ParamSpec("P")


def _takes_config_first(init: Callable[P, None]) -> Callable[P, None]:
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


class Seq2SeqTrainer(transformers.Seq2SeqTrainer):
    """Trains encoder-decoder models so that a step's loss depends on its rows and on nothing else.

    The loss has three modes: label-smoothed NLL where ``label_smoothing`` is not 0; cross entropy
    without pads where ``data_args.ignore_pad_token_for_loss`` is true; else the model's own loss.

    Every hook of transformers' trainer can be overridden in a subclass, and so can
    ``_compute_loss``.

    Args:
        model, args, data_collator, train_dataset, eval_dataset, processing_class, model_init, \
compute_loss_func, compute_metrics, callbacks, optimizers, preprocess_logits_for_metrics: as for
            transformers' ``Seq2SeqTrainer``. ``args`` may be transformers' own; they are copied,
            and the trainer's are ``self.args``.
        config: the model's configuration; by default ``model.config``.
        data_args: any object; read are ``ignore_pad_token_for_loss``, ``val_max_target_length``
            and ``eval_beams``, where it has them.
        tokenizer: another name of ``processing_class``.
        backend: carries the steps onto the hardware; by default one process on the device of
            ``args``.
        text_evaluation_for: called for each evaluation with ``predict_with_generate``; texts then
            go to the object it returns, and no token arrays are kept.

    Raises:
        ValueError: no config can be had, or the loss needs a pad token id that is missing.
        UserError: a setting cannot take effect.
    """

    args: Seq2SeqTrainingArguments
    model: Any
    train_dataset: Any
    eval_dataset: Any
    optimizer: Any
    lr_scheduler: Any
    compute_metrics: Any

    settings_of_run: Mapping[str, tuple[Any, str]] | None = None
    """Setting -> (value, origin) of the command line, where one started the run."""

    @_takes_config_first
    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        config: PreTrainedConfig | None = None,
        data_args: Any = None,
        tokenizer: Any = None,
        backend: Backend | None = None,
        text_evaluation_for: TextEvaluationFor | None = None,
    ) -> None:
        if tokenizer is not None and processing_class not in (None, tokenizer):
            raise ValueError(
                "tokenizer and processing_class name the same thing but two different ones were "
                "given; pass one of them"
            )
        if config is None and model is not None and not isinstance(model, PreTrainedModel):
            raise ValueError(
                "config: without one the model must be a PreTrainedModel, but it is a "
                f"{type(model).__name__}; pass config=…"
            )
        own_args = _copy_of(args)
        self.backend = backend or make_backend("local", own_args.device.type)
        self.data_args = data_args
        self.text_evaluation_for = text_evaluation_for
        _settle_batching(own_args, train_dataset, static_shapes=self.backend.static_shapes)
        super().__init__(
            model=model,
            args=own_args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer if processing_class is None else processing_class,
            model_init=model_init,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.config: PreTrainedConfig = config if config is not None else self.model.config
        self.vocab_size = target_vocab_size(self.config)
        self.train_sampler: EpochSampler | None = None
        """This rank's sampler, which holds the batch plan, once the training data are loaded."""
        self._stream: StreamLoader | None = None
        self._evaluation: Evaluation | None = None
        self._make_components()
        # Our loss is divided by the step's tokens already; these two (the first up to
        # transformers 5.17, the second after) keep the trainer from dividing once more.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True

    def _make_components(self) -> None:
        """Make the components, each from values, and check the settings that they go by."""
        args, backend = self.args, self.backend
        static = backend.static_shapes
        check_evaluation(args, self.config, static_shapes=static)
        self._loss = self._make_loss()
        self._loaders = TrainDataLoaders(args, backend, padding_id=self._padding_id)
        plain, whole = self._plain_model(), self._loss_is_ours()
        usual = whole and has_length(self.train_dataset) and pads_only(self.data_collator)
        if static and usual and self._loss.packing_problem(plain) is None:
            args.batching_by_default("packed")
        self._loss.check(plain, packs=args.batching == "packed")
        check_precision(self.config, fp16=args.fp16)
        _check_dropouts(args, self.config)
        # Not where a forward pass is traced, or repeated in the backward pass.
        twice = args.torch_compile or args.gradient_checkpointing
        backend.use_own_functions(args.cpu_functions == "auto" and not twice, in_place=whole)
        self._meter = TrainingMeter(args.device)
        self._batches = StepBatches(backend.place_batches, self._loss.count_tokens)
        self._bad_steps = BadSteps(
            backend,
            limit=args.max_nonfinite_steps,
            output_dir=Path(str(args.output_dir)),
            device=args.device,
            spike_factor=args.loss_spike_factor,
            max_spikes=args.max_loss_spikes,
        )
        check_compilation_limits(args, static_shapes=static)
        self._compilations = CompilationWatch(
            lambda: backend.compilations()[0],
            limit=args.max_compilations,
            strict=args.strict_compilations,
        )
        self._generator = Generator(backend, args.device, engine=args.generation_engine)
        self._run_state = RunState(args, backend, loss_mode=self._loss.mode)
        self._checkpointer = Checkpointer(args, backend)
        self._preemption = PreemptionCallback(backend)
        self.add_callback(
            StepCallback(
                backend, self._bad_steps, self._compilations, sampler=lambda: self.train_sampler
            )
        )
        self.add_callback(SeedCallback(backend.seed, rank=backend.collectives.rank))
        self.add_callback(SettleCallback(self._checkpointer.settle))
        self.add_callback(self._preemption)

    def _make_loss(self) -> LossComputer:
        args, pad, eos = self.args, self.config.pad_token_id, self.config.eos_token_id
        mode = (
            CROSS_ENTROPY if getattr(self.data_args, "ignore_pad_token_for_loss", False) else MODEL
        )
        mode = SMOOTHED if args.label_smoothing else mode
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
        given = self.compute_loss_func is not None
        own_loss = f"{type(self).__name__} has a _compute_loss of its own, which may read logits"
        copies = "DataParallel copies the model to several devices within the process"
        compiles = "torch_compile would compile each step anew: masks are put in for one call"
        return LossComputer(
            self.config,
            mode=mode,
            smoothing=args.label_smoothing or 0.0,
            reduction=args.loss_reduction,
            linear=args.linear_cross_entropy,
            logits_reader=_first_true(
                (given, "compute_loss_func takes the model's outputs"),
                (not self._is_ours("_compute_loss"), own_loss),
                (args.n_gpu > 1, copies),
            ),
            packing_obstacle=_first_true(
                (given, "compute_loss_func takes outputs of one pair a row"),
                (args.torch_compile, compiles),
                (args.n_gpu > 1, copies),
            ),
            static_shapes=self.backend.static_shapes,
            compiled=args.torch_compile,
            padding_id=self._padding_id,
        )

    def _is_ours(self, name: str) -> bool:
        """Whether a method is the one of this class, overridden in no subclass or object."""
        return name not in vars(self) and getattr(type(self), name) is getattr(Seq2SeqTrainer, name)

    def _loss_is_ours(self) -> bool:
        """Whether nobody else has a hand in the loss: a subclass, or a function that was given."""
        hooks = ("compute_loss", "_compute_loss", "training_step")
        return self.compute_loss_func is None and all(map(self._is_ours, hooks))

    def _plain_model(self) -> Any:
        """The model inside all wrappers; autocast around its forward stays."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _padding_id(self) -> int:
        """Token id that fills rows: the tokenizer's pad, the config's, else its EOS."""
        candidates = (
            getattr(self.processing_class, "pad_token_id", None),
            self.config.pad_token_id,
            getattr(self.processing_class, "eos_token_id", None),
            self.config.eos_token_id,
        )
        for candidate in candidates:
            if candidate is not None:
                return int(candidate[0] if isinstance(candidate, list) else candidate)
        raise ValueError(
            "neither config.pad_token_id nor config.eos_token_id is defined: one of them is needed "
            "to pad tensors; set config.pad_token_id"
        )

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        self.backend.place_model(model)
        super()._move_model_to_device(model, device)

    # ---- Loss ----

    def _compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], labels: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Loss and logits [B, T, V] of one batch.

        The loss is the mean over the batch's target tokens, or their sum with
        ``loss_reduction="sum"``. Override this to train with another loss per token: what it gets
        from ``super()`` then always holds logits. They are None only where ``compute_loss`` was
        not asked for outputs and linear cross entropy has computed the loss without them.
        """
        return self._loss.compute(model, inputs, labels, self._plain_model())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """A batch's share of its step's loss: summed over the batch, divided by the step's tokens.

        ``num_items_in_batch`` is the number of target tokens of the whole step (all micro-batches,
        all ranks); without it the batch's own number is used. The shares add up to the step's
        loss on any number of ranks and micro-batches.
        """
        if "labels" not in inputs:
            raise ValueError(
                f"a batch needs labels to have a loss; it has: {', '.join(inputs)}; let the "
                "collator return 'labels'"
            )
        labels = inputs["labels"]
        if self.compute_loss_func is not None:
            model_inputs = self._loss.with_decoder_inputs(inputs, labels, self._plain_model())
            inputs = {**model_inputs, "labels": labels}
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self._loss.logits_wanted(return_outputs):
            loss, logits = self._compute_loss(model, inputs, labels)
        averaged = self.backend.averaged_ranks
        found = self._loss.share(loss, labels, num_items_in_batch, averaged_ranks=averaged)
        if self._evaluation is not None:
            self._evaluation.add_loss(found.sums)
        elif self.is_in_train:
            self._meter.add(found.nll_share)
        share = found.share
        return (share, Seq2SeqLMOutput(loss=share, logits=logits)) if return_outputs else share

    def _mean_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Mean loss of one batch; no logits are asked for. Every rank must call it."""
        tokens = self._get_num_items_in_batch([inputs], self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, num_items_in_batch=tokens)
        return cast("Tensor", loss.detach().mean())

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Any]], device: torch.device
    ) -> Tensor | None:
        """Target tokens that count in ``batch_samples`` on all ranks; every rank must call it."""
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        counts = [cast("Tensor", self._loss.count_tokens(batch)) for batch in batch_samples]
        return self.backend.collectives.all_reduce_sum(torch.stack(counts).sum().to(device))

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        return self.backend.autocast()

    # ---- Steps ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, from a checkpoint if one is given. Every rank must call it.

        Raises:
            Stopped: this process, or another rank's, was asked to stop, and everything is saved.
            UserError: the checkpoint is that of another run.
            NonFiniteLossError: too many steps were bad.
        """
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        except EvaluationStopped:  # the one before the first step
            self._preemption.leave("with nothing to save", step=self.state.global_step)
        finally:
            self._batches.end()

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The next step's micro-batches, placed, and its target tokens on all ranks."""
        batches, tokens = self._batches.take(epoch_iterator, num_batches, self._meter)
        step_tokens: Any = None
        if not self._is_ours("_get_num_items_in_batch"):
            step_tokens = self._get_num_items_in_batch(batches, device)
        elif tokens is not None:
            step_tokens = self.backend.collectives.sum_counts(tokens, device)
        if step_tokens is not None:
            self._meter.start_step(step_tokens)
        if self.args.gradient_accumulation_steps > 1:
            # Else the sum of the step's tokens would belong to the graph of the first micro-batch.
            self._end_graph()
        return batches, step_tokens

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return super()._prepare_inputs(dict(self.backend.place_batch(inputs)))

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        if self.backend.static_shapes:
            self._compilations.start_micro_batch(batch_shape(inputs))
            compat.renew_loss_sum(self)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._bad_steps.observe(loss)
        self._bad_steps.add_loss(loss)
        if not self.args.logging_nan_inf_filter:
            loss = torch.where(torch.isfinite(loss), loss, torch.zeros_like(loss))
        self.backend.finish_micro_batch(self.model, last=self.accelerator.sync_gradients)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # With a loss scaler an infinite norm is the scaler's signal to halve the scale.
        if not self.args.fp16:
            self._bad_steps.observe(norm)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        compilations, seconds = self.backend.compilations()
        if compilations and "loss" in logs:
            logs |= {"compilations": compilations, "compile_seconds": seconds}
        if ("loss" in logs or "train_loss" in logs) and self.is_in_train:
            self._bad_steps.read(self.optimizer)
        if "loss" in logs and self.is_in_train:
            logs |= self._meter.read(self.backend.collectives.all_reduce_sum)
            logs |= self._bad_steps.counts(fp16=self.args.fp16)
        if "train_loss" in logs:  # the summary at the end, which becomes the results
            logs |= self._bad_steps.totals(fp16=self.args.fp16)
            if self._meter.pad_share is not None:
                logs["train_pad_share"] = self._meter.pad_share
        super().log(logs, start_time)
        self._end_graph()

    def bad_steps(self) -> list[tuple[str, ...]]:
        """Step, what was found, what was done, and row ids of each bad step, for the report."""
        return self._bad_steps.table()

    def _end_graph(self) -> None:
        """Run what is pending now, so that it does not become a part of the next step's graph."""
        self.backend.flush()
        self._compilations.skip()

    def _run_epoch(self, **given: Any) -> None:  # type: ignore[override]
        names = ("model", "trial", "epoch", "ignore_keys_for_eval", "start_time")
        self._do_pending(*(given[name] for name in names))
        finished = self.state.global_step >= self.state.max_steps
        if finished or self.control.should_training_stop:
            # transformers would train one step more of a run that had ended.
            self.control.should_training_stop = True
            return
        super()._run_epoch(**given)

    def _maybe_log_save_evaluate(
        self,
        tr_loss: Any,
        grad_norm: Any,
        model: Any,
        trial: Any,
        epoch: Any,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        """transformers' hook after each step and each epoch: there a run stops, if it was asked."""
        control = self.control
        due = {"evaluate": control.should_evaluate, "save": control.should_save}
        rest = (grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate)
        if not self._preemption.due(self.state):
            try:
                super()._maybe_log_save_evaluate(tr_loss, *rest)
                return
            except EvaluationStopped:
                pass
        # What was trained since the last log would otherwise be in no log.
        control.should_log = True
        control.should_evaluate = control.should_save = False
        super()._maybe_log_save_evaluate(tr_loss, *rest)
        self._run_state.leave_pending(**due)
        self._save_checkpoint(model, trial)
        self.settle_background_save(wait=True)
        saved = f"saved in {self._checkpoint_dir(trial)}"
        self._preemption.leave(saved, step=self.state.global_step)

    def _do_pending(
        self, model: Any, trial: Any, epoch: Any, ignore_keys: Any, start_time: float
    ) -> None:
        """The evaluation, and the save after it, that a stopped run had left undone."""
        pending = self._run_state.take_pending()
        if pending["evaluate"]:
            self.control.should_log = False
            self.control.should_evaluate, self.control.should_save = True, pending["save"]
            self._preemption.end_epoch()
            self._maybe_log_save_evaluate(
                compat.loss_sum(self), None, model, trial, epoch, ignore_keys, start_time
            )

    def _finalize_training(
        self, trial: Any, num_train_samples: int, start_time: float
    ) -> TrainOutput:
        self._do_pending(self.model_wrapped, trial, self.state.epoch, None, start_time)
        self.settle_background_save(wait=True)
        return super()._finalize_training(trial, num_train_samples, start_time)

    # ---- Optimizer and schedule ----

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return decay_parameter_names(model)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """The optimizer of ``args.optim`` over groups with and without decay, by the backend."""
        if self.optimizer is not None:
            return cast("Optimizer", self.optimizer)
        target: Any = self.model if model is None else model
        decaying = self.get_decay_parameter_names(target)
        groups = parameter_groups(target, self.args.weight_decay, decaying)
        if not groups:
            raise UserError(
                "the model has no parameter left to train: everything is frozen; drop "
                "--freeze_encoder or --freeze_embeds"
            )
        try:
            kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, target
            )
        except (ImportError, ValueError) as error:
            raise UserError(
                f"optim={_plain(self.args.optim)}: {_first_line(error)}; expected an optimizer "
                "that is installed here; choose another --optim or install what it needs"
            ) from error
        # GaLore, LOMO and their like bring their own groups or are factories: transformers knows.
        if {"params", "model", "optimizer_dict"} & set(options) or not issubclass(kind, Optimizer):
            return super().create_optimizer(model)
        self.optimizer = self.backend.build_optimizer(kind, groups, options)
        return cast("Optimizer", self.optimizer)

    def create_scheduler(
        self, num_training_steps: int, optimizer: Optimizer | None = None
    ) -> LRScheduler:
        """The schedule over ``num_training_steps`` optimizer steps, unless one was passed in."""
        # Model and optimizer have just been wrapped, and a checkpoint is read after this.
        self._tie_optimizer(optimizer or self.optimizer)
        if self.lr_scheduler is not None:
            if not compat.scheduler_is_ours(self):
                logger.warning(
                    "A schedule was passed in `optimizers`: lr_scheduler="
                    f"{self.args.schedule_name} and warmup_steps are unused."
                )
        elif self.args.schedule_name is not None:
            self.lr_scheduler = self._get_lr_scheduler(num_training_steps, optimizer=optimizer)
            compat.scheduler_is_ours(self, True)
        else:
            try:
                super().create_scheduler(num_training_steps, optimizer)
            except (TypeError, ValueError) as error:
                name = _plain(self.args.lr_scheduler_type)
                raise UserError(
                    f"lr_scheduler_type={name}: {_first_line(error)}; give what it needs in "
                    "--lr_scheduler_kwargs, or choose another --lr_scheduler"
                ) from error
        return cast("LRScheduler", self.lr_scheduler)

    def _get_lr_scheduler(
        self, num_training_steps: int, *, optimizer: Optimizer | None = None
    ) -> LRScheduler:
        """The schedule of ``--lr_scheduler``; the legacy trainer's hook."""
        return build_schedule(
            str(self.args.schedule_name),
            optimizer or self.optimizer,
            num_warmup_steps=self.args.get_warmup_steps(num_training_steps),
            num_training_steps=num_training_steps,
            **self.args.schedule_options,
        )

    def _tie_optimizer(self, optimizer: Any) -> None:
        self._optimizer_is_tied = True
        self.backend.after_prepare(optimizer)

    # ---- Data ----

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        """This rank's training rows in the order of the batch plan.

        Every rank must call it with the same data set. A data set without a length gives None.
        """
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if dataset is None or not self._loaders.follows_plan(dataset):
            return super()._get_train_sampler(dataset)
        return self._loaders.sampler(dataset, rows_per_device=compat.rows_per_micro_batch(self))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Micro-batches of this rank by the batch plan."""
        dataset, self.train_sampler, self._stream = self.train_dataset, None, None
        if isinstance(dataset, StreamedExamples):
            rows = compat.rows_per_micro_batch(self)
            self._stream = self._loaders.streamed(dataset, self.data_collator, rows_per_device=rows)
            return cast("DataLoader[Any]", self._stream)
        if dataset is None or not self._loaders.follows_plan(dataset):
            return super().get_train_dataloader()
        if self.args.auto_batch and self.args.max_tokens_per_device is None:
            self._settle_micro_batches()
        sampler = self._get_train_sampler()
        if not isinstance(sampler, EpochSampler):  # that of a subclass, which knows of no plan
            return super().get_train_dataloader()
        self.train_sampler = sampler
        table, collate = self._model_columns(dataset, "training")
        if isinstance(sampler, PackedSampler):
            collate = self._loaders.packing(self.data_collator, self.config)
        else:
            collate = self._loaders.padded(collate, self.processing_class)
        return self._loaders.planned(table, sampler, collate)

    def _settle_micro_batches(self) -> None:
        """Find the largest micro-batch that fits, by trying; see ``auto_batch``."""

        def try_batch(batch: Mapping[str, Tensor]) -> None:
            self.model.train()
            with self.compute_loss_context_manager(), self.accelerator.autocast():
                loss = self.compute_loss(self.model, dict(batch))
            loss.backward()
            self.backend.finish_step(self.model)

        parameters = list(self._plain_model().parameters())
        vocabulary = min(source_vocab_size(self.config), self.vocab_size)
        trial = Trial(try_batch, parameters, device=self.args.device, vocabulary=vocabulary)
        size = sum(parameter.numel() for parameter in parameters)
        self._loaders.settle_micro_batches(self.train_dataset, trial, parameters=size)
        self._meter = TrainingMeter(self.args.device)

    def _model_columns(self, dataset: Any, use: str) -> tuple[Any, Collate]:
        """Data set and collator without the columns that the model's forward does not take."""
        if not isinstance(dataset, datasets.Dataset):
            return dataset, compat.dropping_unused_columns(self, self.data_collator, use)
        kept = compat.without_unused_columns(self, dataset, use)
        # Collators of others may count on lists.
        ours = isinstance(self.data_collator, Seq2SeqCollator) and reads_from_arrow(kept)
        return ArrowRows(kept) if ours else kept, self.data_collator

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if dataset is None:
            raise ValueError("evaluation needs a data set: pass eval_dataset")
        if not self._loaders.evaluates_sorted(dataset):
            return super().get_eval_dataloader(eval_dataset)
        return self._loaders.evaluation(dataset, partial(self._evaluation_rows, dataset))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        if not self._loaders.evaluates_sorted(test_dataset):
            return super().get_test_dataloader(test_dataset)
        return self._loaders.evaluation(test_dataset, partial(self._evaluation_rows, test_dataset))

    def _evaluation_rows(self, dataset: Any) -> tuple[Any, Collate]:
        table, collate = self._model_columns(dataset, "evaluation")
        return table, self._loaders.padded(collate, self.processing_class)

    def get_total_train_batch_size(self, args: Any) -> int:
        """Rows of a step on all devices; with a budget of tokens, their mean."""
        sampler = self.train_sampler
        if isinstance(sampler, (TokenSampler, PackedSampler)) and sampler.steps:
            return max(1, round(len(sampler.lengths[0]) / sampler.steps))
        return int(super().get_total_train_batch_size(args))

    def plan_summary(self) -> PlanSummary | None:
        """The shapes of training batches and their share of real tokens, as planned.

        Measured on some steps of an epoch; None where shapes are free or no plan was followed.
        """
        sampler = self.train_sampler
        if sampler is None or sampler.lengths is None or self._loaders.num_buckets is None:
            return None
        return summarise(sampler, sampler.lengths, most_steps=MEASURED_STEPS)

    # ---- Evaluation ----

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **gen_kwargs: Any,
    ) -> dict[str, float]:
        """Loss, NLL and metrics on a data set; ``gen_kwargs`` go to ``generate``.

        Every rank must call it. A dictionary of data sets is evaluated one by one, with the name
        in the metrics' prefix.
        """
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(chosen, dict):
            metrics: dict[str, float] = {}
            for name, part in chosen.items():
                prefix = f"{metric_key_prefix}_{name}"
                metrics |= self.evaluate(part, ignore_keys, prefix, **gen_kwargs)
            return metrics
        options = self._generation_defaults(gen_kwargs)
        with self._stoppable(), self._meter.paused():
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **options)

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        **gen_kwargs: Any,
    ) -> PredictionOutput:
        """Predictions and metrics, rows in the data's order; ``gen_kwargs`` go to ``generate``.

        Every rank must call it.
        """
        options = self._generation_defaults(gen_kwargs)
        with self._stoppable():
            return super().predict(test_dataset, ignore_keys, metric_key_prefix, **options)

    def _generation_defaults(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """``data_args`` fills in where neither the call nor the training arguments say."""
        data, args = self.data_args, self.args
        length = getattr(data, "evaluation_target_length", None) or getattr(
            data, "val_max_target_length", None
        )
        beams = getattr(data, "eval_beams", None)
        return generation_defaults(
            given,
            length=length if args.generation_max_length is None else None,
            beams=beams if args.generation_num_beams is None else None,
        )

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Context of an evaluation, which ends the run if it is stopped outside of training."""
        try:
            yield
        except EvaluationStopped:
            if self.is_in_train:
                raise
            self._leave_after_training()

    def _leave_after_training(self) -> NoReturn:
        """Stop in an evaluation after training; there must be something to resume from."""
        found = self._checkpointer.newest(Path(str(self.args.output_dir)))
        if found is None and self.optimizer is not None:
            self._save_checkpoint(self.model, None)
            self.settle_background_save(wait=True)
            found = self._checkpoint_dir(None)
        what = f"it resumes from {found}" if found else "with nothing to save"
        self._preemption.leave(what, step=self.state.global_step)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """transformers' loop, with rows back in data order and token-weighted losses."""
        self._end_graph()
        generates = self.args.predict_with_generate
        loader = dataloader if isinstance(dataloader, EvaluationLoader) else None
        compute_metrics = self.compute_metrics
        evaluation = self._evaluation = Evaluation(
            self.backend,
            self.args.device,
            loader,
            text_evaluation_for=self.text_evaluation_for if generates else None,
            prefix=metric_key_prefix,
        )
        self.compute_metrics = evaluation.ordered(compute_metrics)
        generates = generates and not (prediction_loss_only and not evaluation.gathers_text)
        try:
            with self._generator.weights_of(self.model, wanted=generates):
                output = super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
            return evaluation.finish(output)
        finally:
            self.compute_metrics, self._evaluation = compute_metrics, None
            self._end_graph()

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Any, Any, Tensor | None]:
        """Loss, generated tokens (or logits) and labels of one batch; every rank must call it.

        Generated tokens [B, L] and labels [B, L] are padded to the generation limit L. They lie in
        host memory where the device compiles every new shape: what follows has many of them.
        """
        if self._preemption.requested():
            raise EvaluationStopped
        generates = self.args.predict_with_generate and not prediction_loss_only
        if generates or (self._evaluation is not None and self._evaluation.gathers_text):
            found = self._generation_step(model, inputs, gen_kwargs)
        elif prediction_loss_only and "labels" in inputs:
            found = self._mean_loss(model, self._prepare_inputs(inputs)), None, None
        else:
            found = super().prediction_step(
                model, inputs, prediction_loss_only, ignore_keys=ignore_keys
            )
        if not self.backend.static_shapes:
            return found
        outputs, labels = (self._generator.on_host(value) for value in found[1:])
        self.backend.flush()
        graphs = 1 + (GENERATION_GRAPHS if self.args.predict_with_generate else 0)
        step = self.state.global_step
        self._compilations.ran("evaluation", batch_shape(inputs), step=step, graphs=graphs)
        # The loss is in the evaluation's own sums. transformers would join the batches' losses on
        # the device, in a tensor whose length is another one each time.
        return None, outputs, labels

    def _generation_step(
        self, model: nn.Module, inputs: dict[str, Any], gen_kwargs: Mapping[str, Any]
    ) -> tuple[Any, Any, Tensor | None]:
        """As ``prediction_step``, where target rows are generated."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.get("labels")
        options = gen_kwargs or compat.generation_keywords(self)
        options = {name: value for name, value in options.items() if value is not None}
        rows = self._evaluation.next_rows() if self._evaluation is not None else None
        generated = self._generator.generate(self.model, inputs, options, rows)
        loss = None if labels is None else self._mean_loss(model, inputs)
        if rows is not None and self._evaluation is not None:
            if self.backend.static_shapes:
                labels = self._generator.on_host(labels)
            self._evaluation.add_text(generated, labels, rows, padding=self._padding_id())
            return loss, None, None
        if self.args.prediction_loss_only:
            return loss, None, None
        length = generation_length(options, self.model.generation_config)
        generated = self._pad_tensors_to_max_len(generated, length)
        if labels is not None:
            # As transformers does: scripts decode them without looking for -100.
            labels = self._pad_tensors_to_max_len(labels, length)
        return loss, generated, labels

    def _pad_tensors_to_max_len(self, tensor: Tensor, max_length: int) -> Tensor:
        """``tensor`` [B, T] padded on the right to [B, max_length]; a longer one stays as it is."""
        missing = max_length - tensor.shape[-1]
        pad = self._padding_id()
        return nn.functional.pad(tensor, (0, missing), value=pad) if missing > 0 else tensor

    # ---- Checkpoints ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write model and tokenizer, whole or not at all. Every rank must call it.

        Raises:
            SaveError: the files cannot be written; names the last good checkpoint.
        """
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        folder = Path(str(output_dir or self.args.output_dir))
        with whole_files(folder, self._checkpointer.ranks) as partial_folder:
            super().save_model(str(partial_folder), _internal_call=True)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if state_dict is None:
            state_dict = self.backend.weights_to_save(self.model)
        super()._save(output_dir, state_dict=state_dict)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write ``checkpoint-<step>``, whole or not at all, then delete what is over the limit.

        Raises:
            SaveError: the files cannot be written; names the last good checkpoint.
        """
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        final = self._checkpoint_dir(trial)
        best = final.with_name(f"checkpoint-{self.state.best_global_step}")
        if self.state.best_global_step and (best == final or best.is_dir()):
            self.state.best_model_checkpoint = str(best)
        scale = self.backend.loss_scale(self.optimizer, self._scaler)
        with self._meter.paused(), watchdog.pause("saving"):
            self._checkpointer.save(
                final,
                self._trained(),
                training_state=partial(self._training_state, scale),
                describe=self._describe,
                write_native=self._write_native,
                best=self.state.best_model_checkpoint,
            )
        if self.args.push_to_hub:
            self.settle_background_save(wait=True)
            if self._checkpointer.ranks.main:
                compat.push_checkpoint(self, str(final))

    def _checkpoint_dir(self, trial: Any) -> Path:
        return Path(compat.run_dir(self, trial)) / f"checkpoint-{self.state.global_step}"

    @property
    def _scaler(self) -> Any:
        return getattr(self.accelerator, "scaler", None)

    def _trained(self) -> Trained:
        """What a checkpoint saves; without the optimizer where only weights are wanted."""
        optimizer = None if self.args.save_only_model else self.optimizer
        return Trained(self._plain_model(), optimizer, self.processing_class)

    def _data(self) -> Data:
        dataset = self.train_dataset
        streamed = isinstance(dataset, StreamedExamples)
        planned = dataset is not None and (streamed or self._loaders.follows_plan(dataset))
        return Data(
            dataset if planned else None,
            self.processing_class,
            self.train_sampler,
            self._stream,
            compat.rows_per_micro_batch(self),
        )

    def _training_state(self, loss_scale: Mapping[str, float] | None) -> dict[str, Any]:
        parameters = self._plain_model().named_parameters()
        return self._run_state.training_state(
            self._data(),
            self.state,
            schedule=self.lr_scheduler.state_dict(),
            frozen=[name for name, parameter in parameters if not parameter.requires_grad],
            loss_scale=loss_scale,
            bad_steps=self._bad_steps.state(),
        )

    def _describe(self, folder: Path) -> None:
        """The trainer's state and the settings, which both formats have."""
        export_callbacks(self.state, [*self.callback_handler.callbacks, self.control])
        self.state.save_to_json(str(folder / STATE_FILE))
        write_json(folder / SETTINGS, settings_and_versions(self.settings_of_run or {}))

    def _write_native(self, folder: Path) -> None:
        """The files that transformers and the backend's library write themselves."""
        super().save_model(str(folder), _internal_call=True)
        if not self.args.save_only_model:
            with self.backend.consolidated_state(self.optimizer):
                compat.save_training_state(self, str(folder))

    @property
    def save_seconds(self) -> list[float]:
        """How long training stood still for each checkpoint."""
        return self._checkpointer.seconds

    def settle_background_save(self, *, wait: bool = False) -> None:
        """Take note of a save in the background that has ended. Every rank must call it.

        Raises:
            SaveError: it failed; on every rank.
        """
        self._checkpointer.settle(wait=wait)

    def wait_for_background_save(self) -> None:
        """Wait until this process writes nothing any more; for the end of a run that failed."""
        self._checkpointer.wait()

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        """Wrap model and optimizer, and resume: at the step, the schedule and the data's place."""
        data = self._data()
        self._run_state.data_identity(data)  # read here, so that no save has to wait for it
        self._optimizer_is_tied = False
        if resume_from_checkpoint is None:
            return self._prepare(max_steps, train_dataloader, None)
        # The saved state brought the old run's intervals along.
        self.state.compute_steps(self.args, max_steps)
        folder = Path(resume_from_checkpoint)
        if self._stream is not None:
            self._stream.go_on(*stream_position(folder))
        name, shape = self._run_state.optimizer_name, self._run_state.shape(data)
        plain = self._plain_model()
        with self._checkpointer.open(folder, plain, optimizer_name=name, shape=shape) as saved:
            skipped = self._run_state.resume(folder, saved.run, data, max_steps=max_steps)
            self._bad_steps.load(skipped)
            if saved.state is None:
                return self._prepare(max_steps, train_dataloader, str(folder))
            prepared = self._prepare(max_steps, train_dataloader, None)
            trained = Trained(self._plain_model(), self.optimizer)
            self._checkpointer.load(saved, trained, scaler=self._scaler)
            load_schedule(
                self.lr_scheduler,
                self.optimizer,
                saved,
                {
                    **self._run_state.schedule_identity(max_steps=self.state.max_steps),
                    "learning_rate": self.args.learning_rate,
                },
                name=_plain(self.args.lr_scheduler_type),
            )
        return prepared

    def _prepare(self, max_steps: int, train_dataloader: Any, checkpoint: str | None) -> Any:
        """transformers' preparation, after which the backend knows the wrapped optimizer."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, checkpoint)
        if not self._optimizer_is_tied:  # a subclass makes the schedule
            self._tie_optimizer(self.optimizer)
        return prepared

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        # State by name is read once model and optimizer are where they will stay.
        if not is_portable(resume_from_checkpoint) and not is_stock(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        folder = self.state.best_model_checkpoint
        if is_portable(folder):
            trained = Trained(self._plain_model(), self.optimizer)
            self._checkpointer.load_weights(Path(str(folder)), trained)
        else:
            super()._load_best_model()


def _copy_of(args: TrainingArguments | None) -> Seq2SeqTrainingArguments:
    """The trainer's own arguments: what is settled later is set in them and not in the user's."""
    if args is None:
        return Seq2SeqTrainingArguments(output_dir="tmp_trainer")
    if not isinstance(args, Seq2SeqTrainingArguments):
        return Seq2SeqTrainingArguments.from_transformers(args)
    own = copy.copy(args)
    kinds = (dict, list)
    vars(own).update({k: copy.copy(v) for k, v in vars(args).items() if isinstance(v, kinds)})
    return own


def _settle_batching(args: Seq2SeqTrainingArguments, rows: Any, *, static_shapes: bool) -> None:
    """Choose the batching mode that the data and the device suggest, where none was given."""
    if isinstance(rows, StreamedExamples):
        args.batching_by_default("tokens")
        args.settle_token_sizes()
        compiles = static_shapes or args.torch_compile
        raise_problems(streaming_problems(args, static_shapes=compiles))
        args.ignore_data_skip = True  # the stream itself begins where it left off
    elif (static_shapes or args.torch_compile) and has_length(rows):
        args.batching_by_default("tokens")


def _check_dropouts(args: Seq2SeqTrainingArguments, config: PreTrainedConfig) -> None:
    """Dropout settings act when a model is built; a model that came without them is refused."""
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


def _first_true(*reasons: tuple[bool, str]) -> str | None:
    """The reason of the first condition that holds."""
    return next((reason for holds, reason in reasons if holds), None)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _plain(choice: Any) -> str:
    """A choice as it is written; transformers keeps its own as enum members."""
    return str(getattr(choice, "value", choice))
