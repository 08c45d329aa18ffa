"""Profiles for DeepSpeed: typed as a user types them. Mistakes: tests/system/test_bad_launch.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from s2s_scale.models.create import new_model
from tests.support.command import run_command
from tests.support.copying import write_copy_task

SHORT = """--per_device_train_batch_size 8 --learning_rate 1e-3 --logging_steps 1 --disable_tqdm
    --report_to none --dropout 0 --seed 0 --bf16 false --max_steps 4 --save_strategy no""".split()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    data = write_copy_task(folder / "data", {"train": 96})
    texts = (data / "train.source").read_text(encoding="utf-8").splitlines()
    model = new_model(
        architecture="marian", size="tiny", texts=texts, vocab_size=300, output_dir=folder / "new"
    )
    return ["--model", str(model), "--data_dir", str(data)]


def losses(output: Path) -> list[float]:
    state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def test_the_deepspeed_command_and_ours_have_the_losses_of_one_process(files, tmp_path):
    typed = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2"]
    typed += ["--module", "s2s_scale", "train", "--profile", "cpu-zero2", *files, *SHORT]
    done = subprocess.run(
        [*typed, "--output_dir", str(tmp_path / "typed")],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ours = run_command(
        "train", *files, *SHORT, "--profile", "cpu-zero3", "--output_dir", tmp_path / "ours"
    )
    assert ours.code == 0, ours.err
    one = run_command(
        *("train", *files, *SHORT, "--profile", "cpu", "--output_dir", tmp_path / "one"),
        *("--gradient_accumulation_steps", 2),
    )
    assert one.code == 0, one.err
    assert len(losses(tmp_path / "one")) == 4
    for name in ("typed", "ours"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-5), name
