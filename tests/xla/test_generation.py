"""Generation on virtual XLA devices: the CPU's tokens, and few compilations."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import run_command
from tests.support.families import FAMILY_NAMES, TINY_TEXTS, tiny_folder
from tests.support.worker import run_ranks
from tests.support.xla_training import virtual_devices

pytestmark = [
    pytest.mark.skipif(find_spec("torch_xla") is None, reason="torch-xla is not installed"),
    pytest.mark.slow,
]

ROWS = 300
GRAPHS = 3  # encoder with the first token, every further token, collecting the result


def generated(
    folder: Path, families: list[str], *, backend: str, devices: int, rows: int, searches: list[str]
) -> list[dict[str, Any]]:
    """What came out for each family and each of ``searches``."""
    job = {"backend": backend, "families": families, "searches": searches, "rows": rows}
    environment = {
        **virtual_devices(devices),
        "XLA_PERSISTENT_CACHE_PATH": "",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    work = "tests.support.xla_generation:work"
    found = run_ranks(work, job, folder=folder, limit=540, environment=environment)[0]
    assert len(found) == len(searches) * len(families)
    return found


def check(run: dict[str, Any], rows: int) -> None:
    assert len(run["equal"]) == rows * (2 if run["name"] == "options" else 1)
    assert all(run["equal"]), f"{run['equal'].count(False)} rows differ from the CPU's"
    assert 1 <= run["compilations"][0] <= GRAPHS
    assert not any(run["compilations"][1:]), run["compilations"]
    assert len(run["compilations"]) >= 2
    assert len(run["lengths"]) >= 3, "rows were meant to end at different steps"


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_one_device_gives_the_cpus_tokens_on_300_rows(family: str, tmp_path: Path) -> None:
    searches = ["greedy", "beams"]
    for run in generated(
        tmp_path, [family], backend="xla", devices=1, rows=ROWS, searches=searches
    ):
        check(run, ROWS)
        assert run["compilations"][0] <= 2  # nothing to collect


@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_four_devices_give_the_cpus_tokens(axis: str, tmp_path: Path) -> None:
    families, searches, backend = ["t5", "fsmt"], ["beams", "options"], f"xla:{axis}"
    for run in generated(
        tmp_path, families, backend=backend, devices=4, rows=60, searches=searches
    ):
        check(run, 60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, source lines of several lengths with an empty one, and a test split."""
    made = tmp_path_factory.mktemp("xla")
    tiny_folder("marian", made / "model")
    lines = TINY_TEXTS * 2
    (made / "in.txt").write_text("\n".join([*lines, "", "the dog"]) + "\n", encoding="utf-8")
    for side in ("source", "target"):
        (made / f"test.{side}").write_text("\n".join(lines[:11]) + "\n", encoding="utf-8")
    return made


@pytest.mark.parametrize("profile", ["cpu-xla", "cpu-xla-fsdp"])
def test_the_generate_command_writes_the_cpus_text(
    profile: str, folder: Path, tmp_path: Path
) -> None:
    texts = []
    for name in ("cpu", profile):
        output = tmp_path / f"{name}.txt"
        words = ["--input", folder / "in.txt", "--output", output, "--batch_size", 6]
        options = ["--num_beams", 3, "--num_return_sequences", 2, "--max_length", 12]
        model = ["--profile", name, "--model", folder / "model"]
        done = run_command("generate", *model, *words, *options)
        assert done.code == 0, done.err
        texts.append(output.read_text(encoding="utf-8").splitlines())
    assert texts[0] == texts[1]
    assert len(texts[0]) == 2 * 16 and len(set(texts[0])) > 4


def test_the_evaluate_command_writes_the_cpus_text_and_scores(folder: Path) -> None:
    found = []
    for name in ("cpu", "cpu-xla"):
        output = folder / f"evaluated-{name}"
        words = ["--data_dir", folder, "--output_dir", output, "--per_device_eval_batch_size", 4]
        options = ["--eval_beams", 2, "--val_max_target_length", 10]
        model = ["--profile", name, "--model", folder / "model"]
        done = run_command("evaluate", *model, *words, *options)
        assert done.code == 0, done.err
        metrics = json.loads((output / "test_results.json").read_text())
        texts = (output / "test_generations.txt").read_text(encoding="utf-8")
        found.append((metrics, texts))
    (wanted, wanted_text), (metrics, text) = found
    assert text == wanted_text
    assert len(text.splitlines()) == 11
    for name in ("test_loss", "test_bleu", "test_chrf", "test_gen_len"):
        assert metrics[name] == pytest.approx(wanted[name], rel=1e-5), name


def test_an_option_that_cannot_be_static_is_refused_in_one_line(folder: Path) -> None:
    model = ["--profile", "cpu-xla", "--model", folder / "model"]
    done = run_command("generate", *model, "--input", folder / "in.txt", "--do_sample")
    assert done.code != 0
    (line,) = done.errors
    assert line.startswith("do_sample=True: ")
