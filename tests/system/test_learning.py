"""Each family, through the commands: a new model learns a task, is saved and loaded again."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch

from s2s_scale import cli
from tests.support.copying import write_copy_task
from tests.support.families import FAMILY_NAMES
from tests.support.ranks import run_command

STEPS = 200
NEW = "--size tiny --vocab_size 300 --seed 0".split()
#: mBART needs the long warm-up and the short memory of Adam; the other families do without
TRAINING = f"""
    --max_steps {STEPS} --per_device_train_batch_size 32 --learning_rate 1e-3 --warmup_steps 100
    --adam_beta2 0.98 --dropout 0 --seed 0 --logging_steps 50 --report_to none --disable_tqdm
    --do_eval --predict_with_generate --val_max_target_length 16 --per_device_eval_batch_size 100
""".split()


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """As in the process that reloads the model; what a profile exports is undone."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_new_model_learns_to_copy_and_is_the_same_after_reloading(family, tmp_path):
    data = write_copy_task(tmp_path / "data", {"train": 4000, "val": 200})
    held_out = (data / "val.source").read_text().splitlines()
    trained_on = (data / "train.source").read_text().splitlines()
    assert len(held_out) == 200 and set(held_out).isdisjoint(trained_on)
    languages = "--src_lang en_XX --tgt_lang de_DE".split() if family == "mbart" else []

    def run(verb, *words):
        assert cli.main([verb, *map(str, words), *languages, "--data_dir", str(data)]) == 0

    new, trained = tmp_path / "new", tmp_path / "trained"
    started = time.monotonic()
    run("new-model", "--architecture", family, *NEW, "--output_dir", new)
    run("train", "--model_name_or_path", new, "--output_dir", trained, *TRAINING)
    seconds = time.monotonic() - started
    state = json.loads((trained / "trainer_state.json").read_text())
    exact_match = json.loads((trained / "val_results.json").read_text())["val_exact_match"]
    print(f"{family}: exact match {exact_match} % after {STEPS} steps, {seconds:.0f} s")
    assert state["global_step"] == STEPS
    assert exact_match >= 95

    # what the model wrote in the process that trained it, and what it writes in a new one
    before = (trained / "val_generations.txt").read_text().splitlines()
    agree = sum(text == source for text, source in zip(before, held_out, strict=True))
    assert 100 * agree / len(held_out) == pytest.approx(exact_match)
    after = tmp_path / "after.txt"
    words = ("--input", data / "val.source", "--output", after, "--max_length", 16)
    generate = ["generate", "--model", trained, *words, *languages]
    run_command(generate, ranks=1, folder=tmp_path / "logs")
    assert after.read_text().splitlines() == before
