"""One measured training run, by our trainer or by transformers', for ``benchmarks.train``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.fresh import CLOCKS, process_memory
from s2s_scale.data.batch_plan import Lengths

ROWS_PER_BATCH = 32
MEGABATCH = 50
"""Batches that transformers sorts by length together (of ``get_length_grouped_indices``)."""
FIRST_WORD = 6
DEFAULT, GROUPED = "default", "length grouping"
TOKENS, PACKED = "s2s-scale tokens", "s2s-scale packed"
BATCHING = {TOKENS: "tokens", PACKED: "packed"}
"""Our sides, each with every other setting as shipped, the number of groups of a step included."""
SIDES = (DEFAULT, GROUPED, *BATCHING)


@dataclass(frozen=True)
class Size:
    """Width, layers of encoder and of decoder, vocabulary."""

    width: int
    layers: int
    vocabulary: int


SIZES = {
    "small": Size(256, 3, 8_192),
    "large": Size(512, 6, 32_128),
    "quick": Size(32, 1, 256),
    "bart-large": Size(1024, 12, 50_265),
    "t5-large": Size(1024, 24, 32_128),
}


@dataclass(frozen=True)
class Case:
    """What one run is made of; ``steps`` are those that are timed, after a first that is not."""

    side: str
    bf16: bool
    size: str
    family: str
    device: str
    seed: int
    share: float
    """Where in each stretch of a sorted megabatch the batch is taken, from 0 to 1."""
    steps: int
    lengths: Lengths
    smoothing: float = 0.1
    clock: str = "wall"
    settings: tuple[tuple[str, Any], ...] = ()
    """More training arguments for our side."""

    @property
    def tokens_per_step(self) -> int:
        """Real tokens that 32 rows have on average."""
        return round(ROWS_PER_BATCH * float(sum(side.mean() for side in self.lengths)))


def model_of(case: Case) -> Any:
    """A model with random weights, dropout 0.1, in training mode: the same ones for a seed."""
    import torch
    from transformers import (
        BartConfig,
        BartForConditionalGeneration,
        T5Config,
        T5ForConditionalGeneration,
    )

    size = SIZES[case.size]
    heads = max(1, size.width // 64)
    torch.manual_seed(case.seed)
    if case.family == "t5":
        config = T5Config(
            d_model=size.width,
            d_kv=size.width // heads,
            d_ff=4 * size.width,
            num_layers=size.layers,
            num_heads=heads,
            vocab_size=size.vocabulary,
            decoder_start_token_id=0,
        )
        return T5ForConditionalGeneration(config).train()
    sides = ("encoder", "decoder")
    fields = {f"{side}_layers": size.layers for side in sides}
    fields |= {f"{side}_ffn_dim": 4 * size.width for side in sides}
    fields |= {f"{side}_attention_heads": heads for side in sides}
    return BartForConditionalGeneration(
        BartConfig(d_model=size.width, vocab_size=size.vocabulary, **fields)
    ).train()


def rows_of(case: Case) -> Any:
    """A data set of random token ids with the lengths of the case."""
    import datasets

    random = np.random.RandomState(case.seed)
    vocabulary = SIZES[case.size].vocabulary
    columns = {}
    for name, side in zip(("input_ids", "labels"), case.lengths, strict=True):
        ids = random.randint(FIRST_WORD, vocabulary, int(side.sum()))
        columns[name] = [part.tolist() for part in np.split(ids, np.cumsum(side)[:-1])]
    return datasets.Dataset.from_dict(columns)


class Recorder:
    """Around a collator: keeps the lengths of the rows that went into each batch, and its size."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate
        self.lengths: list[list[tuple[int, int]]] = []
        self.padded: list[int] = []

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        batch = self.collate(rows)
        self.lengths.append([(len(row["input_ids"]), len(row["labels"])) for row in rows])
        self.padded.append(batch["input_ids"].numel() + batch["labels"].numel())
        return batch


def _timer(device: str, clock: str = "wall") -> Any:
    """A callback with the time after each step, and the micro-batches until then."""
    import torch
    from transformers import TrainerCallback

    class Timer(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.times: list[float] = []
            self.batches = 0
            self.until: list[int] = []

        def on_substep_end(self, *_: Any, **__: Any) -> None:
            self.batches += 1

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.batches += 1
            if device == "cuda":
                torch.cuda.synchronize()
            self.times.append(CLOCKS[clock]())
            self.until.append(self.batches)

    return Timer()


def measure(case: Case) -> dict[str, float]:
    """Train a few steps; the figures of all but the first.

    ``seconds``, ``real`` and ``padded`` tokens, ``flops`` of the real ones, ``peak`` bytes of the
    process (CUDA: of the allocator), ``loss``: the mean over the run.
    """
    os.environ["USE_TORCH_XLA"] = "0"
    from benchmarks.peaks import training_flops
    from s2s_scale.data.collators import Seq2SeqCollator

    model, rows = model_of(case), rows_of(case)
    collate = Seq2SeqCollator(model.config.pad_token_id)
    timer = _timer(case.device, case.clock)
    with TemporaryDirectory() as folder:
        if case.side in BATCHING:
            trainer = our_trainer(case, model, rows, collate, Path(folder))
            recorder = record_batches(trainer)
        else:
            recorder = Recorder(collate)
            trainer = stock_trainer(case, model, rows, recorder, Path(folder))
        trainer.add_callback(timer)
        outcome = trainer.train()
    first, last = timer.until[0], timer.until[-1]
    pairs = np.array([pair for batch in recorder.lengths[first:last] for pair in batch])
    return {
        "seconds": timer.times[-1] - timer.times[0],
        "real": float(pairs.sum()),
        "padded": float(sum(recorder.padded[first:last])),
        "flops": training_flops(model.config, (pairs[:, 0], pairs[:, 1])),
        "peak": float(_peak(case.device)),
        "loss": float(outcome.training_loss),
    }


def record_batches(trainer: Any) -> Recorder:
    """Keeps what our trainer's loader gives, whatever collator it has put in it."""
    recorder, make = Recorder(None), trainer.get_train_dataloader

    def recorded() -> Any:
        loader = make()
        recorder.collate, loader.collate_fn = loader.collate_fn, recorder
        return loader

    trainer.get_train_dataloader = recorded
    return recorder


def _peak(device: str) -> int:
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return process_memory("VmHWM")


def _shared_settings(case: Case, folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "log_level": "error",
        "learning_rate": 1e-4,
        "label_smoothing_factor": case.smoothing,
        "seed": case.seed,
        "max_steps": case.steps + 1,
        "bf16": case.bf16,
    }


def our_trainer(case: Case, model: Any, rows: Any, collate: Any, folder: Path) -> Any:
    """Our trainer with what the shipped profile says, and as many tokens a step as 32 rows have."""
    from s2s_scale import Seq2SeqTrainer, Seq2SeqTrainingArguments
    from s2s_scale.backends import make_backend
    from s2s_scale.settings.profiles import resolve

    profile = resolve("gpu" if case.device == "cuda" else "cpu")
    os.environ.update(profile.environment if case.device == "cpu" else {})
    backend = make_backend(profile.backend, profile.device, profile.mesh)
    backend.prepare_process()
    values = {
        **profile.arguments,
        **_shared_settings(case, folder),
        "batching": BATCHING[case.side],
    }
    values |= {"tokens_per_step": case.tokens_per_step, **dict(case.settings)}
    args = Seq2SeqTrainingArguments(**backend.training_overrides(values, trains=True))
    return Seq2SeqTrainer(
        model=model, args=args, train_dataset=rows, data_collator=collate, backend=backend
    )


def stock_trainer(case: Case, model: Any, rows: Any, collate: Any, folder: Path) -> Any:
    """transformers' trainer with batches of 32: random, or those of its length grouping.

    Of the latter every k-th batch of a sorted megabatch is taken, since a run of a few steps would
    else see its longest rows alone.
    """
    import transformers

    from s2s_scale.models import decoder_inputs_from_labels

    def with_decoder_inputs(batch: list[Any]) -> Any:
        tensors = collate(batch)
        tensors["decoder_input_ids"] = decoder_inputs_from_labels(
            model, tensors["labels"], model.config.pad_token_id
        )
        return tensors

    values = {**_shared_settings(case, folder), "use_cpu": case.device == "cpu"}
    values["per_device_train_batch_size"] = ROWS_PER_BATCH
    if case.side == GROUPED:
        rows = rows.select(grouped_rows(case))
        values["train_sampling_strategy"] = "sequential"
    return transformers.Seq2SeqTrainer(
        model=model,
        args=transformers.Seq2SeqTrainingArguments(**values),
        train_dataset=rows,
        data_collator=with_decoder_inputs,
    )


def grouped_rows(case: Case) -> list[int]:
    """Row ids of the first batch (not timed: one from the middle) and of the timed ones."""
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    generator = torch.Generator().manual_seed(case.seed)
    source = case.lengths[0].tolist()
    order = get_length_grouped_indices(source, ROWS_PER_BATCH, generator=generator)
    batches = min(MEGABATCH, len(order) // ROWS_PER_BATCH)
    places = [batches // 2]
    places += [int((step + case.share) * batches / case.steps) for step in range(case.steps)]
    return [row for place in places for row in order[ROWS_PER_BATCH * place :][:ROWS_PER_BATCH]]


def lengths_of_files(data_dir: Path, tokenizer: str | None, *, longest: int = 1024) -> Lengths:
    """Lengths of the training rows in ``data_dir``: tokens; without a tokenizer words and EOS."""
    sides = []
    for side in ("source", "target"):
        texts = (data_dir / f"train.{side}").read_text(encoding="utf-8").splitlines()
        if tokenizer is None:
            counts = [len(text.split()) + 1 for text in texts]
        else:
            from transformers import AutoTokenizer

            ids = AutoTokenizer.from_pretrained(tokenizer)(texts)["input_ids"]
            counts = [len(row) for row in ids]
        sides.append(np.minimum(counts, longest).astype(np.int32))
    return sides[0], sides[1]
