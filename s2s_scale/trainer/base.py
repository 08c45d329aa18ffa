"""What the trainer is made of: its config, its settings, and the checks at construction."""

from __future__ import annotations

import copy
import inspect
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.trainer_utils import has_length

from s2s_scale.arguments import Seq2SeqTrainingArguments
from s2s_scale.backends import Backend
from s2s_scale.cpu import CpuFunctions
from s2s_scale.data.streaming import StreamedExamples
from s2s_scale.errors import UserError, raise_problems
from s2s_scale.generation.engines import family_problems
from s2s_scale.models import apply_dropout_settings, check_precision, target_vocab_size
from s2s_scale.trainer.callbacks import StepCallback
from s2s_scale.trainer.loaders import EvaluationLoader
from s2s_scale.trainer.meters import EvaluationMeter, TrainingMeter
from s2s_scale.trainer.nonfinite import NonFiniteGuard
from s2s_scale.trainer.streaming import StreamLoader, streaming_problems

if TYPE_CHECKING:
    from s2s_scale.evaluation.text import TextEvaluation
    from s2s_scale.generation.ctranslate2 import CTranslate2Engine
    from s2s_scale.generation.static import StaticGenerator

logger = transformers.utils.logging.get_logger(__name__)

_BASE_SIGNATURE = inspect.signature(transformers.Seq2SeqTrainer.__init__)

TextEvaluationFor = Callable[[Any, str], "TextEvaluation"]
"""(data set, metric prefix) -> what decodes, scores and writes that evaluation's texts."""


class TrainerBase(transformers.Seq2SeqTrainer):
    """Construction; see ``Seq2SeqTrainer`` for the arguments."""

    args: Seq2SeqTrainingArguments
    model: Any
    train_dataset: Any
    eval_dataset: Any
    optimizer: Any
    lr_scheduler: Any
    compute_metrics: Any

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        data_args: Any = None,
        *args: Any,
        backend: Backend | None = None,
        text_evaluation_for: TextEvaluationFor | None = None,
        **kwargs: Any,
    ) -> None:
        given = _base_arguments(args, kwargs)
        if config is None:
            _refuse_without_config(given.get("model"))
        self.backend = backend or Backend(given["args"].device.type)
        self.data_args = data_args
        rows = given.get("train_dataset")
        compiles = self.backend.static_shapes or given["args"].torch_compile
        if isinstance(rows, StreamedExamples):
            given["args"].batching_by_default("tokens")
            given["args"].settle_token_sizes()
            problems = streaming_problems(given["args"], static_shapes=compiles)
            raise_problems(problems)
            given["args"].ignore_data_skip = True  # the stream itself begins where it left off
        elif compiles and has_length(rows):
            given["args"].batching_by_default("tokens")
        self.text_evaluation_for = text_evaluation_for
        super().__init__(**given)
        self.config = config if config is not None else self.model.config
        self._check_evaluation()
        self.vocab_size = target_vocab_size(self.config)
        self._check_pad_token()
        if self.backend.static_shapes and has_length(self.train_dataset) and self._can_pack():
            self.args.batching_by_default("packed")
        self._check_loss()
        check_precision(self.config, fp16=self.args.fp16)
        self._check_dropouts()
        self.backend.cpu_functions = self._cpu_functions()
        # Our loss is divided by the step's tokens already; these two (the first up to
        # transformers 5.17, the second after) keep the trainer from dividing once more.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._meter = TrainingMeter(self.args.device)
        self._epoch_iterator: Iterator[Any] | None = None
        self._placed: Iterator[tuple[int, Any]] = iter(())
        self._pads_ahead: deque[tuple[int, int]] = deque()
        self._stream: StreamLoader | None = None
        self._batch_nll: Tensor | None = None
        self._evaluation_meter: EvaluationMeter | None = None
        self._text: TextEvaluation | None = None
        self._generates_text = False
        self._static_generator: StaticGenerator | None = None
        self._engine: CTranslate2Engine | None = None
        self._evaluated_rows: Iterator[list[int]] = iter(())
        self._evaluation_loaders: dict[int, EvaluationLoader] = {}
        self._guard = NonFiniteGuard(
            limit=self.args.max_nonfinite_steps,
            output_dir=Path(str(self.args.output_dir)),
            device=self.args.device,
            spike_factor=self.args.loss_spike_factor,
            max_spikes=self.args.max_loss_spikes,
            rolls_back=self.args.on_bad_step == "rollback",
        )
        self._step_callback = StepCallback(self._guard, self.backend)
        self.add_callback(self._step_callback)

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        self.backend.place_model(model)
        super()._move_model_to_device(model, device)

    @property
    def _loss_mode(self) -> str:
        if self.args.label_smoothing:
            return "smoothed"
        if getattr(self.data_args, "ignore_pad_token_for_loss", False):
            return "cross_entropy"
        return "model"

    @property
    def _computes_twice(self) -> bool:
        """Whether a forward pass is traced, or done again in the backward pass."""
        return bool(self.args.torch_compile or self.args.gradient_checkpointing)

    @property
    def _computes_its_own_loss(self) -> bool:
        """Whether nobody else has a hand in it: a subclass, or a function that was given."""
        names = ("compute_loss", "_compute_loss", "training_step")
        own = (getattr(type(self), name).__module__.split(".")[0] for name in names)
        return self.compute_loss_func is None and set(own) == {__name__.split(".")[0]}

    def _cpu_functions(self) -> CpuFunctions | None:
        """What stands in for torch's functions in training, where it can."""
        backend = self.backend
        takes_them = backend.device == "cpu" and backend.takes_cpu_functions
        if not takes_them or self.args.cpu_functions != "auto" or self._computes_twice:
            return None
        # Nothing but the trainer asks for gradients, and nothing waits for them.
        alone = backend.plain_backward and backend.collectives.world_size == 1
        return CpuFunctions(in_place=self._computes_its_own_loss and alone)

    def _can_pack(self) -> bool:
        """Whether pairs can share rows here; the class that makes the batches knows."""
        return False

    def _check_loss(self) -> None:
        """Refuse loss settings that cannot take effect; the class that computes it knows them."""

    def _check_evaluation(self) -> None:
        """Refuse settings of evaluation that cannot take effect."""
        args = self.args
        if args.generation_engine == "ctranslate2":
            raise_problems(family_problems(self.config.model_type))
            if self.backend.static_shapes:
                raise UserError(
                    "generation_engine=ctranslate2: runs on CPUs and GPUs only; leave "
                    "--generation_engine out, or evaluate under another profile"
                )
        if self.backend.static_shapes and args.eval_tokens_per_device is not None:
            raise UserError(
                f"eval_tokens_per_device={args.eval_tokens_per_device}: has no effect where the "
                "device wants few shapes of batches; use --per_device_eval_batch_size"
            )

    def _check_pad_token(self) -> None:
        pad, eos = self.config.pad_token_id, self.config.eos_token_id
        if pad is None and self._loss_mode != "model":
            raise ValueError(
                "config.pad_token_id is None, but label smoothing and pad exclusion need it; set "
                "it to the tokenizer's pad token id, or train with label_smoothing=0 and "
                "ignore_pad_token_for_loss=False"
            )
        if pad is None and eos is not None:
            logger.warning(
                f"config.pad_token_id is None: config.eos_token_id = {eos} is used for padding."
            )

    def _check_dropouts(self) -> None:
        """Dropout settings act when a model is built; a model that came without them is refused."""
        names = ("dropout", "attention_dropout", "encoder_layerdrop", "decoder_layerdrop")
        given = {n: getattr(self.args, n) for n in names if getattr(self.args, n) is not None}
        wanted = copy.copy(self.config)
        apply_dropout_settings(wanted, **given)
        if wanted.to_dict() != self.config.to_dict():
            settings = ", ".join(f"{name}={value}" for name, value in given.items())
            raise UserError(
                f"{settings}: differs from the model's config, and a model that is built already "
                "cannot take it; load it with s2s_scale.models.load(…, dropout=…), or set the "
                "config before the model is made"
            )

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


def _refuse_without_config(model: Any) -> None:
    """A model that is no PreTrainedModel does not say its vocabulary and special tokens."""
    if model is not None and not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"config: without one the model must be a PreTrainedModel, but it is a "
            f"{type(model).__name__}; pass config=…"
        )


def _base_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments for transformers' trainer by name, with ``tokenizer`` and ``args`` made ours."""
    kwargs = dict(kwargs)
    if "tokenizer" in kwargs:
        tokenizer = kwargs.pop("tokenizer")
        if kwargs.get("processing_class", tokenizer) is not tokenizer:
            raise ValueError(
                "tokenizer and processing_class name the same thing but two different ones were "
                "given; pass one of them"
            )
        kwargs["processing_class"] = tokenizer
    given = dict(_BASE_SIGNATURE.bind_partial(None, *args, **kwargs).arguments)
    given.pop("self", None)
    settings = given.get("args")
    if settings is None:
        given["args"] = Seq2SeqTrainingArguments(output_dir="tmp_trainer")
    elif not isinstance(settings, Seq2SeqTrainingArguments):
        given["args"] = Seq2SeqTrainingArguments.from_transformers(settings)
    return given
