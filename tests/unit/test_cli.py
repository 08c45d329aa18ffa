"""The command line: values, precedence, help, exit codes, and every mistake's message."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import s2s_scale
from s2s_scale import cli
from s2s_scale.config import DataArguments, ModelArguments
from s2s_scale.errors import UserError
from s2s_scale.settings import profiles, split_settings
from s2s_scale.settings.commands import GenerateOptions, LaunchOptions, all_commands

ROOT = Path(__file__).parents[2]
RUN = ["--model", "m", "--data_dir", "d", "--output_dir", "o"]


@pytest.fixture(autouse=True)
def cpu_machine(tmp_path, monkeypatch):
    """A folder of its own, no user profiles, no CUDA; what a profile exports is undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(profiles, "cuda_is_here", lambda: False)
    monkeypatch.setattr(os, "environ", os.environ.copy())


@pytest.fixture
def calls(monkeypatch):
    """Stand-ins for the runner and the demo; holds (function's name, settings) of each call."""
    made = []

    def recorder(name):
        def record(settings):
            made.append((name, settings))
            return 0

        return record

    for module, names in (
        ("runner.train", ("train", "evaluate")),
        ("runner.generate", ("generate",)),
        ("runner.plan", ("plan", "new_model")),
        ("demo", ("run",)),
    ):
        stand_in = types.ModuleType(f"s2s_scale.{module}")
        for name in names:
            setattr(stand_in, name, recorder(name))
        monkeypatch.setitem(sys.modules, f"s2s_scale.{module}", stand_in)
        if module == "demo":
            monkeypatch.setattr(s2s_scale, module, stand_in, raising=False)
    return made


@pytest.fixture
def train(calls):
    """Run ``train`` with the required flags and these; returns its settings."""

    def run(*words):
        assert cli.main(["train", *RUN, *words]) == 0
        return calls[-1][1]

    return run


@pytest.fixture
def fails(capsys, calls):
    """Run a command line that must end with exit code 2; returns its error lines."""

    def run(*words):
        assert cli.main(list(words)) == 2
        assert calls == []
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        lines = err.splitlines()
        assert lines
        assert all(line.startswith("error: ") for line in lines)
        return [line.removeprefix("error: ") for line in lines]

    return run


def conf(text, name="conf.yaml"):
    Path(name).write_text(text)
    return name


# --- values ---


def test_train_gets_typed_values_and_origins(train):
    settings = train("--learning_rate", "3e-4", "--max-steps=7", "--metrics", "bleu", "chrf")
    assert settings.command == "train"
    assert settings.values == {
        "model_name_or_path": "m",
        "data_dir": "d",
        "output_dir": "o",
        "learning_rate": 3e-4,
        "max_steps": 7,
        "metrics": ["bleu", "chrf"],
        "use_cpu": True,
    }
    assert settings.origins["max_steps"] == "command line"
    assert settings.origins["use_cpu"] == "profile cpu"
    assert settings.profile.name == "cpu"
    assert settings.launch == LaunchOptions() and settings.dry_run is False
    assert settings.get("max_steps") == 7
    assert settings.get("no_such", 3) == 3


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--bf16"], "bf16", True),
        (["--bf16", "false"], "bf16", False),
        (["--bf16=True"], "bf16", True),
        (["--no_bf16"], "bf16", False),
        (["--no-dataloader-pin-memory"], "dataloader_pin_memory", False),
        (["--gradient_checkpointing"], "gradient_checkpointing", True),
        (["--n_train", "-1"], "n_train", -1),
        (["--learning_rate", "-1e-3"], "learning_rate", -1e-3),
        (["--max_grad_norm", "1"], "max_grad_norm", 1.0),
        (["--source_prefix", "to German: "], "source_prefix", "to German: "),
        (["--source_prefix=--x"], "source_prefix", "--x"),
        (["--source_prefix="], "source_prefix", ""),
        (["--report_to", "none"], "report_to", "none"),
        (["--report_to", "wandb", "tensorboard"], "report_to", ["wandb", "tensorboard"]),
        (["--label_names", "labels"], "label_names", ["labels"]),
        (["--eval_steps", "none"], "eval_steps", None),
        (["--fsdp"], "fsdp", True),
        (["--fsdp", "full_shard"], "fsdp", "full_shard"),
        (["--lr_scheduler_kwargs", '{"power": 2}'], "lr_scheduler_kwargs", {"power": 2}),
        (["--include_num_input_tokens_seen", "all"], "include_num_input_tokens_seen", "all"),
        (["--include_num_input_tokens_seen"], "include_num_input_tokens_seen", True),
        (["--max_steps", "3", "--max-steps", "3"], "max_steps", 3),
        (["--eval_strategy", "no"], "eval_strategy", "no"),
        (["--optim", "adafactor"], "optim", "adafactor"),
    ],
)
def test_flag_forms(train, words, name, value):
    given = train(*words).values[name]
    assert given == value
    assert type(given) is type(value)


def test_a_dict_may_be_a_json_file(train):
    Path("k.json").write_text('{"power": 2}')
    assert train("--lr_scheduler_kwargs", "k.json").values["lr_scheduler_kwargs"] == {"power": 2}


def test_a_boolean_flag_before_the_settings_file(calls):
    conf("max_steps: 3\n")
    assert cli.main(["train", "--bf16", "conf.yaml", *RUN]) == 0
    assert calls[0][1].values["bf16"] is True
    assert calls[0][1].values["max_steps"] == 3


# --- settings file ---


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("learning_rate: 3e-4", "learning_rate", 3e-4),
        ("learning_rate: 3.e-4", "learning_rate", 3e-4),
        ("learning-rate: 1", "learning_rate", 1.0),
        ("eval_strategy: no", "eval_strategy", "no"),
        ("bf16: yes", "bf16", True),
        ("source_prefix: 12", "source_prefix", "12"),
        ("src_lang: no", "src_lang", "no"),
        ("eval_steps: null", "eval_steps", None),
        ("metrics: [bleu, chrf]", "metrics", ["bleu", "chrf"]),
        ("metrics: bleu", "metrics", ["bleu"]),
        ("report_to: [wandb]", "report_to", ["wandb"]),
        ("debug: [a, b]", "debug", ["a", "b"]),
        ("lr_scheduler_kwargs: {lr_end: 1e-7, n: 2, s: x, q: '1e3', b: true, l: [1]}", "", {}),
        ("model: other", "model_name_or_path", "m"),
    ],
)
def test_values_in_a_file(train, line, name, value):
    settings = train(conf(line + "\n"))
    if name:
        assert settings.values[name] == value
        assert type(settings.values[name]) is type(value)
    else:
        expected = {"lr_end": 1e-7, "n": 2, "s": "x", "q": "1e3", "b": True, "l": [1]}
        assert settings.values["lr_scheduler_kwargs"] == expected


def test_flags_win_over_file_over_profile_over_defaults(calls):
    folder = Path("launchers/profiles")
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(
        "extends: cpu\narguments: {max_steps: 1, seed: 1, warmup_steps: 1}\n"
    )
    conf("profile: mine\n\nmax_steps: 2\nseed: 2\n")
    assert cli.main(["train", "conf.yaml", *RUN, "--max_steps", "3"]) == 0
    settings = calls[0][1]
    assert {name: settings.values[name] for name in ("max_steps", "seed", "warmup_steps")} == {
        "max_steps": 3,
        "seed": 2,
        "warmup_steps": 1.0,
    }
    assert settings.origins["max_steps"] == "command line"
    assert settings.origins["seed"] == "conf.yaml:4"
    assert settings.origins["warmup_steps"] == "profile mine"
    assert "learning_rate" not in settings.values
    assert "profile" not in settings.values
    assert settings.profile.name == "mine"


def test_a_profile_on_the_command_line_wins_over_the_files(calls):
    conf("profile: nowhere\n")
    assert cli.main(["train", "conf.yaml", *RUN, "--profile", "cpu"]) == 0
    assert calls[0][1].profile.name == "cpu"


def test_an_empty_file_is_no_settings(train):
    assert "max_steps" not in train(conf("# nothing yet\n")).values


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "\nlerning_rate: 1\n",
            "conf.yaml:2: unknown setting 'lerning_rate' (did you mean 'learning_rate'?)",
        ),
        ("max_steps: ten\n", "conf.yaml:1: max_steps: expected a whole number, got 'ten'"),
        ("max_steps: 1.5\n", "conf.yaml:1: max_steps: expected a whole number, got '1.5'"),
        ("max_steps:\n", "conf.yaml:1: max_steps: expected a whole number, got nothing"),
        ("max_steps: [1]\n", "conf.yaml:1: max_steps: expected a whole number, got a list"),
        ("seed: {a: 1}\n", "conf.yaml:1: seed: expected a whole number, got a mapping"),
        ("metrics: [[bleu]]\n", "conf.yaml:1: metrics: expected one of: bleu"),
        ("metrics: [blue]\n", "got 'blue' (did you mean 'bleu'?)"),
        ("bf16: perhaps\n", "conf.yaml:1: bf16: expected true or false, got 'perhaps'"),
        (
            "seed: 1\nseed: 2\n",
            "conf.yaml:2: 'seed' is given twice (first in line 1); keep one",
        ),
        (
            "model: a\nmodel_name_or_path: b\n",
            "conf.yaml:2: model_name_or_path: given twice, as 'a' (model) and 'b'; keep one",
        ),
        ("seed: 1\nmax_steps: [\n", "conf.yaml:3: not valid YAML"),
        ("seed: 1\n\tmax_steps: 2\n", "conf.yaml:2: not valid YAML"),
        ("seed: \x00\n", "conf.yaml: not valid YAML"),
        ("- seed\n", "conf.yaml:1: expected 'name: value' lines"),
        ("[a, b]: 1\n", "conf.yaml:1: expected a name before the colon"),
        ("lr_scheduler_kwargs: {a: 1, a: 2}\n", "conf.yaml:1: lr_scheduler_kwargs: 'a' is given"),
        ("num_beams: 4\n", "conf.yaml:1: 'num_beams' is not a setting of train, but of generate"),
        ("profile: gpuu\n", "conf.yaml:1: unknown profile 'gpuu' (did you mean 'gpu'?)"),
        ("max_target_length: 0\n", "max_target_length=0: expected a whole number of at least 1"),
    ],
)
def test_mistakes_in_a_file(fails, text, expected):
    (line,) = fails("train", conf(text), *RUN)
    assert expected in line


def test_files_that_cannot_be_read(fails):
    assert fails("train", "none.yaml", *RUN) == [
        "none.yaml: does not exist; expected a YAML file with 'name: value' lines"
    ]
    Path("folder.yaml").mkdir()
    assert "folder.yaml: is a folder" in fails("train", "folder.yaml", *RUN)[0]
    Path("latin.yaml").write_bytes(b"source_prefix: \xe9\n")
    assert "latin.yaml: not UTF-8 (byte 15)" in fails("train", "latin.yaml", *RUN)[0]


# --- mistakes on the command line ---


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--lerning_rate", "3"],
            "unknown option '--lerning_rate' (did you mean '--learning_rate'?)",
        ),
        (["--max_step", "3"], "unknown option '--max_step' (did you mean '--max_steps'?)"),
        (["--qqqq"], "unknown option '--qqqq'; s2s-scale train --help lists them"),
        (["--max_steps", "ten"], "--max_steps: expected a whole number, got 'ten'"),
        (["--max-steps=1e3"], "--max-steps: expected a whole number, got '1e3'"),
        (["--max_steps"], "--max_steps: expected a whole number, got nothing"),
        (["--max_steps="], "--max_steps: expected a whole number, got ''"),
        (["--learning_rate", "nan"], "--learning_rate: expected a number, got 'nan'"),
        (["--bf16", "maybe"], "--bf16: expected true or false, got 'maybe'"),
        (["--metrics", "bleu", "blue"], "got 'blue' (did you mean 'bleu'?)"),
        (["--lr_scheduler", "cosin"], "--lr_scheduler: expected one of: linear, cosine, "),
        (["--lr_scheduler_type", "x"], "--lr_scheduler_type: expected one of: linear, "),
        (["--seed", "1", "--seed", "2"], "--seed: given twice, as 1 (--seed) and 2; keep one"),
        (["--model_name_or_path", "n"], "given twice, as 'm' (--model) and 'n'"),
        (["--bf16", "--no_bf16"], "--no_bf16: given twice, as True (--bf16) and False"),
        (["--no_seed"], "unknown option '--no_seed'"),
        (["stray"], "stray: does not exist; expected a YAML file"),
        (["--profile", "cpuu"], "unknown profile 'cpuu' (did you mean 'cpu'?)"),
        (["--profile", "gpu"], "profile 'gpu': is for device cuda, and no usable CUDA device"),
        (["--max_target_length", "0"], "max_target_length=0: expected a whole number"),
        (["--lr_scheduler_kwargs", "x.json"], "expected a JSON object or the path of a JSON file"),
        (["--lr_scheduler_kwargs", '{"a"'], "column 5: not valid JSON"),
        (["--num_beams", "4"], "'--num_beams' is not an option of train, but of generate"),
        (["--parallelism_config", "x"], "unknown option '--parallelism_config'"),
        (["--"], "unknown option '--'"),
    ],
)
def test_mistakes_on_the_command_line(fails, words, expected):
    (line,) = fails("train", *RUN, *words)
    assert expected in line


def test_json_files_with_mistakes(fails):
    Path("a.json").write_text('{\n"a": }')
    Path("b.json").write_text("[1]")
    (line,) = fails("train", *RUN, "--lr_scheduler_kwargs", "a.json")
    assert "a.json:2: not valid JSON" in line
    (line,) = fails("train", *RUN, "--lr_scheduler_kwargs", "b.json")
    assert "expected a JSON object, got list" in line


def test_a_second_settings_file(fails):
    conf("seed: 1\n")
    assert fails("train", "conf.yaml", "other.yaml", *RUN) == [
        "unexpected 'other.yaml': train takes one FILE, and that is 'conf.yaml'"
    ]


def test_all_problems_come_together(fails):
    conf("sede: 1\nmax_steps: x\n")
    words = ["--lerning_rate", "3", "--output_dir", "o", "--bf16", "2", "--n_val", "0"]
    lines = fails("train", "conf.yaml", *words, "--profile", "cpuu")
    expected = (
        "--lerning_rate",
        "--bf16",
        "conf.yaml:1: unknown setting 'sede'",
        "conf.yaml:2: max_steps",
        "unknown profile 'cpuu'",
        "--model_name_or_path: missing; expected text",
        "no data: expected --data_dir or --train_file or --dataset_name",
        "n_val=0",
    )
    assert len(lines) == len(expected)
    for part, line in zip(expected, lines, strict=True):
        assert part in line


def test_a_required_option_with_a_wrong_value_is_not_missing_too(fails):
    lines = fails("new-model", "--architecture", "brat", "--data_dir", "d", "--output_dir", "o")
    assert len(lines) == 1
    assert "got 'brat' (did you mean 'bart'?)" in lines[0]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian"], "unknown command 'trian' (did you mean 'train'?); expected one of: train, "),
        (["--model", "m", "train"], "'--model' comes before the command; expected one of: train"),
        (["demo", "x"], "unexpected 'x': expected a flag such as --output_dir"),
        (["demo", "--epochs", "2"], "unknown option '--epochs'"),
        (["profiles", "a", "b"], "unexpected 'b': profiles takes one NAME, and that is 'a'"),
        (["evaluate", "--model", "m", "--data_dir", "d", "--split", "dev"], "one of: val, test"),
        (
            ["evaluate", "--model", "m", "--data_dir", "d", "--train_file", "f"],
            "'--train_file' is not an option of evaluate, but of train",
        ),
        (["evaluate", "--model", "m"], "no data: expected --data_dir or --test_file or "),
        (["evaluate", "--model", "m", "--split", "val"], "--data_dir or --validation_file or "),
        (["evaluate", "--model", "m", "--data_dir", "d", "--learning_rate", "1"], "of train"),
        (["generate"], "--model_name_or_path: missing"),
        (["generate", "--model", "m", "--input", "f"], "--input: file 'f' does not exist"),
        (["generate", "--model", "m", "--search", "num_beams=2"], "without --reference"),
        (["generate", "--model", "m", "--metrics", "bleu"], "without --reference"),
        (["generate", "--model", "m", "--top_p", "0.5"], "without --do_sample"),
        (["generate", "--model", "m", "--batch_size", "0"], "--batch_size: expected a whole"),
        (
            ["generate", "--model", "m", "--num_return_sequences", "3", "--num_beams", "2"],
            "--num_return_sequences: 3 is more than --num_beams 2",
        ),
        (
            ["new-model", "--architecture", "mbart", "--data_dir", "d", "--output_dir", "o"],
            "--architecture mbart: needs --src_lang and --tgt_lang",
        ),
        (["new-model", "--architecture", "t5", "--output_dir", "o"], "no data: expected"),
        (["plan", "--model", "m", "--data_dir", "d", "--world_size", "0"], "--world_size: exp"),
    ],
)
def test_mistakes_of_other_commands(fails, words, expected):
    (line,) = fails(*words)
    assert expected in line


def test_an_output_file_is_not_replaced_unasked(fails, calls):
    Path("out.txt").write_text("kept")
    words = ["generate", "--model", "m", "--output", "out.txt"]
    assert fails(*words) == ["--output: 'out.txt' exists; give another name or --overwrite"]
    assert cli.main([*words, "--overwrite"]) == 0
    assert Path("out.txt").read_text() == "kept"
    assert calls[0][1].options.overwrite is True


# --- commands ---


@pytest.mark.parametrize(
    ("words", "function", "own"),
    [
        (["evaluate", "--model", "m", "--data_dir", "d"], "evaluate", {"split": "test"}),
        (["generate", "--model", "m", "--num_beams", "4"], "generate", {"num_beams": 4}),
        (["plan", "--model", "m", "--data_dir", "d"], "plan", {"world_size": 1, "epoch": 0}),
        (
            ["new-model", "--architecture", "t5", "--data_dir", "d", "--output_dir", "o"],
            "new_model",
            {"architecture": "t5", "size": "small", "output_dir": "o", "seed": 0},
        ),
        (
            ["new_model", "--architecture", "t5", "--dataset_name", "d", "--output_dir", "o"],
            "new_model",
            {"overwrite": False},
        ),
        (["demo"], "run", {"output_dir": "runs/demo", "overwrite": False}),
    ],
)
def test_each_command_calls_its_function(calls, words, function, own):
    assert cli.main(words) == 0
    ((name, settings),) = calls
    assert name == function
    assert own.items() <= vars(settings.options).items()
    assert not set(vars(settings.options)) & set(settings.values)


def test_generate_has_profile_and_settings_of_dataclasses(calls):
    words = ["generate", "--model", "m", "--src_lang", "en", "--seed", "3", "--do_sample"]
    assert cli.main(words) == 0
    settings = calls[0][1]
    expected = {"model_name_or_path": "m", "src_lang": "en", "seed": 3, "use_cpu": True}
    assert settings.values == expected
    assert settings.options == GenerateOptions(do_sample=True)
    assert settings.profile.name == "cpu"


def test_a_profiles_arguments_that_a_command_lacks_are_left_out(calls):
    Path("p.yaml").write_text("extends: cpu\narguments: {learning_rate: 1, bf16: true}\n")
    words = ["evaluate", "--model", "m", "--data_dir", "d", "--profile", "./p.yaml"]
    assert cli.main(words) == 0
    assert calls[0][1].values["bf16"] is True
    assert "learning_rate" not in calls[0][1].values


def test_the_profiles_environment_is_there_before_the_runner(calls, monkeypatch):
    seen = {}
    train = sys.modules["s2s_scale.runner.train"].train
    monkeypatch.setattr(
        sys.modules["s2s_scale.runner.train"],
        "train",
        lambda settings: seen.update(os.environ) or train(settings),
    )
    os.environ["CUDA_VISIBLE_DEVICES"] = "5"
    assert cli.main(["train", *RUN]) == 0
    assert seen["CUDA_VISIBLE_DEVICES"] == ""
    assert seen["USE_TORCH_XLA"] == "0"


def test_use_cpu_takes_the_cpu_profile_where_cuda_is(calls, monkeypatch):
    monkeypatch.setattr(profiles, "cuda_is_here", lambda: True)
    assert cli.main(["train", *RUN]) == 0
    assert cli.main(["train", *RUN, "--use_cpu"]) == 0
    assert [settings.profile.name for _, settings in calls] == ["gpu", "cpu"]


@pytest.mark.parametrize("flag", [["--dry_run"], ["--dry-run", "true"], ["--dry_run=true"]])
def test_dry_run_starts_nothing(calls, capsys, flag):
    before = dict(os.environ)
    assert cli.main(["train", *RUN, *flag, "--profile", "gpu"]) == 0
    assert calls == []
    assert dict(os.environ) == before
    out = capsys.readouterr().out
    command = " ".join([sys.executable, "-m", "s2s_scale", "train", *RUN, "--profile", "gpu"])
    assert out.splitlines()[1] == f"  {command}"
    assert "CUDA_VISIBLE_DEVICES=0" in out
    assert "cuda:0" in out


def test_names_picked_from_the_shared_options_exist():
    picking = [command for command in all_commands().values() if command.shared]
    assert {command.name for command in picking} == {"evaluate", "generate", "new-model", "plan"}
    for command in all_commands().values():
        known = {entry.name for entry in command.options()}
        assert set(command.shared or ()) <= known
        assert set(command.changes) <= known


def test_no_command_has_a_name_twice_and_own_options_are_among_all():
    for command in all_commands().values():
        names = [n for entry in command.options() for n in (entry.name, *entry.aliases)]
        assert len(names) == len(set(names)), command.name
        assert {entry.name for entry in command.own_options()} <= set(names)


def test_split_settings():
    values = {"data_dir": "d", "model_name_or_path": "m"}
    model, data = split_settings(values, ModelArguments, DataArguments)
    assert model == {"model_name_or_path": "m"}
    assert data == {"data_dir": "d"}
    with pytest.raises(KeyError, match="learning_rate"):
        split_settings(values | {"learning_rate": 1}, ModelArguments, DataArguments)


# --- ends ---


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("first", "second"), 2, "error: first\nerror: second\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_what_the_runner_raises(calls, monkeypatch, capsys, error, code, message):
    def fail(settings):
        raise error

    monkeypatch.setattr(sys.modules["s2s_scale.runner.train"], "train", fail)
    assert cli.main(["train", *RUN]) == code
    assert capsys.readouterr().err == message


def test_an_error_of_the_program_keeps_its_traceback(calls, monkeypatch):
    def fail(settings):
        raise ZeroDivisionError("a real bug")

    monkeypatch.setattr(sys.modules["s2s_scale.runner.train"], "train", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", *RUN])


def test_the_runners_exit_code_is_the_commands(calls, monkeypatch):
    monkeypatch.setattr(sys.modules["s2s_scale.runner.train"], "train", lambda settings: 130)
    assert cli.main(["train", *RUN]) == 130


# --- help ---


def test_no_words_show_the_help_and_fail(capsys):
    assert cli.main([]) == 2
    assert "usage: s2s-scale COMMAND" in capsys.readouterr().err


def test_overview_is_one_screen_with_every_command(capsys):
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert all(len(line) <= 80 for line in lines)
    for name in "train evaluate generate new-model profiles plan demo".split():
        assert sum(line.startswith(f"  {name} ") for line in lines) == 1


@pytest.mark.parametrize("name", list(all_commands()))
def test_help_of_each_command_lists_each_option_once(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert all(len(line) <= 80 or line.startswith("  s2s-scale ") for line in text.splitlines())
    for entry in all_commands()[name].options():
        starts = (f"  --{entry.name} ", f"  --{entry.name},", f"  --{entry.name}\n")
        assert sum(text.count(f"\n{start}") for start in starts) == 1, entry.name
    assert "%%" not in text


def test_help_of_train_begins_with_our_groups(capsys):
    assert cli.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    heads = [line for line in text.splitlines() if line and line[0].isalpha()]
    ours = ["model", "data", "output", "launch", "training", "batching", "loss", "learning rate"]
    assert [line for line in heads if line in ours] == ours
    assert text.index("\nmodel\n") < text.index("\ngeneration\n") < text.index("\nhub integration")
    assert "[on; --no_dataloader_pin_memory turns it off]" in " ".join(text.split())


def test_help_speaks_of_profiles_only_where_there_are_any(capsys):
    said = {}
    for command in ("train", "plan"):
        assert cli.main([command, "--help"]) == 0
        said[command] = " ".join(capsys.readouterr().out.split())
    assert "the file over the profile, the profile over defaults" in said["train"]
    assert "the file over defaults" in said["plan"]


def test_help_shows_choices_and_defaults(capsys):
    assert cli.main(["evaluate", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--split val|test Which split to evaluate on. [test]" in text
    assert "One of: bleu, chrf, rouge, exact_match. [bleu chrf rouge exact_match]" in text
    assert "--warmup_steps" not in text
    assert "--seed N Random seed that will be set at the beginning of training. [42]" in text
    assert "--label_smoothing_factor X" in text
    assert "[0.0]" in text
    assert "compute --metrics; off: the loss only. [on; --no_predict_with_generate turns" in text


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"s2s-scale {s2s_scale.__version__} (Python 3.")


def test_version_where_a_package_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(cli, "VERSIONS_SHOWN", ("no-such-package",))
    assert cli.main(["--version"]) == 0
    assert "no-such-package not installed)" in capsys.readouterr().out


def python(code, **options):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, **options
    )


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        *([name, "--help"] for name in all_commands()),
        ["profiles"],
        ["train", "--lerning_rate", "1"],
        ["train", *RUN, "--dry_run"],
    ],
)
def test_no_heavy_package_is_imported_before_work_begins(words):
    done = python(
        "import sys; from s2s_scale.cli import main; "
        f"code = main({words!r}); "
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'matplotlib'} & set(sys.modules); "
        "print(); print('HEAVY', sorted(heavy), code, 'rich' in sys.modules)"
    )
    code = 2 if "--lerning_rate" in words else 0
    rich = words == ["profiles"]
    assert done.stdout.splitlines()[-1] == f"HEAVY [] {code} {rich}", done.stderr


def test_module_is_the_console_script():
    done = subprocess.run(
        [sys.executable, "-m", "s2s_scale", "trian"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: unknown command 'trian' (did you mean 'train'?)")


def test_a_reader_that_goes_away_is_no_error():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "s2s_scale", "train", "--help"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 141
