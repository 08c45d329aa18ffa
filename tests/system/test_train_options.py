"""Options of the commands do what their help says, through the command line."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from tests.support.command import run_command

SHORT = {
    "max_steps": 3,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "disable_tqdm": True,
    "report_to": "none",
    "logging_steps": 1,
    "save_strategy": "no",
    "max_target_length": 16,
}


@pytest.fixture
def train(here, model, data, tmp_path):
    """Train a few steps with more words; the run's folder."""

    def run(*words, output="run"):
        folder = tmp_path / output
        own = {str(word).strip("-").partition("=")[0] for word in words}
        short = [f"--{name}={value}" for name, value in SHORT.items() if name not in own]
        done = here(
            "train", "--model", model, "--data_dir", data, "--output_dir", folder, *short, *words
        )
        assert done.code == 0, done.err
        return folder

    return run


def logs(folder):
    return json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


def losses(folder):
    return [entry["loss"] for entry in logs(folder) if "loss" in entry]


def test_tensorboard_gets_the_logs(train, monkeypatch, tmp_path):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    train("--report_to", "tensorboard")
    files = list((tmp_path / "events").rglob("events.out.tfevents*"))
    assert files and any(b"nll_loss" in path.read_bytes() for path in files)


@pytest.mark.parametrize(("flag", "part"), [("--freeze_encoder", "encoder.layers")])
def test_what_is_frozen_stays(train, model, flag, part):
    before = load_file(model / "model.safetensors")
    after = load_file(train(flag) / "model.safetensors")
    frozen = [name for name in before if part in name]
    assert frozen and all(torch.equal(before[name], after[name]) for name in frozen)
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "words",
    [
        ["--bf16"],
        ["--gradient_checkpointing"],
        ["--adafactor"],
        ["--lr_scheduler", "cosine_w_restarts", "--lr_num_cycles", "2", "--warmup_steps", "1"],
        ["--dropout", "0.3", "--attention_dropout", "0.1", "--encoder_layerdrop", "0.2"],
        ["--neftune_noise_alpha", "5"],
        ["--dataloader_num_workers", "1", "--batching", "sortish"],
        ["--num_train_epochs", "0.5", "--max_steps=-1"],
    ],
    ids=lambda words: words[0].strip("-"),
)
def test_training_options_train(train, words):
    found = losses(train(*words))
    assert found and all(loss < 6 for loss in found)


def test_dropout_is_saved_with_the_model(train):
    config = json.loads((train("--dropout", "0.25") / "config.json").read_text())
    assert config["dropout"] == 0.25


def test_the_best_model_by_bleu_is_kept(train):
    folder = train(
        *"--eval_strategy steps --eval_steps 1 --save_strategy steps --save_steps 1".split(),
        *"--predict_with_generate --metric_for_best_model bleu --load_best_model_at_end".split(),
        *"--save_total_limit 1 --eval_beams 2".split(),
    )
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    scores = [entry["eval_bleu"] for entry in state["log_history"] if "eval_bleu" in entry]
    assert len(scores) == 3 and state["best_metric"] == max(scores)


def test_results_hold_signatures_and_texts_stand_in_order(train, data):
    folder = train("--do_eval", "--do_predict", "--predict_with_generate")
    results = json.loads((folder / "test_results.json").read_text(encoding="utf-8"))
    assert {"test_bleu", "test_chrf", "test_rougeLsum", "test_exact_match", "test_gen_len"} <= set(
        results
    )
    assert results["test_bleu_signature"].startswith("nrefs:1|")
    merged = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    assert {"train_loss", "val_loss", "test_loss"} <= set(merged)
    rows = (data / "test.source").read_text(encoding="utf-8").splitlines()
    written = (folder / "test_generations.txt").read_text(encoding="utf-8").split("\n")
    assert len(written) == len(rows) + 1 and written[-1] == ""


def test_generate_scores_and_searches(here, train, data, tmp_path):
    folder = train()
    words = ["generate", "--model", folder, "--input", data / "val.source", "--max_length", 8]
    scored = here(
        *words, "--reference", data / "val.target", "--metrics", "chrf", "--output", tmp_path / "o"
    )
    assert scored.code == 0 and "chrf" in scored.err
    assert len((tmp_path / "o").read_text(encoding="utf-8").splitlines()) == 8
    searched = here(
        *words,
        *("--reference", data / "val.target", "--metrics", "chrf"),
        *("--search", "num_beams=1:2 length_penalty=0.5:1.0"),
    )
    if searched.code:  # transformers refuses a length penalty without beams: say which
        assert "length_penalty" in searched.err
        searched = here(
            *words,
            *("--reference", data / "val.target", "--metrics", "chrf"),
            *("--search", "num_beams=2:3 length_penalty=0.5:1.0"),
        )
    assert searched.code == 0, searched.err
    assert searched.out.count("│") >= 4 * 4
    other = here(*words, "--reference", data / "test.target", "--bf16_full_eval")
    assert other.code == 0
    both = here(*words, "--bf16_full_eval", "--fp16_full_eval")
    assert both.code == 2 and "at most one" in both.err


def test_references_of_another_length_are_refused(here, train, data, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("one line\n", encoding="utf-8")
    done = here(
        *("generate", "--model", train(), "--input", data / "val.source", "--max_length", 6),
        *("--reference", short, "--output", tmp_path / "o"),
    )
    assert done.code == 2 and "give one reference line per source line" in done.err


def test_evaluate_writes_only_where_told(here, train, data, tmp_path, monkeypatch):
    folder = train()
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    words = ["evaluate", "--model", folder, "--data_dir", data, "--split", "val"]
    shown = here(*words, "--val_max_target_length", 8)
    assert shown.code == 0 and "bleu" in shown.out
    assert set(tmp_path.iterdir()) == before
    kept = here(*words, "--val_max_target_length", 8, "--output_dir", tmp_path / "kept")
    assert kept.code == 0
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {
        "val_results.json",
        "all_results.json",
        "val_generations.txt",
    }


def test_the_plan_counts_each_row_once(here, model, data):
    for batching in ("fixed", "sortish"):
        done = here(
            *("plan", "--model", model, "--data_dir", data, "--batching", batching),
            *("--per_device_train_batch_size", 5, "--world_size", 2, "--first_steps", 2),
        )
        assert done.code == 0, done.err
        assert "64 rows in 7 steps; 2 rank(s) x 1 micro-batches" in done.out


def test_the_plan_shows_shapes_and_real_tokens(here, model, data):
    command = ("plan", "--model", model, "--data_dir", data, "--batching", "tokens")
    sizes = ("--tokens_per_step", 200, "--num_buckets", 3, "--world_size", 2, "--first_steps", 2)
    done = here(*command, *sizes)
    assert done.code == 0, done.err
    found = re.search(r"64 rows in (\d+) steps; 2 rank\(s\) x 4 micro-batches", done.out)
    assert found
    assert 1 < int(found.group(1)) < 64
    shown = re.search(r"(\d) shapes; real tokens ([\d.]+)%", done.out.replace("\n", " "))
    assert shown
    assert 1 <= int(shown.group(1)) <= 3
    pads = re.search(r"share of pads ([\d.]+)%", done.out)
    assert pads
    assert float(pads.group(1)) + float(shown.group(2)) == pytest.approx(100, abs=0.11)


def test_long_rows_are_cut_or_refused(here, model, data):
    command = ("plan", "--model", model, "--data_dir", data, "--max_source_length", 3)
    assert here(*command).code == 0
    done = here(*command, "--long_rows", "error")
    assert done.code == 2
    assert "source tokens; expected at most 3; raise --max_source_length, shorten the" in done.err


def test_a_run_on_a_cpu_says_nothing_of_other_libraries(model, data, tmp_path):
    """DeepSpeed, which transformers imports, looks for a GPU and warns unless it is told."""
    new = run_command(
        *("new-model", "--architecture", "marian", "--size", "tiny", "--vocab_size", 100),
        *("--data_dir", data, "--output_dir", tmp_path / "new"),
    )
    short = [f"--{name}={value}" for name, value in SHORT.items()]
    files = ("--model", model, "--data_dir", data, "--output_dir", tmp_path / "run")
    trained = run_command("train", *files, *short, "--profile", "cpu")
    for done in (new, trained):
        assert done.code == 0, done.err
        for word in ("WARNING", "accelerator", "deepspeed", "shards"):
            assert word not in done.out + done.err, done.err
