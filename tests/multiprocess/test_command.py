"""The command on two ranks: the results, texts and files of one process."""

from __future__ import annotations

import json

import pytest

from tests.support.copying import write_copy_task
from tests.support.ranks import run_command

TRAINING = """
    --max_steps 12 --learning_rate 1e-3 --warmup_steps 4 --logging_steps 1 --dropout 0 --seed 0
    --bf16 false --eval_strategy steps --eval_steps 6 --save_strategy steps --save_steps 6
    --do_predict --predict_with_generate --val_max_target_length 8 --per_device_eval_batch_size 4
    --disable_tqdm --report_to none
""".split()


def train(folder, *, profile, ranks, model, data):
    """Train with 16 rows a step on ``ranks`` ranks; the logs, results and generated texts."""
    words = ["train", "--profile", profile, "--model", str(model)]
    words += ["--data_dir", str(data), "--output_dir", str(folder / "run"), *TRAINING]
    words += ["--per_device_train_batch_size", str(16 // ranks)]
    outputs = run_command(words, ranks=ranks, folder=folder)
    run = folder / "run"
    state = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))
    return {
        "loss": [entry["loss"] for entry in state["log_history"] if "loss" in entry],
        "results": json.loads((run / "all_results.json").read_text(encoding="utf-8")),
        "texts": (run / "test_generations.txt").read_text(encoding="utf-8"),
        "files": sorted(path.name for path in run.iterdir()),
        "outputs": outputs,
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder, model and data of the runs."""
    from s2s_scale.models.create import new_model

    root = tmp_path_factory.mktemp("ranks")
    data = write_copy_task(root / "data", {"train": 200, "val": 21, "test": 37})
    texts = (data / "train.source").read_text(encoding="utf-8").splitlines()
    model = new_model(
        architecture="marian", size="tiny", texts=texts, vocab_size=200, output_dir=root / "new"
    )
    return root, {"model": model, "data": data}


@pytest.fixture(scope="module")
def one_run(files):
    root, options = files
    return train(root / "one", profile="cpu", ranks=1, **options)


@pytest.fixture(scope="module", params=["cpu", "cpu-fsdp"])
def two_runs(request, files, one_run):
    """The run of one process, and one on two ranks: each has the whole model, or a half of it."""
    root, options = files
    return one_run, train(root / request.param, profile=request.param, ranks=2, **options)


def test_losses_and_results_are_those_of_one_process(two_runs):
    one, two = two_runs
    assert len(one["loss"]) == 12
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    compared = [n for n in one["results"] if n.startswith("test_") and "second" not in n]
    compared = [n for n in compared if isinstance(one["results"][n], float) and "runtime" not in n]
    assert {"test_bleu", "test_chrf", "test_loss", "test_exact_match"} <= set(compared)
    for name in compared:
        assert two["results"][name] == pytest.approx(one["results"][name], rel=1e-5), name


def test_texts_are_those_of_one_process_each_row_once(two_runs):
    one, two = two_runs
    assert two["texts"] == one["texts"] and len(one["texts"].splitlines()) == 37


def test_one_rank_writes_and_prints(two_runs):
    one, two = two_runs
    assert two["files"] == one["files"]
    assert "report.html" in two["outputs"][0] and "report.html" not in two["outputs"][1]
