"""The table of options against the dataclasses that it describes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from enum import Enum
from pathlib import Path

import pytest
import transformers
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames, trainer_log_levels

from s2s_scale.arguments import Seq2SeqTrainingArguments
from s2s_scale.config import SCHEDULES, DataArguments, ModelArguments, TrainingExtras
from s2s_scale.errors import UserError
from s2s_scale.settings import options
from s2s_scale.settings.commands import GenerateOptions, LaunchOptions
from s2s_scale.settings.options import (
    GROUPS,
    Option,
    options_of,
    training_options,
    transformers_table,
)
from s2s_scale.settings.parsing import convert
from s2s_scale.settings.transformers_options import PYTHON_ONLY, read_fields

TABLE = {entry.name: entry for entry in training_options()}
THEIRS = {entry.name: entry for entry in dataclasses.fields(transformers.Seq2SeqTrainingArguments)}
EXTRAS = {entry.name for entry in dataclasses.fields(TrainingExtras)}


def test_every_field_of_transformers_is_an_option():
    assert len(THEIRS) > 100
    assert set(TABLE) == (set(THEIRS) | EXTRAS) - set(PYTHON_ONLY)
    assert set(PYTHON_ONLY) <= set(THEIRS)


def test_every_option_can_be_given_to_our_training_arguments():
    accepted = {entry.name for entry in dataclasses.fields(Seq2SeqTrainingArguments) if entry.init}
    assert set(TABLE) <= accepted
    assert accepted <= set(TABLE) | set(PYTHON_ONLY)


@pytest.mark.parametrize("name", sorted(set(THEIRS) - set(PYTHON_ONLY)))
def test_defaults_are_those_of_the_real_class(name):
    real = THEIRS[name]
    if real.default_factory is not dataclasses.MISSING:
        expected = real.default_factory()
    else:
        expected = real.default
    if isinstance(expected, Enum):
        expected = expected.value
    assert TABLE[name].default == expected


@pytest.mark.parametrize("name", sorted(set(THEIRS) - set(PYTHON_ONLY)))
def test_kinds_accept_the_default(name):
    """Each default, written out, is read back as itself: the kind is not too narrow."""
    entry = TABLE[name]
    if entry.default in (None, []) or entry.default == "":
        assert entry.optional or entry.default is not None
        return
    read = convert(entry, str(entry.default))
    # include_num_input_tokens_seen takes the word 'no' and the boolean that means the same.
    assert read == entry.default or (name, read) == ("include_num_input_tokens_seen", False)
    assert type(read) is type(entry.default) or isinstance(read, float | bool)


@pytest.mark.parametrize(
    ("name", "enum"),
    [
        ("optim", OptimizerNames),
        ("eval_strategy", IntervalStrategy),
        ("logging_strategy", IntervalStrategy),
        ("save_strategy", SaveStrategy),
        ("hub_strategy", HubStrategy),
    ],
)
def test_choices_of_enums(name, enum):
    assert set(TABLE[name].choices) == {member.value for member in enum}


def test_choices_that_are_made_at_run_time():
    assert set(TABLE["log_level"].choices) == set(trainer_log_levels)
    schedules = {member.value for member in SchedulerType}
    assert set(TABLE["lr_scheduler_type"].choices) == schedules | set(SCHEDULES)


def test_the_table_is_current():
    """After an upgrade: python -m s2s_scale.settings.transformers_options --write."""
    path = Path(options.__file__).with_name(f"transformers-{transformers.__version__}.json")
    table = json.loads(path.read_text(encoding="utf-8"))
    assert table == json.loads(json.dumps(read_fields()))


def test_a_version_without_a_table_is_asked_itself():
    assert transformers_table("0.0.0") == transformers_table(transformers.__version__)


def test_a_transformers_that_cannot_be_imported(tmp_path, monkeypatch):
    (tmp_path / "transformers.py").write_text("raise ImportError('no such symbol')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match=r"transformers 0.0.0: cannot be imported: .*no such sym"):
        transformers_table("0.0.0")


def test_groups():
    assert TABLE["learning_rate"].group == "learning rate"
    assert TABLE["adam_beta1"].group == "optimizer"
    assert TABLE["hub_token"].group == "hub integration"
    assert TABLE["generation_num_beams"].group == "generation"
    assert TABLE["batching"].group == TABLE["sortish_sampler"].group == "batching"
    assert all(entry.group and entry.help for entry in TABLE.values())
    assert "other" not in {entry.group for entry in TABLE.values()}
    assert set(GROUPS) <= {entry.group for entry in TABLE.values()}


@pytest.mark.parametrize(
    "cls", [ModelArguments, DataArguments, TrainingExtras, LaunchOptions, GenerateOptions]
)
def test_our_dataclasses(cls):
    table = options_of(cls)
    instance = cls()
    fields = dataclasses.fields(cls)
    assert fields
    assert [entry.name for entry in table] == [entry.name for entry in fields]
    for entry, real in zip(table, fields, strict=True):
        assert entry.default == getattr(instance, real.name)
        assert entry.help == real.metadata["help"]
        # Not ``real.type``, which transformers' HfArgumentParser narrows in other tests.
        annotations = [base.__annotations__ for base in cls.__mro__[:-1]]
        (annotation,) = [found[real.name] for found in annotations if real.name in found]
        assert entry.optional == ("None" in str(annotation))


def test_names_of_the_three_tables_differ():
    ours = (*options_of(ModelArguments), *options_of(DataArguments))
    names = [entry.name for entry in (*ours, *training_options())]
    assert len(names) == len(set(names))


def test_a_redeclared_name_keeps_one_entry(monkeypatch):
    """Ours wins over transformers', and what no group names is in the last one."""
    theirs = {"type": "float", "default": 0.5, "choices": None, "optional": False, "const": None}
    fields = [{**theirs, "name": name, "help": "theirs"} for name in ("dropout", "quite_new")]
    monkeypatch.setattr(options, "transformers_table", lambda version: fields)
    table = options.training_options.__wrapped__()
    by_name = {entry.name: entry for entry in table}
    assert len(by_name) == len(table) == len(EXTRAS) + 1
    assert by_name["dropout"].default is None
    assert by_name["quite_new"] == Option("quite_new", "float", 0.5, "theirs", "other")


def test_transformers_missing():
    with pytest.raises(UserError, match="pip install transformers"):
        transformers_table(None)


def test_the_table_is_read_without_importing_what_it_describes():
    code = (
        "import sys; from s2s_scale.settings.options import training_options; "
        "assert len(training_options()) > 100; "
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert done.stdout.strip() == "[]"


def test_a_value_that_fits_none_of_several_kinds():
    entry = Option("either", "int|bool", 1, "Help.", "group")
    assert convert(entry, "3") == 3
    assert convert(entry, "true") is True
    with pytest.raises(UserError, match="expected a whole number or true or false, got 'x'"):
        convert(entry, "x")


def test_every_wrong_item_of_a_list_is_named():
    (metrics,) = (entry for entry in options_of(DataArguments) if entry.name == "metrics")
    with pytest.raises(UserError) as caught:
        convert(metrics, ["blue", "chrf", "rogue"])
    assert [problem.partition("got ")[2] for problem in caught.value.problems] == [
        "'blue' (did you mean 'bleu'?)",
        "'rogue' (did you mean 'rouge'?)",
    ]
