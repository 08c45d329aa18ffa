"""Which rows make each micro-batch, and how wide they are padded, in every batching mode.

A trainer with a T5 of one layer trains on rows of which each begins with an id of its own, and
writes down what ``training_step`` is given: the plan as it arrives, whatever made it. Streams are
made by the command line alone; at a learning rate of 0 a step's loss tells which rows it had.

``python -m tests.golden.plans OUTPUT.json [SEED …]`` writes what is seen on this number of ranks.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.golden.runs import (
    GOLDEN,
    MODELS,
    read_history,
    run_commands,
    run_python,
    words_of,
    write_json,
    write_pairs,
)

PLANS = GOLDEN / "plans.json"
SEEDS = (0, 1, 2)
WORLD_SIZES = (1, 2)
ROWS, EPOCHS, SHOWN = 150, 2, 2
ROWS_PER_MICRO_BATCH, ACCUMULATION = 8, 2
MODES: dict[str, dict[str, Any]] = {
    "fixed": {"batching": "fixed"},
    "fixed, last rows dropped": {"batching": "fixed", "dataloader_drop_last": True},
    "fixed, 3 buckets": {"batching": "fixed", "num_buckets": 3},
    "sortish": {"batching": "sortish"},
    "sortish, 3 buckets": {"batching": "sortish", "num_buckets": 3},
    "tokens": {"batching": "tokens", "tokens_per_step": 400, "groups_per_step": 4},
    "tokens, 3 buckets": {"batching": "tokens", "tokens_per_step": 400, "num_buckets": 3},
    "tokens, at most 120 a device": {
        "batching": "tokens",
        "tokens_per_step": 400,
        "max_tokens_per_device": 120,
    },
    "packed": {"batching": "packed", "tokens_per_step": 400, "tokens_per_row": 60},
    "packed, one shape": {
        "batching": "packed",
        "tokens_per_step": 400,
        "tokens_per_row": 60,
        "num_buckets": 1,
    },
    "packed, at most 120 a device": {
        "batching": "packed",
        "tokens_per_step": 400,
        "tokens_per_row": 60,
        "max_tokens_per_device": 120,
    },
}
STREAMS: dict[str, dict[str, Any]] = {
    "fixed": {"batching": "fixed", "per_device_train_batch_size": 8},
    "sortish": {"batching": "sortish", "per_device_train_batch_size": 8},
    "tokens": {"batching": "tokens", "tokens_per_step": 400, "groups_per_step": 2},
}
STREAM_STEPS = 20
_FIRST_ID = 10
"""Ids from here on stand for rows; smaller ones are words, of which 1 ends a row and 0 pads."""

Step = list[list[dict[str, Any]]]
"""Micro-batch -> rank -> rows by their numbers, and the shapes of the tensors."""


def _dataset() -> list[dict[str, list[int]]]:
    draw = random.Random(0)

    def side(row: int) -> list[int]:
        return [_FIRST_ID + row, *(draw.randint(2, 9) for _ in range(draw.randint(0, 16))), 1]

    return [{"input_ids": side(row), "labels": side(row)} for row in range(ROWS)]


def _numbers(rows: torch.Tensor) -> list[list[int]]:
    """The data's rows in each row of a batch; rows without any (they only fill up) left out."""
    found = [[i - _FIRST_ID for i in row if i >= _FIRST_ID] for row in rows.tolist()]
    return [numbers for numbers in found if numbers]


def _watched(mode: str, seed: int, folder: Path) -> list[Step]:
    """Every optimizer step of a training in ``mode``, on all ranks; every rank must call."""
    from transformers import (
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        T5Config,
        T5ForConditionalGeneration,
    )

    from s2s_scale import Seq2SeqTrainer, Seq2SeqTrainingArguments

    seen: dict[int, list[dict[str, Any]]] = {}

    class Watched(Seq2SeqTrainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
            labels = inputs["labels"]
            batch = {
                "rows": _numbers(labels),
                "shapes": [list(inputs["input_ids"].shape), list(labels.shape)],
            }
            # A row that fills a batch up may have a source, but no target.
            sources = _numbers(inputs["input_ids"])
            assert all(row in sources for row in batch["rows"])
            seen.setdefault(self.state.global_step, []).append(batch)
            return super().training_step(model, inputs, *rest, **more)

    shape = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=_FIRST_ID + ROWS, **shape, num_decoder_layers=1, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    values: dict[str, Any] = {"gradient_accumulation_steps": ACCUMULATION}
    if MODES[mode]["batching"] in ("fixed", "sortish"):
        values["per_device_train_batch_size"] = ROWS_PER_MICRO_BATCH // world_size
    else:
        values = {}
    args = Seq2SeqTrainingArguments(
        output_dir=str(folder / "run"),
        use_cpu=True,
        seed=seed,
        num_train_epochs=EPOCHS,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        log_level="error",
        **values,
        **MODES[mode],
    )
    collate = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(MODELS / "t5"))
    Watched(model=model, args=args, train_dataset=_dataset(), data_collator=collate).train()
    steps = [seen[number] for number in sorted(seen)]
    if world_size == 1:
        return [[[batch] for batch in step] for step in steps]
    gathered: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(gathered, steps)
    return [
        [list(ranks) for ranks in zip(*micro_batches, strict=True)]
        for micro_batches in zip(*gathered, strict=True)
    ]


def _summary(steps: list[Step]) -> dict[str, Any]:
    """Digests of rows and of shapes, and the rows of the first steps to read."""

    def digest(name: str) -> str:
        values = [[[batch[name] for batch in ranks] for ranks in step] for step in steps]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()

    batches = [[[batch["rows"] for batch in ranks] for ranks in step] for step in steps[:SHOWN]]
    readable = [
        [
            " | ".join(" ".join(",".join(map(str, row)) for row in b) for b in ranks)
            for ranks in step
        ]
        for step in batches
    ]
    return {
        "steps": len(steps),
        "micro_batches": sum(map(len, steps)),
        "rows": digest("rows"),
        "shapes": digest("shapes"),
        "first_steps": readable,
    }


def planned(folder: Path, *, seeds: tuple[int, ...] = SEEDS) -> dict[str, Any]:
    """Mode -> seed -> number of ranks -> what ``_summary`` says, as the package plans now."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for world_size in WORLD_SIZES:
        output = folder / f"plans-{world_size}.json"
        words = ["-m", "tests.golden.plans", str(output), *map(str, seeds)]
        if world_size > 1:
            launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
            words = ["-m", *launcher, *words]
        run_python(words, folder)
        for mode, of_seeds in json.loads(output.read_text(encoding="utf-8")).items():
            for seed, summary in of_seeds.items():
                found.setdefault(mode, {}).setdefault(seed, {})[str(world_size)] = summary
    return found


def streamed(folder: Path, *, seeds: tuple[int, ...] = SEEDS) -> dict[str, Any]:
    """Batching mode -> seed -> the losses of each step of a stream, with weights that stay."""
    data = write_pairs(folder / "data", rows=ROWS, seed=3)
    outputs = {(mode, seed): folder / f"{mode}-{seed}" for mode in STREAMS for seed in seeds}
    commands = [
        words_of(
            "train",
            {
                "profile": "cpu",
                "bf16": "false",
                "model_name_or_path": MODELS / "t5",
                "data_dir": data,
                "output_dir": output,
                "streaming": "true",
                "shuffle_buffer": 60,
                "max_steps": STREAM_STEPS,
                "learning_rate": 0.0,
                "seed": seed,
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": "true",
                **STREAMS[mode],
            },
        )
        for (mode, seed), output in outputs.items()
    ]
    run_commands(commands, folder)
    found: dict[str, Any] = {}
    for (mode, seed), output in outputs.items():
        losses = [entry["loss"] for entry in read_history(output)]
        assert len(losses) == STREAM_STEPS
        found.setdefault(mode, {})[str(seed)] = losses
    return found


@functools.cache
def read() -> dict[str, Any]:
    """What ``plans.json`` holds."""
    return dict(json.loads(PLANS.read_text(encoding="utf-8")))


def record(folder: Path) -> None:
    """Write ``plans.json``."""
    value = {"plans": planned(folder / "plans"), "streams": streamed(folder / "streams")}
    write_json(PLANS, value)


def main() -> int:
    """Watch every mode and write what was seen; on each rank, of which the first one writes."""
    output, *seeds = sys.argv[1:]
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for mode in MODES:
            for seed in map(int, seeds):
                steps = _watched(mode, seed, Path(folder))
                found.setdefault(mode, {})[str(seed)] = _summary(steps)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        Path(output).write_text(json.dumps(found), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
