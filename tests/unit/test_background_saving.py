"""Saving while training goes on: the same files, errors that surface, and one run per folder."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from s2s_scale.checkpoint import SaveError, checkpoints, remove_partial, verify
from s2s_scale.checkpoint.manager import LOCK, locked
from s2s_scale.errors import UserError
from s2s_scale.trainer import checkpointing
from tests.support.training import fresh, our_trainer, ragged_rows

VALUES = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}


def trainer_in(folder, **values):
    model = fresh("bart")
    return our_trainer(model, folder, ragged_rows(model, 24), **{**VALUES, **values})


def test_the_files_are_those_of_a_save_in_the_foreground(tmp_path):
    for name, background in (("now", False), ("later", True)):
        trainer_in(tmp_path / name, save_in_background=background).train()
    steps = [path.name for path in checkpoints(tmp_path / "later")]
    assert steps == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    for step in steps:
        one, two = tmp_path / "now" / step, tmp_path / "later" / step
        verify(two)
        names = sorted(path.name for path in two.iterdir())
        assert names == sorted(path.name for path in one.iterdir())
        for name in ("model.safetensors", "optimizer.safetensors", "training_state.json"):
            assert (one / name).read_bytes() == (two / name).read_bytes(), (step, name)


def test_training_goes_on_while_a_save_is_written(tmp_path, monkeypatch):
    """Step 3 is made while checkpoint-2 cannot get on, and the end waits for the last one."""
    go_on = threading.Event()
    seen = []
    write = checkpointing.write_states

    def held_up(states, writer):
        assert go_on.wait(60)
        return write(states, writer)

    monkeypatch.setattr(checkpointing, "write_states", held_up)
    trainer = trainer_in(tmp_path, save_in_background=True, max_steps=3)
    from transformers import TrainerCallback

    class Release(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                seen.append((tmp_path / "checkpoint-2").exists())
                go_on.set()

    trainer.add_callback(Release())
    trainer.train()
    assert seen == [False]
    verify(tmp_path / "checkpoint-2")
    assert len(trainer.parts.checkpointer.seconds) == 2, "steps 2 and 3, the last one"


def test_an_error_surfaces_at_the_next_step(tmp_path, monkeypatch):
    def full(states, writer):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(checkpointing, "write_states", full)
    trainer = trainer_in(tmp_path, save_in_background=True, max_steps=60, save_steps=5)
    with pytest.raises(SaveError, match="saving checkpoint-5 .* No space left on device"):
        trainer.train()
    assert 5 <= trainer.state.global_step <= 10, "before the next save at the latest"
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_the_last_save_surfaces_at_the_end(tmp_path, monkeypatch):
    def broken(states, writer):
        raise RuntimeError("not the disk's fault")

    monkeypatch.setattr(checkpointing, "write_states", broken)
    with pytest.raises(RuntimeError, match="not the disk's fault"):
        trainer_in(tmp_path, save_in_background=True, max_steps=2).train()


HOLDER = """
import sys, time
from pathlib import Path
from s2s_scale.checkpoint.manager import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(120)
"""


def test_two_runs_in_one_folder_name_host_and_process_and_a_killed_one_holds_nothing(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        expected = f"another run writes to it .process {holder.pid} on host {socket.gethostname()}"
        with pytest.raises(UserError, match=expected), locked(tmp_path):
            pass
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == holder.pid
        holder.send_signal(signal.SIGKILL)
        holder.wait(30)
        with locked(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
        assert not (tmp_path / LOCK).exists()
    finally:
        holder.kill()
        holder.wait()


def test_what_a_killed_run_left_is_tidied(tmp_path):
    for name in (".checkpoint-3.incomplete", ".checkpoint-2.replaced", ".checkpoint-1.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / "checkpoint-1").mkdir()
    remove_partial(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    assert (tmp_path / "checkpoint-2" / "file").exists()
