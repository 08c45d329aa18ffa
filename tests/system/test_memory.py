"""Evaluation through the commands: memory, the order of rows, and batch size."""

from __future__ import annotations

import json
import os
import random
import string

import pytest

from s2s_scale import cli
from tests.support.copying import write_copy_task
from tests.support.measured import s2s_scale

SHORT = "--val_max_target_length 8 --disable_tqdm".split()
TRAINING = """
    --max_steps 200 --per_device_train_batch_size 32 --learning_rate 1e-3 --warmup_steps 100
    --adam_beta2 0.98 --dropout 0 --seed 0 --report_to none --do_predict --predict_with_generate
    --per_device_eval_batch_size 16
""".split()


def run(*words):
    assert cli.main([*map(str, words)]) == 0


@pytest.fixture(scope="module", autouse=True)
def own_environment():
    """What a profile exports is undone."""
    before = os.environ.copy()
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a copy task in ``data`` and a new model for it in ``new``."""
    folder = tmp_path_factory.mktemp("evaluation")
    data = write_copy_task(folder / "data", {"train": 4000, "val": 70, "test": 120})
    new = "--architecture bart --size tiny --vocab_size 300".split()
    run("new-model", *new, "--data_dir", data, "--output_dir", folder / "new")
    return folder


def train(work, sampler, output_dir):
    """Train with this sampler, then predict the test rows."""
    places = ("--model_name_or_path", work / "new", "--data_dir", work / "data")
    run("train", *places, "--output_dir", output_dir, "--batching", sampler, *TRAINING, *SHORT)
    return output_dir


@pytest.fixture(scope="module")
def trained(work):
    return train(work, "fixed", work / "fixed")


@pytest.fixture(scope="module", params=["fixed", "sortish"])
def predicted(request, work, trained):
    """The folder of a run with each sampler."""
    return trained if request.param == "fixed" else train(work, "sortish", work / "sortish")


def test_predictions_are_in_data_order_under_every_sampler(work, predicted):
    """The model copies, so that a prediction shows which row it belongs to."""
    sources = (work / "data/test.source").read_text().splitlines()
    texts = (predicted / "test_generations.txt").read_text().splitlines()
    lengths = [len(source) for source in sources]
    assert len(set(lengths)) > 1 and lengths != sorted(lengths, reverse=True)  # not in order so far
    assert len(set(sources)) == len(sources) == len(texts) == 120
    in_place = sum(text == source for text, source in zip(texts, sources, strict=True))
    print(f"{predicted.name}: {in_place} of 120 rows are copies of their own source")
    assert in_place >= 108


@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_evaluation_does_not_depend_on_the_batch_size(work, trained, smoothing, tmp_path):
    losses, texts = {}, {}
    for rows in (1, 16):
        words = ("--model", trained, "--data_dir", work / "data", "--split", "val", *SHORT)
        sizes = ("--per_device_eval_batch_size", rows, "--label_smoothing", smoothing)
        output_dir = tmp_path / str(rows)
        run("evaluate", *words, *sizes, "--output_dir", output_dir)
        results = json.loads((output_dir / "val_results.json").read_text())
        losses[rows] = results["val_loss"], results["val_nll_loss"]
        texts[rows] = (output_dir / "val_generations.txt").read_text().splitlines()
    print(f"smoothing {smoothing}: (loss, nll) by batch size: {losses}")
    assert losses[16] == pytest.approx(losses[1], rel=1e-6, abs=1e-6)
    assert (losses[1][0] > losses[1][1] + 0.01) == (smoothing > 0)
    assert texts[1] == texts[16] and len(texts[1]) == 70


def write_short_rows(folder, rows):
    """A validation split of ``rows`` different short lines."""
    chance = random.Random(rows)
    letters = string.ascii_letters[:30]
    lines = set()
    while len(lines) < rows:
        lines.add(" ".join(chance.choices(letters, k=chance.randint(3, 6))))
    folder.mkdir()
    for side in ("source", "target"):
        (folder / f"val.{side}").write_text("".join(f"{line}\n" for line in sorted(lines)))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows_evaluated(trained, tmp_path):
    peak = {}
    for rows in (2_000, 20_000):
        data, output_dir = tmp_path / f"data-{rows}", tmp_path / f"run-{rows}"
        write_short_rows(data, rows)
        words = ("--model", trained, "--data_dir", data, "--output_dir", output_dir, *SHORT)
        options = ("--split", "val", "--per_device_eval_batch_size", 250)
        done = s2s_scale("evaluate", *words, *options, log=tmp_path / f"{rows}.log")
        texts = (output_dir / "val_generations.txt").read_text().splitlines()
        assert len(texts) == rows and len(set(texts)) > rows / 8  # much to keep
        peak[rows] = done.peak_bytes
        print(f"{rows} rows: peak {done.peak_bytes / 2**20:.1f} MiB, {done.seconds:.0f} s")
    growth = peak[20_000] / peak[2_000] - 1
    per_row = (peak[20_000] - peak[2_000]) / 18_000
    print(
        f"20,000 rows take {100 * growth:+.1f} % of the memory of 2,000: {per_row:.0f} bytes a row"
    )
    assert abs(growth) < 0.10
