"""Saving fails: on a full disk, at a limit on file sizes, in a folder that turns read-only.

What counts: exit code 2, the system's reason, and the last good checkpoint named, whole, and good
to go on from.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from s2s_scale.checkpoint import SaveError, atomic_dir, verify
from tests.support.command import (
    Outcome,
    finish,
    refused,
    run_command,
    snapshot,
    start_command,
)
from tests.support.limits import limited

ROOT = Path(__file__).parents[2]
NO_SPACE = "No space left on device"
MIB = 1 << 20
LONGER = ("--accept_changes", "schedule")
"""A linear schedule over more steps is another schedule."""


def words_of(model: Path, data: Path, output_dir: Path, *more: object) -> list[str]:
    """A training of two steps that saves after each."""
    words = ["train", "--profile", "cpu", "--model_name_or_path", model, "--data_dir", data]
    words += ["--output_dir", output_dir, "--save_steps", 1, "--logging_steps", 1]
    words += ["--report_to", "none", "--disable_tqdm", *more]
    if "--max_steps" not in more:
        words += ["--max_steps", 2]
    return [str(word) for word in words]


def check_whole(checkpoint: Path, like: Path) -> None:
    """``checkpoint`` holds every file that ``like`` holds, and its tensors can be read."""
    assert {p.name for p in checkpoint.iterdir()} == {p.name for p in like.iterdir()}
    AutoModelForSeq2SeqLM.from_pretrained(checkpoint)
    verify(checkpoint)
    step = int(checkpoint.name.rpartition("-")[2])
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == step


def check_goes_on(here, model: Path, data: Path, folder: Path) -> None:
    """``latest`` continues in ``folder`` to step 4."""
    resume = ("--resume_from_checkpoint", "latest", "--max_steps", 4, *LONGER)
    outcome = here(*words_of(model, data, folder, *resume))
    assert outcome.code == 0, outcome.err
    state = json.loads((folder / "trainer_state.json").read_text())
    assert [e["step"] for e in state["log_history"] if "loss" in e] == [1, 2, 3, 4]


# ---- Disks of a given size, mounted where only the command sees them ----


def pages_kib(*paths: Path) -> int:
    """What the files take on a tmpfs, which gives out pages of 4 KiB."""
    return sum(-(-path.stat().st_size // 4096) * 4 for path in paths)


@pytest.fixture(scope="module")
def mounts() -> None:
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    if not shutil.which("unshare") or subprocess.run(probe, check=False).returncode:
        pytest.skip("this machine allows no mounts of one's own (unshare -rm)")


@pytest.fixture(scope="module")
def sizes(earlier_run: Path) -> dict[str, int]:
    """Sizes in KiB at which the disk is full while a certain file is written."""
    saved = earlier_run / "checkpoint-2"
    whole = pages_kib(*saved.iterdir())
    weights = pages_kib(saved / "model.safetensors")
    optimizer = pages_kib(saved / "optimizer.safetensors")
    last = ("trainer_state.json", "training_state.json", "settings.json", "manifest.json")
    after = [pages_kib(*(saved / name for name in last[place:])) for place in range(4)]
    final = pages_kib(*(earlier_run / p.name for p in saved.iterdir() if p.name not in (
        "optimizer.safetensors", *last)), earlier_run / "training_args.bin")  # fmt: skip
    return {
        "weights": whole + weights // 2,
        "optimizer": whole + weights + optimizer // 2,
        "trainer state": 2 * whole - after[0],
        "manifest": 2 * whole - after[3],
        "final model": 2 * whole + weights // 2,
        "report": 2 * whole + final + 64,
    }


@pytest.fixture(scope="module")
def on_small_disks(
    mounts: None,
    sizes: dict[str, int],
    model: Path,
    data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    """Results of one run for each of ``sizes``, and one on a disk that turns read-only."""
    results, disk = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("disk")
    words = words_of(model, data, disk)
    runs = [{"name": name, "size_kib": size, "words": words} for name, size in sizes.items()]
    runs.append(
        {
            "name": "read-only",
            "size_kib": 256 * 1024,
            "lock": str(disk / "checkpoint-2" / "trainer_state.json"),
            "words": words_of(model, data, disk, "--max_steps", 500, "--save_total_limit", 2),
        }
    )
    spec = results / "spec.json"
    spec.write_text(json.dumps({"folder": str(disk), "runs": runs}), encoding="utf-8")
    command = ["unshare", "-rm", sys.executable, "-m", "tests.support.small_disks", str(spec)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return results, disk


def outcome_of(results: Path, name: str) -> Outcome:
    return Outcome(**json.loads((results / f"{name}.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", ["weights", "optimizer", "trainer state", "manifest"])
def test_the_disk_fills_while_a_checkpoint_is_saved(
    here, on_small_disks, model, data, earlier_run, name
):
    results, disk = on_small_disks
    refused(
        outcome_of(results, name),
        f"saving checkpoint-2 in {disk} failed: {NO_SPACE}",
        "enough free space",
        f"the last good checkpoint is {disk}/checkpoint-1",
        "--resume_from_checkpoint latest",
    )
    left = results / name
    assert [path.name for path in left.iterdir()] == ["checkpoint-1"], "nothing half-written"
    check_whole(left / "checkpoint-1", earlier_run / "checkpoint-1")
    check_goes_on(here, model, data, left)


def test_the_disk_fills_while_the_final_model_is_saved(on_small_disks, earlier_run):
    results, disk = on_small_disks
    refused(
        outcome_of(results, "final model"),
        f"saving the model in {disk} failed: {NO_SPACE}",
        f"the last good checkpoint is {disk}/checkpoint-2",
    )
    left = results / "final model"
    assert sorted(path.name for path in left.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    check_whole(left / "checkpoint-2", earlier_run / "checkpoint-2")


def test_the_disk_fills_while_the_report_is_written(on_small_disks, earlier_run):
    results, disk = on_small_disks
    refused(
        outcome_of(results, "report"),
        f"saving the results in {disk} failed: {NO_SPACE}",
        f"the last good checkpoint is {disk}/checkpoint-2",
    )
    left = results / "report"
    AutoModelForSeq2SeqLM.from_pretrained(left)
    assert not (left / "report.html").exists() or (left / "report.html").stat().st_size > 100_000
    check_whole(left / "checkpoint-2", earlier_run / "checkpoint-2")


def test_the_folder_turns_read_only_while_training(on_small_disks, earlier_run):
    results, disk = on_small_disks
    saved = sorted((results / "read-only").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    assert saved and int(saved[-1].name[11:]) < 500
    refused(
        outcome_of(results, "read-only"),
        f"in {disk} failed: Read-only file system",
        f"the last good checkpoint is {disk}/{saved[-1].name}",
    )
    check_whole(saved[-1], earlier_run / "checkpoint-1")


def test_a_full_disk_as_a_user_meets_it(mounts, sizes, model, data, earlier_run, tmp_path):
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    script = (
        f"mount -t tmpfs -o size={sizes['optimizer']}k none {disk}; "
        f'"$@"; code=$?; cp -a {disk} {copy}; exit $code'
    )
    process = start_command(
        *words_of(model, data, disk), before=("unshare", "-rm", "sh", "-c", script, "sh")
    )
    refused(finish(process), f"saving checkpoint-2 in {disk} failed: {NO_SPACE}", "checkpoint-1")
    assert [path.name for path in copy.iterdir()] == ["checkpoint-1"]
    check_whole(copy / "checkpoint-1", earlier_run / "checkpoint-1")


# ---- A limit on the size of files, which needs no privileges ----


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writing beyond ``size`` bytes of a file fails with EFBIG (Python ignores SIGXFSZ)."""
    with limited(resource.RLIMIT_FSIZE, size):
        yield


@pytest.fixture
def own_run(earlier_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be continued."""
    return Path(shutil.copytree(earlier_run, tmp_path / "run"))


@pytest.mark.parametrize(
    "limit",
    [2 * MIB, 5 * MIB],
)
def test_a_file_becomes_too_large(here, model, data, own_run, earlier_run, limit):
    """2 MiB stop the weights, 5 MiB the optimizer's state."""
    saved = earlier_run / "checkpoint-2"
    assert (saved / "model.safetensors").stat().st_size < 5 * MIB
    assert (saved / "optimizer.safetensors").stat().st_size > 5 * MIB
    before = snapshot(own_run)
    more = ("--resume_from_checkpoint", "latest", "--max_steps", 4)
    words = words_of(model, data, own_run, *more, *LONGER)
    with file_size_limit(limit):
        outcome = here(*words)
    refused(
        outcome,
        f"saving checkpoint-3 in {own_run} failed: {os.strerror(27)}",
        f"the last good checkpoint is {own_run}/checkpoint-2",
        "--resume_from_checkpoint latest",
    )
    assert snapshot(own_run) == before
    check_goes_on(here, model, data, own_run)


def test_a_file_becomes_too_large_as_a_user_meets_it(model, data, tmp_path):
    folder = tmp_path / "run"
    outcome = run_command(
        *words_of(model, data, folder),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, 2 * MIB)),
    )
    refused(
        outcome,
        f"saving checkpoint-1 in {folder} failed: {os.strerror(27)}",
        "no checkpoint had been saved",
    )
    assert not folder.exists()


# ---- How each library reports a failed write ----


def save_tokenizer(path: Path, bart: Path) -> None:
    AutoTokenizer.from_pretrained(bart).backend_tokenizer.save(str(path))


@pytest.mark.parametrize(
    ("save", "reason"),
    [
        (lambda path, _: torch.save({"a": torch.zeros(3)}, path), "torch could not write"),
        (lambda path, _: torch.save({"a": torch.zeros(MIB)}, path), "torch could not write"),
        (lambda path, _: path.write_text("{}"), NO_SPACE),
        (save_tokenizer, NO_SPACE),
    ],
    ids=["torch, small", "torch, large", "text", "tokenizers"],
)
def test_a_write_that_fails_is_told_from_an_error_in_the_program(own_run, bart, save, reason):
    """/dev/full takes no byte. The folder itself has room, so torch's reason cannot be found."""
    before = snapshot(own_run)

    def save_there() -> None:
        with atomic_dir(own_run / "checkpoint-3") as folder:
            (folder / "file").symlink_to("/dev/full")
            save(folder / "file", bart)

    with pytest.raises(SaveError) as caught:
        save_there()
    assert f"saving checkpoint-3 in {own_run} failed: {reason}" in str(caught.value)
    assert f"{own_run}/checkpoint-2" in str(caught.value)
    assert snapshot(own_run) == before


def test_an_error_in_the_program_stays_what_it_is(own_run):
    before = snapshot(own_run)
    with pytest.raises(RuntimeError, match="shapes"), atomic_dir(own_run / "checkpoint-3"):
        raise RuntimeError("shapes do not match")
    assert snapshot(own_run) == before
