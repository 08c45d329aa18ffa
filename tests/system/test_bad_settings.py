"""Bad settings: each mistake names flag or file and line, value, what was expected, the remedy."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.command import (
    Here,
    Outcome,
    finish,
    refused,
    run_command,
    snapshot,
    start_command,
)

SCHEDULERS = "linear, cosine, cosine_w_restarts, polynomial, constant, constant_w_warmup"


@pytest.fixture
def training(here: Here, model: Path, data: Path, earlier_run: Path):
    """Call ``train --overwrite_output_dir`` over the earlier run; fails if anything changed."""

    def train(
        *words: object, run: Callable[..., Outcome] = here, first: Path | None = None
    ) -> Outcome:
        before = snapshot(earlier_run)
        assert {"checkpoint-2", "model.safetensors", "notes.txt"} <= set(before)
        sound = {
            "--profile": "cpu",
            "--output_dir": earlier_run,
            "--model_name_or_path": model,
            "--data_dir": data,
            "--max_steps": 1,
            "--report_to": "none",
        }
        file, in_file = [], ""
        if first is not None:
            file, in_file = [first], first.read_text(encoding="utf-8") if first.exists() else ""
        given = [
            word
            for flag, value in sound.items()
            if flag not in words and f"\n{flag[2:]}:" not in in_file
            for word in (flag, value)
        ]
        outcome = run("train", *file, *given, "--overwrite_output_dir", "--disable_tqdm", *words)
        assert snapshot(earlier_run) == before
        return outcome

    return train


@pytest.fixture
def settings_file(tmp_path: Path) -> Callable[[str], Path]:
    def write(line: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(f"# settings\nseed: 1\n{line}\n", encoding="utf-8")
        return path

    return write


# ---- Names and types ----


def test_as_a_user_types_it(training):
    outcome = training("--lerning_rate", "3e-4", run=run_command)
    refused(outcome, "unknown option '--lerning_rate'", "did you mean '--learning_rate'?")
    assert outcome.out == "" and outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--max_source_lenght", 9), ("'--max_source_lenght'", "'--max_source_length'?")),
        (("--vocab_size", 9), ("'--vocab_size' is not an option of train, but of new-model",)),
        (("--learning_rate", "fast"), ("--learning_rate: expected a number, got 'fast'",)),
        (("--num_train_epochs", "x"), ("--num_train_epochs: expected a number, got 'x'",)),
        (("--max_steps", "1.5"), ("--max_steps: expected a whole number, got '1.5'",)),
        (("--freeze_encoder=2",), ("--freeze_encoder: expected true or false, got '2'",)),
        (("--max_target_length", "-3"), ("max_target_length=-3", "at least 1")),
        (("--n_train", 0), ("n_train=0", "expected -1 (all rows) or at least 1", "--n_train")),
        (("--lr_scheduler_type", "lineer"), ("expected one of: linear", "mean 'linear'?")),
        (("--batching", "sorted"), ("--batching: expected one of: fixed, sortish", "'sorted'")),
        (("--resume_from_checkpoint",), ("--resume_from_checkpoint: expected text, got nothing",)),
    ],
)
def test_flags(training, words, parts):
    refused(training(*words), *parts)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("learning_rate: fast", ("learning_rate: expected a number, got 'fast'",)),
        ("lr_scheduler: cosin", (f"one of: {SCHEDULERS}", "got 'cosin' (did you mean 'cosine'?)")),
        ("- 1", ("not valid YAML",)),
    ],
)
def test_settings_file(training, settings_file, line, parts):
    file = settings_file(line)
    refused(training(first=file), f"{file}:3: ", *parts)


def test_all_mistakes_at_once(training, settings_file):
    outcome = training("--learning_rte", "1", "--metrics", "x", first=settings_file("sead: 1"))
    refused(outcome, "'--learning_rte'")
    assert len(outcome.errors) == 3


def test_settings_that_training_itself_would_trip_over_leave_the_earlier_run(training):
    """transformers looks at these late, when optimizer, schedule and loaders are made."""
    for words, parts in (
        (("--optim", "adamw_bnb_8bit"), ("optim=adamw_bnb_8bit", "bitsandbytes", "--optim")),
        (("--lr_scheduler_type", "cosine_with_min_lr"), ("min_lr", "--lr_scheduler_kwargs")),
        (("--report_to", "wandb"), ("report_to=wandb", "change --report_to")),
        (("--report_to", "wandbb"), ("report_to=wandbb", "wandb", "change --report_to")),
        (("--learning_rate=-1",), ("learning_rate=-1.0", "at least 0", "larger")),
        (("--per_device_train_batch_size", 0), ("per_device_train_batch_size=0", "at least 1")),
        (("--gradient_accumulation_steps", 0), ("gradient_accumulation_steps=0", "at least 1")),
        (("--dataloader_num_workers=-1",), ("dataloader_num_workers=-1", "at least 0")),
        (("--max_nonfinite_steps", 0), ("max_nonfinite_steps=0", "at least 1")),
        (("--load_best_model_at_end",), ("load_best_model_at_end", "Evaluation strategy")),
        (("--dropout", 3), ("dropout=3.0", "probability from 0 to 1")),
        (("--src_lang", "en_XX", "--task", "x"), ("task 'x'", "leave --task out")),
    ):
        refused(training(*words), *parts)


def test_unknown_metric_for_the_best_model(training):
    words = ("--eval_strategy", "steps", "--predict_with_generate", "--load_best_model_at_end")
    outcome = training(*words, "--metric_for_best_model", "blue")
    refused(outcome, "unknown metric_for_best_model 'blue'", "mean 'bleu'?", "expected one of")


def test_unknown_architecture(here, data, tmp_path):
    folder = tmp_path / "model"
    common = ("--size", "tiny", "--vocab_size", 100, "--data_dir", data, "--output_dir", folder)
    outcome = here("new-model", "--architecture", "barrt", *common)
    refused(outcome, "--architecture: expected one of: bart, t5", "'barrt'", "mean 'bart'?")
    assert not folder.exists()


def test_new_model_into_a_folder_with_files(here, data, earlier_run):
    before = snapshot(earlier_run)
    common = ("--size", "tiny", "--vocab_size", 100, "--data_dir", data)
    outcome = here("new-model", "--architecture", "bart", *common, "--output_dir", earlier_run)
    refused(outcome, str(earlier_run), "not empty", "another --output_dir", "--overwrite")
    assert snapshot(earlier_run) == before


def test_unknown_split_and_profile_name(here):
    refused(here("profiles", "cpuu"), "unknown profile 'cpuu'", "did you mean 'cpu'?")
    words = ("evaluate", "--model_name_or_path", "x", "--data_dir", "x", "--split", "vall")
    refused(here(*words), "--split: expected one of: val, test", "'vall'", "did you mean 'val'?")


# ---- Output folders ----


def run_into(here: Here, folder: Path, data: Path, model: Path, *words: object) -> Outcome:
    """``train`` into ``folder`` without asking for anything to be overwritten."""
    common = ("--profile", "cpu", "--model_name_or_path", model, "--data_dir", data)
    quiet = ("--max_steps", 1, "--report_to", "none", "--disable_tqdm")
    return here("train", *common, "--output_dir", folder, *quiet, *words)


def test_a_second_run_into_the_same_folder(here, data, model, earlier_run):
    before = snapshot(earlier_run)
    refused(
        run_into(here, earlier_run, data, model),
        f"output_dir={earlier_run}: holds an earlier run (checkpoint-1, checkpoint-2",
        "--resume_from_checkpoint latest",
        "--overwrite_output_dir",
        "another folder",
    )
    assert snapshot(earlier_run) == before


def test_overwriting_replaces_the_run_and_keeps_what_is_not_of_it(
    here, data, model, earlier_run, tmp_path
):
    folder = Path(shutil.copytree(earlier_run, tmp_path / "run"))
    outcome = run_into(here, folder, data, model, "--overwrite_output_dir", "--save_steps", 5)
    assert outcome.code == 0, outcome.err
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-1"]
    assert (folder / "notes.txt").read_text(encoding="utf-8") == "the user's own\n"
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 1


@pytest.mark.parametrize("value", ["latest", "true"])
def test_resuming_without_a_checkpoint(here, data, model, tmp_path, value):
    outcome = run_into(here, tmp_path / "run", data, model, "--resume_from_checkpoint", value)
    refused(
        outcome,
        f"resume_from_checkpoint={value}: no checkpoint found in {tmp_path}/run",
        "omit the flag",
    )


def test_resuming_from_what_is_no_checkpoint(here, data, model, earlier_run, tmp_path):
    before = snapshot(earlier_run)
    half = Path(shutil.copytree(earlier_run / "checkpoint-2", tmp_path / "checkpoint-2"))
    (half / "model.safetensors").unlink()
    for folder, missing in (
        (data, "trainer_state.json, weights"),
        (half, "missing: weights (model.safetensors)"),
        (tmp_path / "nowhere", "the folder itself"),
    ):
        outcome = run_into(here, earlier_run, data, model, "--resume_from_checkpoint", folder)
        refused(outcome, f"resume_from_checkpoint={folder}", "not a checkpoint", missing, "latest")
    assert snapshot(earlier_run) == before


def test_an_output_folder_that_is_a_file(here, data, model):
    before = snapshot(data)
    outcome = run_into(here, data / "train.source", data, model)
    refused(outcome, f"output_dir={data}/train.source: is a file", "give a folder")
    assert snapshot(data) == before


def test_a_read_only_output_folder(data, model, tmp_path):
    """Mounted read-only, since permissions do not stop the superuser."""
    if subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("this machine allows no mount namespace")
    folder = tmp_path / "locked"
    folder.mkdir()
    script = f'mount -t tmpfs -o ro none {folder} && exec "$@"'
    process = start_command(
        *("train", "--profile", "cpu", "--model_name_or_path", model, "--data_dir", data),
        *("--output_dir", folder / "run", "--max_steps", 1),
        before=("unshare", "-rm", "sh", "-c", script, "sh"),
    )
    outcome = finish(process)
    refused(outcome, f"output_dir={folder}/run", "Read-only file system", "give a writable folder")


# ---- Model folders ----


@pytest.fixture
def broken_model(model: Path, tmp_path: Path) -> Path:
    """A copy of the model for a test to spoil."""
    return Path(shutil.copytree(model, tmp_path / "broken"))


def test_a_model_folder_without_weights(training, broken_model):
    (broken_model / "model.safetensors").unlink()
    refused(
        training("--model_name_or_path", broken_model),
        f"{broken_model}: no weights in this folder",
        "expected one of model.safetensors",
        "another --model_name_or_path",
    )


def test_a_model_folder_without_config_or_tokenizer(training, broken_model):
    for name in ("vocab.json", "source.spm"):
        (broken_model / name).unlink()
    outcome = training("--model_name_or_path", broken_model)
    refused(outcome, str(broken_model), "no tokenizer", "--tokenizer_name")
    (broken_model / "config.json").unlink()
    outcome = training("--model_name_or_path", broken_model)
    refused(outcome, f"{broken_model}: no config.json in this folder", "new-model")


def test_weights_cut_off_by_a_broken_copy(training, broken_model):
    weights = broken_model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    outcome = training("--model_name_or_path", broken_model)
    refused(outcome, f"weights of '{broken_model}'", "check its files")


@pytest.mark.parametrize("name", ["./no-model", "/nowhere/no-model", "a/b/no-model"])
def test_a_missing_model_folder(training, name):
    refused(training("--model_name_or_path", name), f"{name}: no such folder", "expected one")


def test_a_refused_run_leaves_no_folder(here, data, tmp_path):
    folder = tmp_path / "run"
    refused(run_into(here, folder, data, tmp_path / "no-model"), "no-model: no such folder")
    assert not folder.exists()


@pytest.mark.parametrize("name", ["no-model", "runs/no-model"])
def test_a_name_that_is_neither_folder_nor_on_the_hub(training, name):
    outcome = training("--model_name_or_path", name)
    refused(outcome, f"'{name}'", "no such folder here", "as a hub id", "give a folder that exists")


def test_no_model_at_all(here, data, tmp_path):
    outcome = here("train", "--data_dir", data, "--output_dir", tmp_path / "run")
    refused(outcome, "--model_name_or_path", "missing")
    assert not (tmp_path / "run").exists()
