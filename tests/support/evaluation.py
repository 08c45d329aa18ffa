"""One rank of an evaluation, after a run has taken its steps.

The model is then wrapped as its profile wraps it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from s2s_scale.backends import Backend
from s2s_scale.data.sources import load_pairs
from s2s_scale.runner.build import (
    build_trainer,
    load_model,
    read_settings,
    tokenize,
)
from s2s_scale.settings.build import build_settings
from s2s_scale.settings.commands import all_commands
from tests.support.shares import held_parameters


def work(backend: Backend, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train as ``s2s-scale WORDS`` does, and evaluate the test split with each number of beams.

    Returns:
        ``held``: how many numbers of the parameters this rank kept after loading the model, before
        it was trained; ``beams``: on rank 0, number -> texts and metrics.
    """
    settings = build_settings(all_commands()["train"], job["words"])
    run = read_settings(settings, backend, trains=True)
    pairs = {split: load_pairs(run.data_args, split) for split in ("train", "test")}
    loaded = load_model(run)
    held = held_parameters(loaded.model)
    examples = {split: tokenize(run, loaded, backend, rows, split) for split, rows in pairs.items()}
    trainer = build_trainer(run, loaded, backend, examples)
    trainer.train()
    found = {}
    for number in job["beams"]:
        metrics = trainer.evaluate(examples["test"], metric_key_prefix="test", num_beams=number)
        if backend.collectives.rank == 0:
            texts = (run.output_dir / "test_generations.txt").read_text(encoding="utf-8")
            found[number] = {"metrics": metrics, "texts": texts.split("\n")[:-1]}
    return {"held": held, "beams": found}
