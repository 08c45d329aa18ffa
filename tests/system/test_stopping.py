"""Training that stops early: losses that are not finite, and Ctrl-C."""

from __future__ import annotations

import functools
import json
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from tests.support.adam import ADAM_EPSILON, assert_same_weights
from tests.support.command import (
    LIMIT_S,
    Here,
    finish,
    refused,
    run_command,
    snapshot,
    start_command,
)

LONG_ROWS = (5, 20, 41)
BAD_STEP = re.compile(
    r"step (\d+): the loss or its gradient is not finite "
    r"\(learning rate ([\d.e+-]+), training rows ([\d, ]+)\)"
)


def words_of(model: Path, data: Path, output_dir: Path, *more: object) -> list[object]:
    """A training that saves and logs every step."""
    words: list[object] = ["train", "--profile", "cpu", "--model_name_or_path", model]
    words += ["--data_dir", data, "--output_dir", output_dir, "--save_steps", 1]
    words += ["--per_device_train_batch_size", 8]
    return [*words, "--logging_steps", 1, "--report_to", "none", "--disable_tqdm", *more]


def history(folder: Path) -> list[dict[str, float]]:
    """The log of a run."""
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    return list(state["log_history"])


def bad_steps(text: str) -> dict[int, set[int]]:
    """Step -> rows, as the warnings say."""
    found = {int(m[1]): set(map(int, m[3].split(", "))) for m in BAD_STEP.finditer(text)}
    assert found, text
    return found


# ---- Losses that are not finite ----


@pytest.fixture
def long_rows(own_data: Path) -> Path:
    """The data with three rows that are longer than all others."""
    path = own_data / "train.source"
    lines = path.read_text(encoding="utf-8").splitlines()
    for row in LONG_ROWS:
        lines[row] = " and ".join([lines[row]] * 4)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return own_data


@pytest.fixture
def poisoned(bart: Path, data: Path, tmp_path: Path) -> Path:
    """A BART that is sound but for the source position after the longest of the short rows."""
    folder = tmp_path / "poisoned"
    AutoTokenizer.from_pretrained(bart).save_pretrained(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(bart)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(bart)
    rows = (data / "train.source").read_text(encoding="utf-8").splitlines()
    longest = max(len(ids) for ids in tokenizer(rows)["input_ids"])
    weights = load_file(folder / "model.safetensors")
    name = "model.encoder.embed_positions.weight"
    weights[name][longest + 2] = float("inf")  # BART's positions begin at 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_bad_rows_are_named_and_stop_the_run_at_the_limit(
    caplog, here, poisoned, long_rows, tmp_path
):
    folder = tmp_path / "run"
    words = words_of(poisoned, long_rows, folder, "--num_train_epochs", 4)
    outcome = here(*words, "--learning_rate", 1e-4, "--lr_scheduler", "constant")
    steps = bad_steps(caplog.text)
    assert len(steps) == 3, "the default of --max_nonfinite_steps"
    assert all(rows & set(LONG_ROWS) and len(rows) == 8 for rows in steps.values())
    last = max(steps)
    finite = max(set(range(1, last)) - set(steps))
    good = folder / f"checkpoint-{finite - 1}"
    refused(
        outcome,
        f"step {last}: the loss or its gradient is not finite (learning rate 0.0001, training rows",
        f"stopped after 3 such steps ({', '.join(map(str, steps))};",
        "--max_nonfinite_steps 3",
        f"the last good checkpoint is {good} (the last finite loss was that of step {finite})",
        f"--resume_from_checkpoint {good}",
    )
    AutoModelForSeq2SeqLM.from_pretrained(good)
    log = history(folder)
    assert log[-1]["nonfinite_steps"] == 3
    counts = {e["step"]: e.get("nonfinite_steps", 0) for e in log if "loss" in e}
    assert counts == {s: sum(bad <= s for bad in steps) for s in range(1, last)}
    assert not (folder / "train_results.json").exists()
    assert not (folder / "model.safetensors").exists()


def test_few_bad_steps_are_skipped_and_counted_in_the_results(
    caplog, here, poisoned, long_rows, tmp_path
):
    folder = tmp_path / "run"
    words = words_of(poisoned, long_rows, folder, "--num_train_epochs", 1)
    outcome = here(*words, "--max_nonfinite_steps", 4)
    assert outcome.code == 0, outcome.err
    steps = bad_steps(caplog.text)
    rows = set().union(*steps.values())
    assert set(LONG_ROWS) <= rows, "one epoch meets every long row"
    for file in ("train_results.json", "all_results.json"):
        results = json.loads((folder / file).read_text(encoding="utf-8"))
        assert results["train_nonfinite_steps"] == len(steps)
    assert [e["nonfinite_steps"] for e in history(folder) if "nonfinite_steps" in e][-1] == len(
        steps
    )
    before, after = (load_file(f / "model.safetensors") for f in (poisoned, folder))
    assert not any(torch.isnan(after[name]).any() for name in after)
    assert any(not torch.equal(before[name], after[name]) for name in after), "other steps count"


def test_a_learning_rate_that_breaks_the_weights(model, data, tmp_path):
    """checkpoint-1 to -3 all hold the broken weights: none of them may be called good."""
    folder = tmp_path / "run"
    words = words_of(model, data, folder, "--learning_rate", 1e30, "--max_grad_norm", 0)
    outcome = run_command(*words, "--max_steps", 12)
    assert list(bad_steps(outcome.err)) == [2, 3, 4]
    assert (folder / "checkpoint-3").is_dir()
    refused(
        outcome,
        "step 4: the loss or its gradient is not finite (learning rate 7.5e+29, training rows ",
        "stopped after 3 such steps (2, 3, 4; limit: --max_nonfinite_steps 3)",
        "no good checkpoint had been saved",
        "lower --learning_rate",
        "--warmup_steps",
    )


def test_the_limit_can_be_one(here, model, data, tmp_path):
    words = words_of(model, data, tmp_path / "run", "--learning_rate", 1e30, "--max_grad_norm", 0)
    outcome = here(*words, "--max_steps", 12, "--max_nonfinite_steps", 1)
    refused(outcome, "step 2: ", "stopped after 1 such steps (2; limit: --max_nonfinite_steps 1)")


# ---- Ctrl-C ----


def wait_for(path: Path, process) -> None:
    """Until ``path`` is there; fails if the process ends or takes too long first."""
    deadline = time.monotonic() + LIMIT_S
    while not path.exists():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline, f"{path} did not appear in {LIMIT_S} s"
        time.sleep(0.005)


def test_ctrl_c_saves_and_the_run_goes_on_as_if_nothing_had_been(here: Here, model, data, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    rate = 1e-3
    more = ("--max_steps", 40, "--learning_rate", rate, "--adam_epsilon", ADAM_EPSILON)
    uninterrupted = here(*words_of(model, data, whole, *more))
    assert uninterrupted.code == 0, uninterrupted.err

    # A shell starts background jobs, such as a whole test run, with SIGINT ignored; a terminal's
    # job, which is what is tested here, has it not.
    listening = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = start_command(*words_of(model, data, folder, *more), preexec_fn=listening)
    wait_for(folder / "checkpoint-2", process)
    process.send_signal(signal.SIGINT)
    outcome = finish(process)
    assert outcome.code == 85, outcome.err
    assert "Traceback" not in outcome.out + outcome.err
    saved = sorted(int(path.name[11:]) for path in folder.glob("checkpoint-*"))
    assert 2 <= saved[-1] < 40, "interrupted before the end"
    assert f"stopped by SIGINT at step {saved[-1]}, saved in {folder}/checkpoint-{saved[-1]};" in (
        outcome.err
    )
    assert {p.name for p in folder.iterdir()} == {f"checkpoint-{n}" for n in saved}
    kept = snapshot(folder)

    again = here(*words_of(model, data, folder, *more))
    refused(again, f"output_dir={folder}: holds an earlier run", "--resume_from_checkpoint latest")
    assert snapshot(folder) == kept

    resumed = here(*words_of(model, data, folder, *more, "--resume_from_checkpoint", "auto"))
    assert resumed.code == 0, resumed.err
    ours, reference = (
        {e["step"]: e["loss"] for e in history(f) if "loss" in e} for f in (folder, whole)
    )
    assert len(reference) == 40
    assert ours == pytest.approx(reference, rel=1e-6)
    ours, reference = (load_file(f / "model.safetensors") for f in (folder, whole))
    assert ours.keys() == reference.keys()
    for name, weight in reference.items():
        assert_same_weights(ours[name], weight, steps=40, learning_rate=rate)
