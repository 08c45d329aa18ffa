"""Texts of 300 rows with one beam and with four, from models that have learnt a little."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.golden.runs import GOLDEN, run_commands, words_of, write_pairs

TEXTS = GOLDEN / "texts"
FAMILIES = ("marian", "t5")
BEAMS = (1, 4)
ROWS, TIES = 300, 3
"""On another processor a few rows may differ, where two texts score alike but for rounding."""
#: What a model's folder holds beside what is needed to load it.
_OF_TRAINING = ("report.*", "*_results.json", "trainer_state.json", "training_args.bin")


def record(family: str, start: Path, folder: Path, *, data: Path) -> None:
    """Train the model ``start`` on ``data``, keep it, and keep its texts."""
    options: dict[str, Any] = {
        "profile": "cpu",
        "model_name_or_path": start,
        "data_dir": data,
        "output_dir": folder / "run",
        "bf16": "false",
        "batching": "fixed",
        "per_device_train_batch_size": 32,
        "max_steps": 600,
        "learning_rate": 5e-3,
        "lr_scheduler": "linear",
        "warmup_steps": 50,
        "seed": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": "true",
    }
    run_commands([words_of("train", options)], folder)
    kept = TEXTS / family
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(
        folder / "run", kept / "model", ignore=shutil.ignore_patterns(*_OF_TRAINING, ".*")
    )
    pairs = write_pairs(folder / "test", rows=ROWS, seed=2)
    shutil.copyfile(pairs / "train.source", TEXTS / "source.txt")
    for beams, lines in generated(family, folder).items():
        content = "".join(f"{line}\n" for line in lines)
        (kept / f"beams-{beams}.txt").write_text(content, encoding="utf-8")


def generated(family: str, folder: Path, *, beams: Sequence[int] = BEAMS) -> dict[int, list[str]]:
    """The texts that ``s2s-scale generate`` gives now, by the number of beams."""
    outputs = {n: folder / f"{family}-beams-{n}.txt" for n in beams}
    commands = [
        words_of(
            "generate",
            {
                "profile": "cpu",
                "model_name_or_path": TEXTS / family / "model",
                "input": TEXTS / "source.txt",
                "output": path,
                "num_beams": n,
                "max_new_tokens": 48,
            },
        )
        for n, path in outputs.items()
    ]
    run_commands(commands, folder)
    return {n: read_lines(path) for n, path in outputs.items()}


def golden(family: str, beams: int) -> list[str]:
    """The texts that were kept."""
    return read_lines(TEXTS / family / f"beams-{beams}.txt")


def different(found: Sequence[str], expected: Sequence[str]) -> int:
    """How many rows differ."""
    return sum(a != b for a, b in zip(found, expected, strict=True))


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, without their ends."""
    return path.read_text(encoding="utf-8").split("\n")[:-1]
