"""``Seq2SeqTrainer``: transformers' trainer with our loss, batches, evaluation and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput, TrainOutput, has_length

from s2s_scale import optim
from s2s_scale.arguments import Seq2SeqTrainingArguments
from s2s_scale.backends import Backend, make_backend
from s2s_scale.checkpoint import atomic_files
from s2s_scale.data.collators import Collate
from s2s_scale.data.samplers import EpochSampler
from s2s_scale.data.streaming import StreamedExamples
from s2s_scale.models import target_vocab_size
from s2s_scale.resilience import watchdog
from s2s_scale.trainer import checkpointing, compat, construction, dataloaders, run_state
from s2s_scale.trainer.evaluation import Evaluation, EvaluationStopped, TextEvaluationFor
from s2s_scale.trainer.metrics import batch_shape

logger = transformers.utils.logging.get_logger(__name__)

Batch = dict[str, Any]


class Seq2SeqTrainer(transformers.Seq2SeqTrainer):
    """Trains encoder-decoder models so that a step's loss depends on its rows and on nothing else.

    The loss has three modes: label-smoothed NLL where ``label_smoothing`` is not 0; cross entropy
    without pads where ``data_args.ignore_pad_token_for_loss`` is true; else the model's own loss.

    Each of transformers' hooks, and ``_compute_loss``, can be overridden in a subclass. Positional
    parameters are those of transformers' ``Seq2SeqTrainer``, whose ``args`` may be given too: they
    are copied, and ``self.args`` is the copy. ``(config, data_args, model, args, …)`` works too.

    Args:
        config: the model's configuration; by default ``model.config``.
        data_args: any object with ``ignore_pad_token_for_loss``, ``val_max_target_length`` and
            ``eval_beams``, or some of them.
        tokenizer: another name of ``processing_class``.
        backend: carries steps onto hardware; by default one process on the device of ``args``.
        text_evaluation_for: called for each evaluation with ``predict_with_generate``; texts then
            go to the object it returns, and no token arrays are kept.

    Raises:
        ValueError: no config can be had, or the loss needs a pad token id that is missing.
        UserError: a setting cannot take effect.
    """

    args: Seq2SeqTrainingArguments
    model: Any
    optimizer: Any
    eval_dataset: Any
    data_collator: Any

    @construction.takes_config_first
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
        compute_metrics: Callable[..., dict[str, Any]] | None = None,
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
        tokenizer = construction.one_tokenizer(tokenizer, processing_class)
        construction.check_model(model, config)
        args = construction.copy_of(args)
        self.backend = backend or make_backend("local", args.device.type)
        self.data_args, self.text_evaluation_for = data_args, text_evaluation_for
        construction.settle_batching(args, self.backend, train_dataset)
        inputs = (data_collator, train_dataset, eval_dataset, tokenizer, model_init)
        functions = (compute_loss_func, compute_metrics, callbacks, optimizers)
        super().__init__(model, args, *inputs, *functions, preprocess_logits_for_metrics)
        # Our loss is divided by the step's tokens already; these two (the first up to
        # transformers 5.17, the second after) keep the trainer from dividing once more.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self.config: PreTrainedConfig = config if config is not None else self.model.config
        self.vocab_size = target_vocab_size(self.config)
        own_loss = None if self._is_ours("_compute_loss") else type(self).__name__
        own_steps = not all(map(self._is_ours, ("compute_loss", "_compute_loss", "training_step")))
        self.parts = construction.make_components(
            args,
            self.backend,
            self.config,
            self._plain_model(),
            padding_id=self._padding_id,
            pad_to=self._pad_tensors_to_max_len,
            rows_per_device=partial(compat.rows_per_micro_batch, self),
            ignores_pads=getattr(data_args, "ignore_pad_token_for_loss", False),
            loss_function=compute_loss_func is not None,
            own_loss=own_loss,
            own_steps=own_steps,
            packable=dataloaders.pads_only(self.data_collator) and has_length(train_dataset),
        )
        self._evaluation: Evaluation | None = None
        self._weights_to_save: dict[str, Tensor] | None = None
        for callback in self.parts.callbacks:
            self.add_callback(callback)

    def _is_ours(self, name: str) -> bool:
        """Whether a method is the one of this class, overridden in no subclass or object."""
        return name not in vars(self) and getattr(type(self), name) is getattr(Seq2SeqTrainer, name)

    def _plain_model(self) -> Any:
        """The model inside all wrappers; autocast around its forward stays."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _padding_id(self) -> int:
        return construction.padding_id(self.processing_class, self.config)

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        self.backend.place_model(model)
        super()._move_model_to_device(model, device)

    def _compute_loss(self, model: Any, inputs: Mapping[str, Any], labels: Tensor) -> Any:
        """Loss and logits [B, T, V] of one batch.

        The loss is the mean over target tokens, their sum with ``loss_reduction="sum"``. Override
        this to train with another loss per token: what ``super()`` gives then always has logits.
        They are None only where linear cross entropy has computed the loss without them.
        """
        return self.parts.loss.compute(model, inputs, labels, self._plain_model())

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """A batch's share of its step's loss; see ``LossComputer.share``.

        ``num_items_in_batch`` is the number of target tokens of the whole step: all micro-batches,
        all ranks. Without it the batch's own number is used.
        """
        computer, labels = self.parts.loss, self.parts.loss.labels_of(inputs)
        if self.compute_loss_func is not None:
            full = computer.with_decoder_inputs(inputs, labels, self._plain_model())
            full["labels"] = labels
            return super().compute_loss(model, full, return_outputs, num_items_in_batch)
        with computer.logits_wanted(return_outputs):
            loss, logits = self._compute_loss(model, inputs, labels)
        found = computer.share(loss, labels, num_items_in_batch, self.backend.averaged_ranks)
        if self._evaluation is not None:
            self._evaluation.add_loss(found.sums)
        elif self.is_in_train:
            self.parts.meter.add(found.nll_share)
        outputs = Seq2SeqLMOutput(loss=found.share, logits=logits)
        return (found.share, outputs) if return_outputs else found.share

    def _mean_loss(self, model: nn.Module, inputs: Batch) -> Any:
        """Mean loss of one batch; no logits are asked for. Every rank must call it."""
        tokens = self._get_num_items_in_batch([inputs], self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs, num_items_in_batch=tokens).detach().mean()

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Any:
        """Target tokens that count in ``batch_samples`` on all ranks; every rank must call it."""
        tokens, collectives = self.parts.loss.total_tokens(batch_samples), self.backend.collectives
        return None if tokens is None else collectives.all_reduce_sum(tokens.to(device))

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        return self.backend.autocast()

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
            self.parts.preemption.leave("with nothing to save", self.state)
        finally:
            self.parts.batches.end()

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The next step's micro-batches, placed, and its target tokens on all ranks."""
        batches, tokens = self.parts.batches.take(epoch_iterator, num_batches, self.parts.meter)
        total: Any = None
        if not self._is_ours("_get_num_items_in_batch"):
            total = self._get_num_items_in_batch(batches, device)
        elif tokens is not None:
            total = self.backend.collectives.sum_counts(tokens, device)
        if total is not None:
            self.parts.meter.start_step(total)
        if self.args.gradient_accumulation_steps > 1:
            # Else the sum of the step's tokens would belong to the graph of the first micro-batch.
            self._end_graph()
        return batches, total

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        return super()._prepare_inputs(dict(self.backend.place_batch(inputs)))

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Any:
        if self.backend.static_shapes:
            self.parts.compilations.start_micro_batch(batch_shape(inputs))
            compat.renew_loss_sum(self)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.parts.bad_steps.add_loss(loss)
        if not self.args.logging_nan_inf_filter:
            loss = torch.where(torch.isfinite(loss), loss, torch.zeros_like(loss))
        self.backend.finish_micro_batch(self.model, last=self.accelerator.sync_gradients)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # With a loss scaler an infinite norm is the scaler's signal to halve the scale.
        if not self.args.fp16:
            self.parts.bad_steps.observe(norm)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        parts, fp16, ends = self.parts, self.args.fp16, "train_loss" in logs
        logs |= parts.compilations.counts() if "loss" in logs else {}
        if self.is_in_train and ("loss" in logs or ends):
            parts.bad_steps.read(self.optimizer)
        if self.is_in_train and "loss" in logs:
            logs |= parts.meter.read(self.backend.collectives.all_reduce_sum)
            logs |= parts.bad_steps.counts(fp16=fp16)
        logs |= parts.bad_steps.totals(fp16=fp16) | parts.meter.totals() if ends else {}
        super().log(logs, start_time)
        self._end_graph()

    def _end_graph(self) -> None:
        """Run what is pending now, so that it does not become a part of the next step's graph."""
        self.backend.flush()
        self.parts.compilations.skip()

    def _run_epoch(self, **given: Any) -> None:  # type: ignore[override]
        names = ("model", "trial", "epoch", "ignore_keys_for_eval", "start_time")
        self._do_pending(*(given[name] for name in names))
        # transformers would train one step more of a run that had ended.
        self.control.should_training_stop |= self.state.global_step >= self.state.max_steps
        if not self.control.should_training_stop:
            super()._run_epoch(**given)

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        """transformers' hook after each step and each epoch: there a run stops, if it was asked."""
        control, given = self.control, (tr_loss, grad_norm, model, trial, *args)
        due = {"evaluate": control.should_evaluate, "save": control.should_save}
        if not self.parts.preemption.due(self.state):
            try:
                super()._maybe_log_save_evaluate(*given, **kwargs)
                return
            except EvaluationStopped:
                pass
        # What was trained since the last log would otherwise be in no log.
        control.should_log, control.should_evaluate, control.should_save = True, False, False
        super()._maybe_log_save_evaluate(*given, **kwargs)
        self.parts.run_state.leave_pending(**due)
        self._save_and_leave(model, trial)

    def _do_pending(self, model: Any, trial: Any, *rest: Any) -> None:
        """The evaluation, and the save after it, that a stopped run had left undone."""
        pending = self.parts.run_state.take_pending()
        if pending["evaluate"]:
            self.control.should_log, self.control.should_evaluate = False, True
            self.control.should_save = pending["save"]
            self.parts.preemption.end_epoch()
            self._maybe_log_save_evaluate(compat.loss_sum(self), None, model, trial, *rest)

    def _save_and_leave(self, model: Any, trial: Any) -> None:
        self._save_checkpoint(model, trial)
        self.parts.checkpointer.settle(wait=True)
        folder = compat.checkpoint_dir(self, trial)
        self.parts.preemption.leave(f"saved in {folder}", self.state)

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: Any) -> Any:
        self._do_pending(self.model_wrapped, trial, self.state.epoch, None, start_time)
        self.parts.checkpointer.settle(wait=True)
        return super()._finalize_training(trial, num_train_samples, start_time)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return optim.decay_parameter_names(model)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """The optimizer of ``args.optim`` over groups with and without decay, by the backend."""
        if self.optimizer is not None:
            return self.optimizer
        target: Any = self.model if model is None else model
        decaying = self.get_decay_parameter_names(target)
        groups = optim.parameter_groups(target, self.args.weight_decay, decaying)
        with optim.refused_as_option("optim", self.args.optim):
            found = self.optimizer_cls_and_kwargs
            kind, options = found or self.get_optimizer_cls_and_kwargs(self.args, target)
        # GaLore, LOMO and their like bring their own groups or are factories: transformers knows.
        if {"params", "model", "optimizer_dict"} & set(options) or not issubclass(kind, Optimizer):
            return super().create_optimizer(model)
        self.optimizer = self.backend.build_optimizer(kind, groups, options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule over ``num_training_steps`` optimizer steps, unless one was passed in."""
        # Model and optimizer have just been wrapped, and a checkpoint may be read after this.
        self.backend.after_prepare(optimizer or self.optimizer)
        name = self.args.schedule_name
        if self.lr_scheduler is None and name is not None:
            self.lr_scheduler = self._get_lr_scheduler(num_training_steps, optimizer=optimizer)
            compat.scheduler_is_ours(self, True)
        elif self.lr_scheduler is not None and not compat.scheduler_is_ours(self):
            unused = f"lr_scheduler={name} and warmup_steps are unused."
            logger.warning(f"A schedule was passed in `optimizers`: {unused}")
        with optim.refused_as_option("lr_scheduler_type", self.args.lr_scheduler_type):
            return super().create_scheduler(num_training_steps, optimizer)

    def _get_lr_scheduler(self, num_training_steps: int, *, optimizer: Any = None) -> Any:
        """The schedule of ``--lr_scheduler``; a hook of the legacy trainer."""
        name, warmup = str(self.args.schedule_name), self.args.get_warmup_steps(num_training_steps)
        steps = {"num_warmup_steps": warmup, "num_training_steps": num_training_steps}
        options = {**steps, **self.args.schedule_options}
        return optim.build_schedule(name, optimizer or self.optimizer, **options)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        """This rank's training rows in the order of the batch plan. Every rank must call it."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if dataset is None or not self.parts.loaders.follows_plan(dataset):
            return super()._get_train_sampler(dataset)
        return self.parts.loaders.sampler(dataset)

    def get_train_dataloader(self) -> Any:
        """Micro-batches of this rank by the batch plan."""
        dataset, collate, loaders = self.train_dataset, self.data_collator, self.parts.loaders
        loaders.forget_training()
        if isinstance(dataset, StreamedExamples):
            return loaders.streamed(dataset, collate)
        if dataset is None or not loaders.follows_plan(dataset):
            return super().get_train_dataloader()
        if self.args.auto_batch and self.args.max_tokens_per_device is None:
            loaders.settle_micro_batches(dataset, self._plain_model(), self._try_batch)
            self.parts.meter.reset()
        sampler = self._get_train_sampler()
        if not isinstance(sampler, EpochSampler):  # that of a subclass, which knows of no plan
            return super().get_train_dataloader()
        rows, padded = self._model_columns(dataset, "training")
        packing = partial(loaders.packing, collate, self.config)
        return loaders.planned(rows, sampler, padded, packing)

    def _try_batch(self, batch: Mapping[str, Tensor]) -> None:
        """Forward and backward pass as in training; weights stay as they are."""
        self.model.train()
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            loss = self.compute_loss(self.model, dict(batch))
        loss.backward()
        self.backend.finish_step(self.model)

    def _model_columns(self, dataset: Any, use: str) -> tuple[Any, Collate]:
        """Data set without the columns that the model does not take, and collator with padding."""
        drop = partial(compat.without_unused_columns, self, use=use)
        dropping = partial(compat.dropping_unused_columns, self, use=use)
        rows, collate = dataloaders.model_columns(dataset, self.data_collator, drop, dropping)
        return rows, self.parts.loaders.padded(collate, self.processing_class)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        columns = partial(self._model_columns, dataset, "evaluation")
        stock = partial(super().get_eval_dataloader, eval_dataset)
        return self.parts.loaders.evaluation(dataset, columns, stock)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        columns = partial(self._model_columns, test_dataset, "evaluation")
        stock = partial(super().get_test_dataloader, test_dataset)
        return self.parts.loaders.evaluation(test_dataset, columns, stock)

    def get_total_train_batch_size(self, args: Any) -> int:
        """Rows of a step on all devices; with a budget of tokens, their mean."""
        return self.parts.loaders.rows_per_step() or int(super().get_total_train_batch_size(args))

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
            prefixes = {f"{metric_key_prefix}_{name}": part for name, part in chosen.items()}
            found = (self.evaluate(d, ignore_keys, p, **gen_kwargs) for p, d in prefixes.items())
            return {name: value for metrics in found for name, value in metrics.items()}
        options = self.parts.generator.options(gen_kwargs, self.data_args)
        with self._stoppable(), self.parts.meter.paused():
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **options)

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        **gen_kwargs: Any,
    ) -> PredictionOutput:
        """Predictions and metrics, rows in the data's order; ``gen_kwargs`` go to ``generate``."""
        options = self.parts.generator.options(gen_kwargs, self.data_args)
        with self._stoppable():
            return super().predict(test_dataset, ignore_keys, metric_key_prefix, **options)

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Context of an evaluation, which ends the run if it is stopped outside of training."""
        try:
            yield
        except EvaluationStopped:
            if self.is_in_train:
                raise
            found = self.parts.checkpointer.newest(Path(str(self.args.output_dir)))
            if found is None and self.optimizer is not None:
                self._save_and_leave(self.model, None)
            what = f"it resumes from {found}" if found else "with nothing to save"
            self.parts.preemption.leave(what, self.state)

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
        compute_metrics, generates = self.compute_metrics, self.args.predict_with_generate
        text_for = self.text_evaluation_for if generates else None
        device, prefix = self.args.device, metric_key_prefix
        evaluation = Evaluation(self.backend, device, dataloader, text_for, prefix=prefix)
        self._evaluation, self.compute_metrics = evaluation, evaluation.ordered(compute_metrics)
        generates = generates and (evaluation.gathers_text or not prediction_loss_only)
        rest = (description, prediction_loss_only, ignore_keys, prefix)
        try:
            with self.parts.generator.weights_of(self.model, generates=generates):
                output = super().evaluation_loop(dataloader, *rest)
            return evaluation.finish(output)
        finally:
            self._evaluation, self.compute_metrics = None, compute_metrics
            self._end_graph()

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Any, Any, Any]:
        """Loss, generated tokens (or logits) and labels of one batch; every rank must call it.

        Generated tokens and labels are [B, L], padded to the generation limit L; in host memory
        where the device compiles every new shape.
        """
        if self.parts.preemption.requested():
            raise EvaluationStopped
        evaluation, generates = self._evaluation, self.args.predict_with_generate
        gathers_text = evaluation is not None and evaluation.gathers_text
        if gathers_text or (generates and not prediction_loss_only):
            placed = self._prepare_inputs(inputs)
            options = gen_kwargs or compat.generation_keywords(self)
            loss = partial(self._mean_loss, model, placed)
            found = self.parts.generator.predict(self.model, placed, options, evaluation, loss)
        elif prediction_loss_only and "labels" in inputs:
            found = self._mean_loss(model, self._prepare_inputs(inputs)), None, None
        else:
            found = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if not self.backend.static_shapes:
            return found
        # The loss is in the evaluation's own sums. transformers would join the batches' losses on
        # the device, in a tensor whose length is another one each time.
        outputs, labels = self.parts.generator.on_host(found[1:])
        self.backend.flush()
        step, shape = self.state.global_step, batch_shape(inputs)
        self.parts.compilations.ran_evaluation(shape, step=step, generates=generates)
        return None, outputs, labels

    def _pad_tensors_to_max_len(self, tensor: Tensor, max_length: int) -> Tensor:
        """``tensor`` [B, T] padded on the right to [B, max_length]; a longer one stays as it is."""
        missing, pad = max_length - tensor.shape[-1], self._padding_id()
        return nn.functional.pad(tensor, (0, missing), value=pad) if missing > 0 else tensor

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write model and tokenizer, whole or not at all. Every rank must call it.

        Raises:
            SaveError: the files cannot be written; names the last good checkpoint.
        """
        # Every rank takes part in gathering, while transformers calls ``_save`` on rank 0 alone.
        self._weights_to_save = self.backend.weights_to_save(self.model)
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        final = Path(str(output_dir or self.args.output_dir))
        with atomic_files(final, self.parts.checkpointer.ranks) as folder:
            super().save_model(str(folder), _internal_call=True)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if state_dict is None:
            state_dict, self._weights_to_save = self._weights_to_save, None
        super()._save(output_dir, state_dict=state_dict)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write ``checkpoint-<step>``; see ``Checkpointer.save``. Every rank must call it."""
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        final, save = compat.checkpoint_dir(self, trial), self.parts.checkpointer.save
        best = run_state.note_best(self.state, final.parent)
        with self.parts.meter.paused(), watchdog.pause("saving"):
            save(final, self._trained(), run_files=self._run_files, best=best)
        if self.args.push_to_hub:
            self.parts.checkpointer.settle(wait=True)
            if self.parts.checkpointer.ranks.main:
                compat.push_checkpoint(self, str(final))

    def _trained(self) -> checkpointing.Trained:
        scaler = getattr(self.accelerator, "scaler", None)
        beside = (self.lr_scheduler, scaler, self.processing_class)
        return checkpointing.Trained(self._plain_model(), self.optimizer, *beside)

    def _run_files(self, loss_scale: Mapping[str, float] | None) -> run_state.RunFiles:
        run_state.export_callbacks(self.state, [*self.callback_handler.callbacks, self.control])
        data = self.parts.loaders.data(self.train_dataset, self.processing_class)
        beside = (self._plain_model(), self.lr_scheduler, loss_scale)
        return self.parts.run_state.files(self.state, data, *beside)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        """Wrap model and optimizer, and resume: at the step, the schedule and the data's place."""
        data = self.parts.loaders.data(self.train_dataset, self.processing_class)
        stock = super()._prepare_for_training

        def prepare() -> Any:
            prepared = stock(max_steps, train_dataloader, None)
            if not self._is_ours("create_scheduler"):
                self.backend.after_prepare(self.optimizer)
            return prepared

        self.parts.run_state.data_identity(data)  # read here, so that no save has to wait for it
        if resume_from_checkpoint is None:
            return prepare()
        # The saved state brought the old run's intervals along.
        self.state.compute_steps(self.args, max_steps)
        folder, plain, steps = Path(resume_from_checkpoint), self._plain_model(), max_steps
        return self.parts.resume(folder, plain, data, steps, prepare, self._trained)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: state is read by name, once model and optimizer are where they will stay."""

    def _load_best_model(self) -> None:
        if not self.parts.checkpointer.load_best(self.state.best_model_checkpoint, self._trained()):
            super()._load_best_model()
