"""A tiny training task, the words that start it at any number of ranks, and what it left behind."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForSeq2SeqLM

from s2s_scale.models.create import new_model
from tests.support.adam import ADAM_EPSILON
from tests.support.copying import write_copy_task

ROWS, ROWS_PER_STEP, STEPS = 44, 8, 12
"""An epoch has six steps, the last of them short."""
EVALUATED = (4, 8, 12)
BOUND = 1e-5
EVALUATES = """--eval_strategy steps --eval_steps 4 --per_device_eval_batch_size 2
    --save_steps 5""".split()

_LOADING = threading.Lock()
"""transformers switches torch's default device while it loads: one thread at a time."""


@dataclass(frozen=True)
class Task:
    """Data and a model, small enough to be trained in a second."""

    data: Path
    model: Path

    def words(self, output: Path, *more: object, profile: str = "cpu", ranks: int = 1) -> list[str]:
        """``train`` with the same steps at any number of ranks; ``more`` are further flags."""
        words = f"""train --profile {profile} --model {self.model} --data_dir {self.data}
            --output_dir {output} --per_device_train_batch_size {ROWS_PER_STEP // ranks}
            --max_steps {STEPS} --learning_rate 1e-3 --lr_scheduler cosine --warmup_steps 3
            --adam_epsilon {ADAM_EPSILON} --optim adamw_torch --dropout 0 --seed 3 --bf16 false
            --max_target_length 12 --save_strategy steps --logging_steps 1
            --report_to none --disable_tqdm --resume_from_checkpoint auto""".split()
        return [*words, *map(str, more)]


def make_task(folder: Path) -> Task:
    """Write data and model."""
    data = write_copy_task(folder / "data", {"train": ROWS, "val": 24})
    texts = (data / "train.source").read_text(encoding="utf-8").splitlines()
    model = new_model(
        architecture="t5", size="tiny", texts=texts, vocab_size=120, output_dir=folder / "model"
    )
    return Task(data, model)


def history(output: Path, name: str) -> dict[int, float]:
    """Step -> what the log says of ``name`` there. No step is logged twice."""
    state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
    found = [(entry["step"], entry[name]) for entry in state["log_history"] if name in entry]
    assert len(dict(found)) == len(found), found
    return dict(found)


def deviation(output: Path, whole: Path) -> float:
    """How far the final weights are off another run's, relative to each tensor's largest value."""
    # Loaded as a user does: under which names tied weights are stored differs between backends.
    with _LOADING:
        ours, theirs = (
            dict(AutoModelForSeq2SeqLM.from_pretrained(folder).named_parameters())
            for folder in (output, whole)
        )
    assert ours.keys() == theirs.keys() and len(ours) > 10
    return max(_off(ours[name], theirs[name]) for name in theirs)


def _off(value: torch.Tensor, reference: torch.Tensor) -> float:
    value, reference = value.detach(), reference.detach()
    return float((value - reference).abs().max() / reference.abs().max().clamp(min=1e-12))
