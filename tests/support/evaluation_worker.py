"""One rank of an evaluation: python -m tests.support.evaluation_worker BEAMS,BEAMS WORDS…

WORDS are those of ``s2s-scale train``. The run takes its steps, so that the model is wrapped as its
profile wraps it, and then writes texts and metrics of the test split for each number of beams into
the output folder: ``beams-N.json``. ``held`` is how many numbers of the parameters rank 0 kept
after loading the model, before it was trained.
"""

from __future__ import annotations

import json
import os
import sys

from s2s_scale.data.sources import load_pairs
from s2s_scale.runner.build import (
    build_trainer,
    load_model,
    open_backend,
    read_settings,
    tokenize,
)
from s2s_scale.settings import Settings
from s2s_scale.settings.build import build_settings
from s2s_scale.settings.commands import all_commands
from tests.support.shares_worker import held_parameters


def main(beams: list[int], settings: Settings) -> None:
    """Train as the settings say, and evaluate with each number of beams."""
    assert settings.profile is not None
    os.environ.update(settings.profile.environment)
    with open_backend(settings) as backend:
        run = read_settings(settings, backend, trains=True)
        pairs = {split: load_pairs(run.data_args, split) for split in ("train", "test")}
        loaded = load_model(run)
        held = held_parameters(loaded.model)
        examples = {
            split: tokenize(run, loaded, backend, rows, split) for split, rows in pairs.items()
        }
        trainer = build_trainer(run, loaded, backend, examples)
        trainer.train()
        for number in beams:
            metrics = trainer.evaluate(examples["test"], metric_key_prefix="test", num_beams=number)
            if backend.collectives.rank == 0:
                texts = (run.output_dir / "test_generations.txt").read_text(encoding="utf-8")
                result = {"metrics": metrics, "texts": texts.split("\n")[:-1], "held": held}
                path = run.output_dir / f"beams-{number}.json"
                path.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(
        [int(number) for number in sys.argv[1].split(",")],
        build_settings(all_commands()["train"], sys.argv[2:]),
    )
