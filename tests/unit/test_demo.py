"""What the demo does with the state that it finds: nothing yet, half a run, a whole run."""

from __future__ import annotations

import json
import sys
import types

import pytest
import yaml

from s2s_scale import demo
from s2s_scale.errors import UserError
from s2s_scale.settings import Settings
from s2s_scale.settings.commands import DemoOptions

SIZES = {"train": 900, "val": 20, "test": 20}


class FakeRunner(types.ModuleType):
    """Stands in for ``s2s_scale.runner.train``: leaves what a finished run leaves."""

    def __init__(self):
        super().__init__("s2s_scale.runner.train")
        self.calls: list[Settings] = []
        self.code = 0

    def train(self, settings):
        self.calls.append(settings)
        if self.code:
            return self.code
        folder = demo.Path(settings.values["output_dir"])
        targets = (folder / "data" / "test.target").read_text(encoding="utf-8").splitlines()
        targets[1] = "something else"
        (folder / "test_generations.txt").write_text("\n".join(targets) + "\n", encoding="utf-8")
        results = {"test_bleu": 97.25, "test_exact_match": 95.0}
        (folder / "test_results.json").write_text(json.dumps(results))
        (folder / "report.html").write_text("<p>")
        (folder / "report.png").write_bytes(b"png")
        return 0


@pytest.fixture
def runner(monkeypatch):
    fake = FakeRunner()
    monkeypatch.setitem(sys.modules, "s2s_scale.runner.train", fake)
    monkeypatch.setattr(demo, "SPLIT_SIZES", SIZES)
    monkeypatch.setattr(demo, "_new_model", lambda folder: (folder / "model_init").mkdir())
    for name in ("USE_TORCH_XLA", "CUDA_VISIBLE_DEVICES"):  # put back after the profile sets them
        monkeypatch.setenv(name, "0")
    return fake


def settings_of(folder, **more):
    return Settings("demo", options=DemoOptions(output_dir=str(folder), **more))


def everything(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def checkpoint(folder):
    (folder / "checkpoint-7").mkdir(parents=True)
    for name in ("trainer_state.json", "model.safetensors"):
        (folder / "checkpoint-7" / name).write_text("{}")


def test_first_run_trains_from_a_settings_file_and_names_the_next_steps(runner, tmp_path, capsys):
    folder = tmp_path / "demo"
    assert demo.run(settings_of(folder)) == 0
    (given,) = runner.calls
    assert given.command == "train"
    assert given.profile.name == "cpu"
    assert given.values["overwrite_output_dir"] is True
    for name, value in demo.TRAINING.items():
        assert given.values[name] == value, name
        assert given.origins[name].startswith(f"{folder}/demo.yaml:"), name
    assert len((folder / "data" / "train.source").read_text().splitlines()) == SIZES["train"]
    text = capsys.readouterr().out
    for expected in (
        "900 for training",
        "On 20 test pairs not used for training: BLEU 97.2, 95.0 % exact.",
        "something else   (expected: ",
        "report.html",
        f"generate --model_name_or_path {folder}",
        f"demo --output_dir {folder} --overwrite",
    ):
        assert expected in text, expected


def test_settings_file_is_one_that_train_accepts_with_changes(runner, tmp_path):
    folder = tmp_path / "demo"
    demo.run(settings_of(folder))
    values = yaml.safe_load((folder / "demo.yaml").read_text(encoding="utf-8"))
    assert values["output_dir"] == str(folder)
    words = [str(folder / "demo.yaml"), "--output_dir", str(tmp_path / "mine"), "--dropout", "0.1"]
    changed = demo.build_settings(demo.all_commands()["train"], words)
    assert changed.values["output_dir"] == str(tmp_path / "mine")
    assert changed.values["dropout"] == 0.1


def test_second_run_shows_the_first_and_changes_nothing(runner, tmp_path, capsys):
    demo.run(settings_of(tmp_path))
    before = everything(tmp_path)
    capsys.readouterr()
    assert demo.run(settings_of(tmp_path)) == 0
    assert len(runner.calls) == 1
    assert everything(tmp_path) == before
    text = capsys.readouterr().out
    assert "nothing was changed" in text
    assert "BLEU 97.2" in text
    assert "Next steps" in text


def test_overwrite_trains_again(runner, tmp_path):
    demo.run(settings_of(tmp_path))
    (tmp_path / "model_init").rmdir()
    assert demo.run(settings_of(tmp_path, overwrite=True)) == 0
    assert len(runner.calls) == 2
    assert runner.calls[1].values["overwrite_output_dir"] is True


def test_half_a_run_is_resumed_without_touching_its_data(runner, tmp_path, capsys):
    runner.code = demo.INTERRUPTED
    assert demo.run(settings_of(tmp_path)) == demo.INTERRUPTED
    assert "To resume, run the same command" in capsys.readouterr().out
    checkpoint(tmp_path)
    before = everything(tmp_path)
    runner.code = 0
    assert demo.run(settings_of(tmp_path)) == 0
    assert runner.calls[1].values["resume_from_checkpoint"] == "latest"
    assert "overwrite_output_dir" not in runner.calls[1].values
    assert {path: everything(tmp_path)[path] for path in before} == before
    assert "checkpoint-7" in capsys.readouterr().out


def test_interruption_before_the_first_checkpoint_starts_again(runner, tmp_path):
    runner.code = demo.INTERRUPTED
    demo.run(settings_of(tmp_path))
    (tmp_path / "model_init").rmdir()
    runner.code = 0
    assert demo.run(settings_of(tmp_path)) == 0
    assert "resume_from_checkpoint" not in runner.calls[1].values


@pytest.mark.parametrize("overwrite", [False, True])
def test_somebody_elses_run_is_left_alone(runner, tmp_path, overwrite):
    checkpoint(tmp_path)
    with pytest.raises(UserError, match="contains a run that is not the demo's"):
        demo.run(settings_of(tmp_path, overwrite=overwrite))
    assert runner.calls == []
    assert {path.parts[0] for path in everything(tmp_path)} == {"checkpoint-7"}


def test_program_is_named_as_the_user_can_type_it(monkeypatch, tmp_path):
    monkeypatch.setattr(demo.shutil, "which", lambda name: f"/bin/{name}")
    assert demo._command("generate", "a b") == "s2s-scale generate 'a b'"
    monkeypatch.setattr(demo.shutil, "which", lambda name: None)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    assert demo._command("demo") == f"{sys.executable} -m s2s_scale demo"
    (tmp_path / ".venv" / "bin" / "s2s-scale").touch()
    monkeypatch.chdir(tmp_path)
    assert demo._command("demo") == ".venv/bin/s2s-scale demo"
