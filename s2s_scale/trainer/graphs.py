"""Where recorded graphs end, so that the same ones come again; nothing where none are recorded."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from s2s_scale.errors import UserError
from s2s_scale.trainer.compilations import CompilationWatch, batch_shape
from s2s_scale.trainer.evaluating import EvaluationTrainer

GENERATION_GRAPHS = 3
"""Encoder with the first token, every further token, collecting the result."""


class GraphTrainer(EvaluationTrainer):
    """Ends graphs where a step, a log or an evaluation's batch ends, and counts compilations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = self.args
        if not self.backend.static_shapes and (
            settings.max_compilations is not None or settings.strict_compilations
        ):
            raise UserError(
                "max_compilations, strict_compilations: have no effect here, nothing is compiled "
                "for each shape; leave them out, or take a profile with backend xla"
            )
        self._watch = CompilationWatch(
            self.backend, limit=settings.max_compilations, strict=settings.strict_compilations
        )
        self._step_callback.watch = self._watch

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        if self.backend.static_shapes:
            self._step_callback.shape = batch_shape(inputs)
            # transformers adds to it in place; a copy gives the same graph at every step.
            self._tr_loss = self._tr_loss.clone()
        return super().training_step(model, inputs, *args)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, step_tokens = super().get_batch_samples(*args, **kwargs)
        if self.args.gradient_accumulation_steps > 1:
            # Else the sum of the step's tokens would belong to the graph of the first micro-batch.
            self._end_graph()
        return batches, step_tokens

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        compilations, seconds = self.backend.compilations()
        if compilations and "loss" in logs:
            logs |= {"compilations": compilations, "compile_seconds": seconds}
        super().log(logs, start_time)
        self._end_graph()

    def _end_graph(self) -> None:
        """Run what is pending now, so that it does not become a part of the next step's graph."""
        self.backend.flush()
        self._watch.skip()

    def evaluation_loop(self, dataloader: DataLoader[Any], *args: Any, **kw: Any) -> EvalLoopOutput:
        self._end_graph()
        try:
            return super().evaluation_loop(dataloader, *args, **kw)
        finally:
            self._end_graph()

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Any, Any, Any]:
        outcome = super().prediction_step(model, inputs, *args, **kwargs)
        if not self.backend.static_shapes:
            return outcome
        self.backend.flush()
        generates = GENERATION_GRAPHS if self.args.predict_with_generate else 0
        self._watch.ran(
            "evaluation",
            batch_shape(inputs),
            step=self.state.global_step,
            graphs=1 + generates,
        )
        # The loss is in the evaluation's own sums. transformers would join the batches' losses on
        # the device, in a tensor whose length is another one each time.
        _, logits, labels = outcome
        return None, logits, labels
