"""Loading under ZeRO 3, where each rank holds a part of every weight from the start."""

from __future__ import annotations

import json

import pytest

from tests.support.copying import write_copy_task
from tests.support.families import tiny_folder
from tests.support.ranks import run_command

pytest.importorskip("deepspeed", reason="deepspeed is not installed (extra: deepspeed)")

SETTINGS = """
    --max_steps 3 --learning_rate 1e-3 --logging_steps 1 --dropout 0 --bf16 false
    --save_strategy no --disable_tqdm --report_to none
""".split()


def history(folder, *, model, data, profile, ranks):
    """(loss, gradient norm) of each step, trained by the command with 8 rows a step."""
    words = ["train", "--profile", profile, "--model_name_or_path", str(model)]
    words += ["--data_dir", str(data), "--output_dir", str(folder / "run"), *SETTINGS]
    words += ["--per_device_train_batch_size", str(8 // ranks)]
    run_command(words, ranks=ranks, folder=folder)
    state = json.loads((folder / "run" / "trainer_state.json").read_text(encoding="utf-8"))
    return [(row["loss"], row["grad_norm"]) for row in state["log_history"] if "loss" in row]


# Their positions are weights that are computed, not drawn, where they are not in the file.
@pytest.mark.parametrize("family", ["fsmt", "pegasus"])
def test_sinusoidal_positions_survive(tmp_path, family):
    model = tiny_folder(family, tmp_path / "model")
    data = write_copy_task(tmp_path / "data", {"train": 64})
    one = history(tmp_path / "one", model=model, data=data, profile="cpu", ranks=1)
    two = history(tmp_path / "two", model=model, data=data, profile="cpu-zero3", ranks=2)
    assert len(one) == 3
    for ours, reference in zip(two, one, strict=True):
        assert ours == pytest.approx(reference, rel=1e-5)
