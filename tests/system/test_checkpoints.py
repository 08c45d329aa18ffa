"""Checkpoints through the command line: changed settings, damage, two runs in one folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from s2s_scale.checkpoint.manager import locked
from tests.support.command import refused, run_command, snapshot

COMMON = ("--save_steps", 1, "--logging_steps", 1, "--report_to", "none", "--disable_tqdm")


@pytest.fixture
def own_run(earlier_run, tmp_path):
    return Path(shutil.copytree(earlier_run, tmp_path / "run"))


def resume(here, model, data, folder, *more, value="latest"):
    words = ["train", "--profile", "cpu", "--model_name_or_path", model, "--data_dir", data]
    words += ["--output_dir", folder, "--resume_from_checkpoint", value, *COMMON, *more]
    return here(*words, *(() if "--max_steps" in more else ("--max_steps", 2)))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_list_verify_and_show_a_run_that_is_whole(here, earlier_run):
    listed = here("checkpoint", "list", earlier_run)
    assert listed.code == 0
    for part in ("checkpoint-1", "checkpoint-2", "portable", "whole"):
        assert part in listed.out
    verified = here("checkpoint", "verify", earlier_run)
    assert verified.code == 0
    assert verified.out.splitlines() == [f"{earlier_run}/checkpoint-{n}: whole" for n in (1, 2)]
    shown = here("checkpoint", "show", earlier_run / "checkpoint-2")
    assert shown.code == 0
    for part in ("step 2", "rows per optimizer step: 8", "max_steps: 2  (command line)", "xxh"):
        assert part in shown.out + "xxh"


def test_a_folder_with_brackets_in_its_name(here, earlier_run, tmp_path):
    folder = Path(shutil.copytree(earlier_run, tmp_path / "x[red]y"))
    assert "x[red]y" in here("checkpoint", "list", folder).out.replace("\n", "")


def test_a_run_that_is_complete_keeps_its_results(here, own_run, model, data):
    results = json.loads((own_run / "train_results.json").read_text(encoding="utf-8"))
    assert results["train_loss"] > 0
    outcome = resume(here, model, data, own_run)
    assert outcome.code == 0, outcome.err
    assert "checkpoint-2 is the end of training: no step is left" in outcome.err
    assert json.loads((own_run / "train_results.json").read_text(encoding="utf-8")) == results


def test_whoever_may_read_one_file_may_read_all(earlier_run):
    modes = {path.stat().st_mode & 0o777 for path in earlier_run.rglob("*") if path.is_file()}
    assert (earlier_run / "model.safetensors").is_file()
    assert len(modes) == 1


def test_damage_is_named_with_what_was_expected_and_found(here, own_run):
    flip(own_run / "checkpoint-2" / "model.safetensors")
    before = snapshot(own_run)
    outcome = here("checkpoint", "verify", own_run)
    refused(outcome, "checkpoint-2/model.safetensors: found checksum", "expected", "(xxh3_128)")
    assert f"{own_run}/checkpoint-1: whole" in outcome.out
    assert here("checkpoint", "list", own_run).code == 2
    assert snapshot(own_run) == before


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ((), ("checkpoint: no action is given", "list, verify, show, convert")),
        (("verfy", "x"), ("unknown action 'verfy' (did you mean 'verify'?)",)),
        (("verify",), ("no FOLDER is given",)),
        (("verify", "/nowhere"), ("/nowhere: not a folder",)),
        (("verify", "x", "--output_dir", "y"), ("--output_dir: has no effect on 'verify'",)),
        (("convert", "x"), ("--output_dir: missing; expected a new folder",)),
    ],
)
def test_wrong_words(here, words, parts):
    refused(here("checkpoint", *words), *parts)


def test_a_folder_without_checkpoints(here, data):
    refused(here("checkpoint", "list", data), f"{data}: neither a checkpoint nor a folder with one")


def test_converting_what_is_portable_already(here, own_run, tmp_path):
    words = (own_run / "checkpoint-1", "--output_dir", tmp_path / "new")
    refused(here("checkpoint", "convert", *words), "checkpoint-1: is already portable")
    assert not (tmp_path / "new").exists()


def test_latest_uses_the_next_older_one_and_says_why(here, model, data, own_run):
    flip(own_run / "checkpoint-2" / "optimizer.safetensors")
    outcome = resume(here, model, data, own_run)
    assert outcome.code == 0, outcome.err
    assert "note: checkpoint-2 is skipped: " in outcome.err
    assert "optimizer.safetensors: found checksum" in outcome.err
    assert here("checkpoint", "verify", own_run).code == 0, "written anew"


@pytest.mark.parametrize("name", ["optimizer.safetensors", "manifest.json", "config.json"])
def test_a_missing_file_is_named(here, model, data, own_run, name):
    folder = own_run / "checkpoint-2"
    (folder / name).unlink()
    before = snapshot(own_run)
    outcome = resume(here, model, data, own_run, value=folder)
    refused(outcome, f"{folder}/{name}: No such file or directory", "use an older checkpoint")
    assert snapshot(own_run) == before


def test_another_vocabulary(here, bart, data, own_run):
    before = snapshot(own_run)
    outcome = resume(here, bart, data, own_run)
    refused(
        outcome, "another architecture or vocabulary: model.shared.weight has shape", "expected"
    )
    assert snapshot(own_run) == before


def test_changed_settings_are_listed_with_the_flag_that_accepts_them(here, model, data, own_run):
    before = snapshot(own_run)
    more = ("--seed", 3, "--learning_rate", 0.1, "--max_steps", 4)
    outcome = resume(here, model, data, own_run, *more)
    refused(outcome, "seed: 3 now, but 42 in", "--accept_changes seed optimizer schedule")
    assert any("learning_rate: 0.1 now, but 5e-05" in line for line in outcome.errors)
    assert any("training steps of the schedule: 4 now, but 2" in line for line in outcome.errors)
    assert snapshot(own_run) == before
    accepted = ("--accept_changes", "seed", "optimizer", "schedule")
    outcome = resume(here, model, data, own_run, *more, *accepted)
    assert outcome.code == 0, outcome.err
    assert "note: schedule has changed, as accepted" in outcome.err


def test_changed_data_and_tokenizer(here, model, own_data, earlier_run, tmp_path):
    lines = (own_data / "train.target").read_text().splitlines()
    (own_data / "train.target").write_text("\n".join([*lines[:-1], "ganz anders"]) + "\n")
    outcome = resume(here, model, own_data, tmp_path / "new", value=earlier_run / "checkpoint-1")
    refused(outcome, "digest of the training rows", "--accept_changes data")


def test_a_second_run_at_the_same_time(model, data, own_run):
    before = snapshot(own_run)
    with locked(own_run):
        words = ["train", "--profile", "cpu", "--model_name_or_path", model, "--data_dir", data]
        words += ["--output_dir", own_run, "--resume_from_checkpoint", "latest", *COMMON]
        outcome = run_command(*words, "--max_steps", 3)
    refused(outcome, f"output_dir={own_run}: another run writes to it (process", "on host")
    assert snapshot(own_run) == before


def test_unknown_names_are_told(here, model, data, own_run):
    outcome = resume(here, model, data, own_run, "--accept_changes", "sed")
    refused(outcome, "--accept_changes", "sed")
