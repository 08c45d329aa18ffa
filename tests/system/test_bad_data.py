"""Bad data: each mistake is named by file and line, and the earlier run stays as it was.

All commands ask for ``--overwrite_output_dir`` on a folder with a run, so that a check which came
too late would show as a lost file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from tests.support.command import Here, Outcome, refused, run_command, snapshot


@pytest.fixture
def training(here: Here, model: Path, earlier_run: Path):
    """Call ``train`` over the earlier run; fails if anything in its folder changed."""

    def train(*words: object, run: Callable[..., Outcome] = here) -> Outcome:
        before = snapshot(earlier_run)
        assert {"checkpoint-2", "model.safetensors", "notes.txt"} <= set(before)
        common = ("--profile", "cpu", "--output_dir", earlier_run, "--overwrite_output_dir")
        quiet = ("--max_steps", 1, "--report_to", "none", "--disable_tqdm")
        outcome = run("train", "--model_name_or_path", model, *common, *quiet, *words)
        assert snapshot(earlier_run) == before
        return outcome

    return train


def spoil(path: Path, line: int, content: bytes) -> None:
    """Replace a line of the file, counted from 1."""
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line - 1] = content
    path.write_bytes(b"".join(lines))


# ---- Folders of lines ----


def test_as_a_user_types_it(training, own_data):
    spoil(own_data / "train.source", 7, b"\n")
    outcome = training("--data_dir", own_data, run=run_command)
    refused(outcome, f"{own_data}/train.source:7", "empty", "''", "expected text", "delete the row")
    assert outcome.err.count("\n") == len(outcome.errors), "nothing but the error lines"


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("content", [b"\n", b" \t\n", "\u00a0\n".encode()])
def test_empty_line(training, own_data, side, content):
    spoil(own_data / f"train.{side}", 3, content)
    shown = repr(content.decode().rstrip("\n"))
    refused(
        training("--data_dir", own_data),
        f"{own_data}/train.{side}:3: ",
        f"empty {side}",
        shown,
        "expected text",
        "delete the row from source and target",
    )


def test_an_empty_line_in_a_split_that_comes_later_is_found_before_training(training, own_data):
    spoil(own_data / "test.target", 8, b"\n")
    outcome = training("--data_dir", own_data, "--do_predict")
    refused(outcome, f"{own_data}/test.target:8: ", "empty target")


def test_different_line_counts(training, own_data):
    with (own_data / "train.target").open("ab") as file:
        file.write(b"one more\n")
    refused(
        training("--data_dir", own_data),
        f"{own_data}/train.source has 64 lines",
        f"{own_data}/train.target has 65",
        "expected the same number",
        "add the missing lines or delete",
    )


def test_invalid_utf8(training, own_data):
    spoil(own_data / "train.target", 12, "schöne Grüße\n".encode("latin-1"))
    refused(
        training("--data_dir", own_data),
        f"{own_data}/train.target:12: ",
        "byte 0xf6 at position 4",
        "expected UTF-8",
        "iconv",
    )


@pytest.mark.parametrize("split", ["train", "val"])
def test_empty_split(training, own_data, split):
    for side in ("source", "target"):
        (own_data / f"{split}.{side}").write_bytes(b"")
    refused(
        training("--data_dir", own_data, "--do_eval"),
        f"{own_data}/{split}.source",
        f"the {split} split has no rows",
        "expected at least 1",
        "leave the split out",
    )


def test_a_missing_file_of_a_split(training, own_data):
    (own_data / "train.target").unlink()
    refused(
        training("--data_dir", own_data),
        f"{own_data}/train.target: no such file",
        "correct --data_dir",
    )


def test_a_missing_data_folder(training, tmp_path):
    outcome = training("--data_dir", tmp_path / "nowhere")
    refused(outcome, f"--data_dir {tmp_path}/nowhere: no such folder", "correct the path")


@pytest.mark.parametrize(
    ("flag", "split"),
    [("--do_predict", "test"), ("--do_eval", "val"), ("--eval_strategy=steps", "val")],
)
def test_a_split_that_is_needed_but_not_there(training, own_data, flag, split):
    for side in ("source", "target"):
        (own_data / f"{split}.{side}").unlink()
    refused(
        training("--data_dir", own_data, flag),
        f"{flag.partition('=')[0]} needs the {split} split",
        "add it or omit the flag",
    )


def test_all_bad_lines_of_a_file_are_shown_up_to_five(training, own_data):
    for line in range(1, 9):
        spoil(own_data / "train.source", line, b"\n")
    outcome = training("--data_dir", own_data)
    refused(outcome, "and 3 more")
    assert len(outcome.errors) == 6


# ---- Tables ----


def table(folder: Path, name: str, rows: list[dict[str, object]]) -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_missing_column(training, tmp_path):
    file = table(tmp_path, "rows.jsonl", [{"sorce": "a", "target": "b"}])
    refused(
        training("--train_file", file),
        f"{file}:1: no column 'source'",
        "did you mean 'sorce'?",
        "expected one of the columns there: sorce, target",
        "--source_column",
    )


def test_unknown_column(training, tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("english,german\na,b\n", encoding="utf-8")
    refused(
        training("--train_file", file, "--source_column", "english", "--target_column", "germn"),
        f"{file}:1: no column 'germn'",
        "did you mean 'german'?",
        "english, german",
        "--target_column",
    )


def test_a_row_without_its_column(training, tmp_path):
    file = table(tmp_path, "rows.jsonl", [{"source": "a", "target": "b"}, {"source": "c"}])
    refused(
        training("--train_file", file),
        f"{file}:2: column 'target' is missing",
        "expected text",
        "delete the row",
    )


def test_a_cell_that_is_no_text(training, tmp_path):
    file = table(tmp_path, "rows.jsonl", [{"source": 12, "target": "b"}])
    outcome = training("--train_file", file)
    refused(outcome, f"{file}:1: column 'source' holds 12 (int)", "expected text", "in quotes")


def test_an_empty_cell(training, tmp_path):
    file = table(tmp_path, "rows.jsonl", [{"source": "a", "target": "b"}] * 2 + [
        {"source": "a", "target": " "}
    ])  # fmt: skip
    refused(training("--train_file", file), f"{file}:3: empty target", "' '", "expected text")


def test_a_table_that_is_not_utf8(training, tmp_path):
    file = tmp_path / "rows.tsv"
    file.write_bytes(b"source\ttarget\na\tb\nc\t\xff\n")
    refused(training("--train_file", file), f"{file}:3: byte 0xff at position 3", "expected UTF-8")


def test_an_empty_table(training, tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("source,target\n", encoding="utf-8")
    outcome = training("--train_file", file)
    refused(outcome, str(file), "the train split has no rows", "expected at least 1", "add rows")


def test_unknown_column_and_missing_split_of_a_saved_data_set(training, tmp_path):
    folder = tmp_path / "saved"
    rows = datasets.Dataset.from_dict({"src": ["a"], "target": ["b"]})
    datasets.DatasetDict(train=rows).save_to_disk(str(folder))
    outcome = training("--dataset_name", folder)
    refused(outcome, f"--dataset_name {folder}: no column 'source'", "src, target")
    outcome = training("--dataset_name", folder, "--source_column", "src", "--do_predict")
    refused(outcome, "--do_predict needs the test split")


# ---- Tokens ----


def test_token_ids_beyond_the_vocabulary_are_found_before_training(training, data, bart):
    """The tokenizer of a model with 300 pieces beside a model with a few dozen."""
    outcome = training("--data_dir", data, "--tokenizer_name", bart)
    refused(
        outcome,
        "row 1: source token id ",
        "expected ids from 0 to ",
        "the model's source vocabulary",
        "tokenizer and model do not match",
        "--tokenizer_name",
    )
    assert "'loss'" not in outcome.out


# ---- The other commands that read data ----


def test_new_model_on_bad_data_writes_nothing(here, own_data, tmp_path):
    spoil(own_data / "train.source", 5, b"\n")
    folder = tmp_path / "model"
    common = ("--architecture", "marian", "--size", "tiny", "--vocab_size", 100)
    outcome = here("new-model", *common, "--data_dir", own_data, "--output_dir", folder)
    refused(outcome, f"{own_data}/train.source:5: empty source")
    assert not folder.exists() or not snapshot(folder)


def test_evaluate_on_bad_data_writes_nothing(here, own_data, model, tmp_path):
    spoil(own_data / "test.source", 2, b"\xff\n")
    words = ("--profile", "cpu", "--split", "test", "--output_dir", tmp_path / "results")
    outcome = here("evaluate", "--model_name_or_path", model, "--data_dir", own_data, *words)
    refused(outcome, f"{own_data}/test.source:2: byte 0xff", "expected UTF-8")
    assert not snapshot(tmp_path / "results")


@pytest.mark.parametrize(
    ("content", "parts"),
    [(b"one\n\xff\n", (":2", "UTF-8")), (None, ("does not exist", "expected a text file"))],
)
def test_generate_from_a_bad_file_keeps_an_earlier_output(here, model, tmp_path, content, parts):
    source, output = tmp_path / "in.txt", tmp_path / "out.txt"
    if content is not None:
        source.write_bytes(content)
    output.write_text("an earlier result\n", encoding="utf-8")
    words = ("--profile", "cpu", "--input", source, "--output", output, "--max_length", 5)
    outcome = here("generate", "--model_name_or_path", model, *words, "--overwrite")
    refused(outcome, str(source), *parts)
    assert output.read_text(encoding="utf-8") == "an earlier result\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        path.name for path in (source, output) if path.exists()
    )
