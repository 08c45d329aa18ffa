"""Random numbers of a step as a function of (seed, step, rank): a resumed run draws the same ones.

Nothing that happens between two steps (an evaluation, a save, a restart) shows in them, and no
generator's state has to be saved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def step_seed(seed: int, *, step: int, rank: int) -> int:
    """A number below 2**63 for optimizer step ``step`` (from 0) on data rank ``rank``."""
    sequence = np.random.SeedSequence([seed % 2**64, step, rank])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


class SeedCallback(TrainerCallback):
    """Seeds the random generators before each optimizer step."""

    def __init__(self, seed: Callable[[int], None], *, rank: int) -> None:
        self._seed = seed
        self._rank = rank

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._seed(step_seed(args.seed, step=state.global_step, rank=self._rank))
