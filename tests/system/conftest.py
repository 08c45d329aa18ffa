"""One tiny data folder, one tiny model and one finished run for all tests of the command line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from s2s_scale import cli
from tests.support.command import Here

SPLITS = {"train": (0, 64), "val": (64, 72), "test": (72, 80)}


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Here:
    """The command line, called in this process."""
    return Here(capsys)


def write_pairs(folder: Path) -> Path:
    """{train,val,test}.{source,target} with 64, 8 and 8 rows of short sentences."""
    folder.mkdir(parents=True)
    for split, (first, end) in SPLITS.items():
        for side, text in (("source", "number {} of the list"), ("target", "Nummer {} der Liste")):
            lines = "".join(f"{text.format(i)}\n" for i in range(first, end))
            (folder / f"{split}.{side}").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound data; tests do not change it."""
    return write_pairs(tmp_path_factory.mktemp("sound") / "data")


@pytest.fixture
def own_data(tmp_path: Path, data: Path) -> Path:
    """A copy of the sound data for a test to spoil."""
    return Path(shutil.copytree(data, tmp_path / "own_data"))


def _new_model(architecture: str, vocab_size: int, data: Path, folder: Path) -> Path:
    code = cli.main(
        f"new-model --architecture {architecture} --size tiny --vocab_size {vocab_size} "
        f"--data_dir {data} --output_dir {folder}".split()
    )
    assert code == 0
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A tiny Marian with a vocabulary of a few dozen pieces."""
    return _new_model("marian", 100, data, tmp_path_factory.mktemp("marian") / "model")


@pytest.fixture(scope="session")
def bart(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A tiny BART, whose byte-level vocabulary is larger than the Marian's."""
    return _new_model("bart", 300, data, tmp_path_factory.mktemp("bart") / "model")


@pytest.fixture(scope="session")
def earlier_run(tmp_path_factory: pytest.TempPathFactory, data: Path, model: Path) -> Path:
    """A finished run of two steps with checkpoint-1 and checkpoint-2, and a file of the user's."""
    folder = tmp_path_factory.mktemp("earlier") / "run"
    code = cli.main(
        f"train --profile cpu --model_name_or_path {model} --data_dir {data} --output_dir {folder} "
        "--max_steps 2 --save_steps 1 --logging_steps 1 --report_to none --disable_tqdm".split()
    )
    assert code == 0
    (folder / "notes.txt").write_text("the user's own\n", encoding="utf-8")
    return folder
