"""``--profile cpu-ddp``: the command starts its own ranks, and says which one failed and why."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from s2s_scale.errors import EXIT_RESUME
from s2s_scale.models.create import new_model
from tests.support.command import finish, run_command, start_command
from tests.support.copying import write_copy_task
from tests.support.faults import HANG, MESSAGE, RAISE, faulty_path
from tests.support.processes import rank_below

COMMON = """--per_device_train_batch_size 8 --learning_rate 1e-3 --logging_steps 1 --disable_tqdm
    --report_to none --dropout 0 --seed 0""".split()
SHORT = [*COMMON, "--bf16", "false", "--max_steps", "6", "--save_strategy", "no"]
ENDLESS = [*COMMON, *"--max_steps 100000 --save_steps 5 --save_total_limit 1".split()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return write_copy_task(folder / "data", {"train": 96, "val": 8, "test": 8})


@pytest.fixture(scope="module")
def model(tmp_path_factory, data):
    texts = (data / "train.source").read_text(encoding="utf-8").splitlines()
    folder = tmp_path_factory.mktemp("model") / "new"
    return new_model(
        architecture="bart", size="tiny", texts=texts, vocab_size=300, output_dir=folder
    )


def words(model, data, output, *more):
    return ["train", "--model", model, "--data_dir", data, "--output_dir", output, *more]


def losses(output: Path) -> list[float]:
    state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def test_two_ranks_have_the_losses_of_one_process(model, data, tmp_path):
    ddp = run_command(*words(model, data, tmp_path / "ddp", *SHORT, "--profile", "cpu-ddp"))
    assert ddp.code == 0, ddp.err
    one = run_command(
        *words(model, data, tmp_path / "one", *SHORT, "--profile", "cpu"),
        *("--gradient_accumulation_steps", 2),
    )
    assert one.code == 0, one.err
    assert len(losses(tmp_path / "ddp")) == 6
    assert losses(tmp_path / "ddp") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_a_mistake_in_the_data_is_one_line_that_names_the_rank(model, data, tmp_path):
    spoilt = write_copy_task(tmp_path / "data", {"train": 20})
    lines = (spoilt / "train.source").read_text(encoding="utf-8").splitlines()
    lines[4] = ""
    (spoilt / "train.source").write_text("\n".join(lines) + "\n", encoding="utf-8")
    outcome = run_command(*words(model, spoilt, tmp_path / "run", *SHORT, "--profile", "cpu-ddp"))
    assert outcome.code == 2
    assert "Traceback" not in outcome.out + outcome.err
    assert len(outcome.errors) == 1, outcome.err
    assert outcome.errors[0].startswith("rank ")
    assert f"on {socket.gethostname()}: " in outcome.errors[0]
    assert "train.source:5" in outcome.errors[0]


# Fault -> (signal for rank 1, exit code of the run, what its line says).
FAULTS = {
    "killed": (signal.SIGKILL, 128 + signal.SIGKILL, "SIGKILL"),
    "raising": (RAISE, 1, MESSAGE),
    "hanging": (HANG, 75, "no progress for 11.9 s"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_the_run_and_names_the_rank(model, data, tmp_path, monkeypatch, fault):
    number, code, words_of_fault = FAULTS[fault]
    monkeypatch.setenv("PYTHONPATH", faulty_path(tmp_path / "faults"))
    process = start_command(
        *words(model, data, tmp_path / "run", *ENDLESS, "--profile", "cpu-ddp"),
        *("--fault_timeout_seconds", 14),
    )
    victim = rank_below(process.pid, "1", tmp_path / "run")
    began = time.monotonic()
    os.kill(victim, number)
    outcome = finish(process, limit_s=90)
    seconds = time.monotonic() - began
    line = next((error for error in outcome.errors if error.startswith("rank 1 on ")), "")
    assert line, outcome.out + outcome.err
    print(f"{fault}: exit code {outcome.code} after {seconds:.0f} s: {line}")
    assert outcome.code == code
    assert seconds < 60
    assert words_of_fault in line
    if fault == "hanging":
        assert "it is at " in line and "(step " in line and ", in hang, " in line


def test_a_request_to_stop_is_met_by_both_ranks(model, data, tmp_path):
    process = start_command(*words(model, data, tmp_path / "run", *ENDLESS, "--profile", "cpu-ddp"))
    rank_below(process.pid, "1", tmp_path / "run")
    os.killpg(process.pid, signal.SIGTERM)  # as a batch system does
    outcome = finish(process, limit_s=90)
    assert outcome.code == EXIT_RESUME, outcome.err
    assert "stopped by SIGTERM at step " in outcome.err and "Traceback" not in outcome.err
    assert outcome.errors == []


def test_generate_refuses_several_ranks(model):
    outcome = run_command("generate", "--model", model, "--profile", "cpu-ddp", "--num_beams", 1)
    assert outcome.code == 2 and "'generate' runs in one process" in outcome.errors[0]
