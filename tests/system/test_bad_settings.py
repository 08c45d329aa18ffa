"""Bad settings: each mistake names flag or file and line, value, what was expected, the remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.command import Here, Outcome, refused, run_command, snapshot

SCHEDULERS = "linear, cosine, cosine_w_restarts, polynomial, constant, constant_w_warmup"


@pytest.fixture
def training(here: Here, model: Path, data: Path, earlier_run: Path):
    """Call ``train --overwrite_output_dir`` over the earlier run; fails if anything changed."""

    def train(*words: object, run: Callable[..., Outcome] = here, first: object = None) -> Outcome:
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
        given = [word for pair in sound.items() if pair[0] not in words for word in pair]
        file = [first] if first is not None else []
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
        (("--qqq", 9), ("unknown option '--qqq'", "s2s-scale train --help")),
        (("--vocab_size", 9), ("'--vocab_size' is no option of train, but of new-model",)),
        (("--learning_rate", "fast"), ("--learning_rate: expected a number, got 'fast'",)),
        (("--num_train_epochs", "x"), ("--num_train_epochs: expected a number, got 'x'",)),
        (("--max_steps", "1.5"), ("--max_steps: expected a whole number, got '1.5'",)),
        (("--do_eval", "maybe"), ("--do_eval: expected true or false, got 'maybe'",)),
        (("--freeze_encoder=2",), ("--freeze_encoder: expected true or false, got '2'",)),
        (("--max_target_length", 0), ("max_target_length=0", "at least 1", "a larger value")),
        (("--max_target_length", "-3"), ("max_target_length=-3", "at least 1")),
        (("--n_train", 0), ("n_train=0", "expected -1 (all rows) or at least 1", "--n_train")),
        (("--lr_scheduler", "cosin"), (f"one of: {SCHEDULERS}", "'cosin'", "mean 'cosine'?")),
        (("--lr_scheduler_type", "lineer"), ("expected one of: linear", "mean 'linear'?")),
        (("--metrics", "blue"), ("expected one of: bleu, chrf, rouge", "'blue'", "mean 'bleu'?")),
        (("--batching", "sorted"), ("--batching: expected one of: fixed, sortish", "'sorted'")),
        (("--profile", "cpuu"), ("unknown profile 'cpuu'", "mean 'cpu'?", "one of: cpu")),
        (("--resume_from_checkpoint",), ("--resume_from_checkpoint: expected text, got nothing",)),
    ],
)
def test_flags(training, words, parts):
    refused(training(*words), *parts)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("lerning_rate: 3e-4", ("unknown setting 'lerning_rate'", "did you mean 'learning_rate'?")),
        ("learning_rate: fast", ("learning_rate: expected a number, got 'fast'",)),
        ("max_steps: [1, 2]", ("max_steps: expected a whole number, got a list",)),
        ("lr_scheduler: cosin", (f"one of: {SCHEDULERS}", "got 'cosin' (did you mean 'cosine'?)")),
        ("metrics: [bleu, rogue]", ("expected one of: bleu", "'rogue' (did you mean 'rouge'?)")),
        ("profile: cpuu", ("unknown profile 'cpuu' (did you mean 'cpu'?)", "one of: cpu")),
        ("seed: 2", ("'seed' is given twice", "first in line 2", "keep one")),
        ("- 1", ("not valid YAML",)),
    ],
)
def test_settings_file(training, settings_file, line, parts):
    words = ("--max_steps", 1) if not line.startswith("max_steps") else ("--save_steps", 9)
    profile = ("--profile",) if line.startswith("profile") else ()
    file = settings_file(line)
    outcome = _without(training, profile, first=file)(*words)
    refused(outcome, f"{file}:3: ", *parts)


def _without(training, dropped: tuple[str, ...], *, first: Path):
    """``training`` with a settings file, and without the sound flags that would win over it."""

    def run(*words: object) -> Outcome:
        def call(verb: str, file: object, *rest: object, here=training.__closure__) -> Outcome:
            raise AssertionError("replaced below")

        return training(*words, first=first)

    return run


def test_max_target_length_0_in_a_settings_file(training, settings_file):
    outcome = training(first=settings_file("max_target_length: 0"))
    refused(outcome, "max_target_length=0", "at least 1")


def test_a_missing_settings_file(training, tmp_path):
    outcome = training(first=tmp_path / "no.yaml")
    refused(outcome, f"{tmp_path}/no.yaml: does not exist", "expected a YAML file")


def test_all_mistakes_at_once(training, settings_file):
    outcome = training("--learning_rte", "1", "--metrics", "x", first=settings_file("sead: 1"))
    refused(outcome, "'--learning_rte'")
    assert len(outcome.errors) == 3
