"""The table of options against the dataclasses that it describes."""

from __future__ import annotations

import dataclasses
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
from s2s_scale.settings.options import Option, data_options, model_options, training_options
from s2s_scale.settings.parsing import from_words

TABLE = {entry.name: entry for entry in training_options()}
THEIRS = {entry.name: entry for entry in dataclasses.fields(transformers.Seq2SeqTrainingArguments)}
EXTRAS = {entry.name for entry in dataclasses.fields(TrainingExtras)}


def test_every_field_of_transformers_is_an_option():
    assert len(THEIRS) > 100
    assert set(TABLE) == (set(THEIRS) | EXTRAS) - set(options.PYTHON_ONLY)
    assert set(options.PYTHON_ONLY) <= set(THEIRS)


def test_every_option_can_be_given_to_our_training_arguments():
    accepted = {entry.name for entry in dataclasses.fields(Seq2SeqTrainingArguments) if entry.init}
    assert set(TABLE) <= accepted
    assert accepted <= set(TABLE) | set(options.PYTHON_ONLY)


@pytest.mark.parametrize("name", sorted(set(THEIRS) - set(options.PYTHON_ONLY)))
def test_defaults_are_those_of_the_real_class(name):
    real = THEIRS[name]
    if real.default_factory is not dataclasses.MISSING:
        expected = real.default_factory()
    else:
        expected = real.default
    if isinstance(expected, Enum):
        expected = expected.value
    assert TABLE[name].default == expected


@pytest.mark.parametrize("name", sorted(set(THEIRS) - set(options.PYTHON_ONLY)))
def test_kinds_accept_the_default(name):
    """Each default, written out, is read back as itself: the kind is not too narrow."""
    entry = TABLE[name]
    if entry.default in (None, []) or entry.default == "":
        assert entry.optional or entry.default is not None
        return
    read = from_words(entry, [str(entry.default)])
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


def test_groups_come_from_section_comments():
    assert TABLE["learning_rate"].group == "learning rate"
    assert TABLE["adam_beta1"].group == "optimizer"
    assert TABLE["hub_token"].group == "hub integration"
    assert TABLE["generation_num_beams"].group == "generation"
    assert TABLE["batching"].group == TABLE["sortish_sampler"].group == "batching"
    assert all(entry.group and entry.help for entry in TABLE.values())


@pytest.mark.parametrize(
    ("cls", "table"), [(ModelArguments, model_options()), (DataArguments, data_options())]
)
def test_our_dataclasses(cls, table):
    instance = cls()
    fields = dataclasses.fields(cls)
    assert fields
    assert [entry.name for entry in table] == [entry.name for entry in fields]
    for entry, real in zip(table, fields, strict=True):
        assert entry.default == getattr(instance, real.name)
        assert entry.help == real.metadata["help"]
        assert entry.optional == ("None" in str(real.type))


def test_names_of_the_three_tables_differ():
    names = [entry.name for entry in (*model_options(), *data_options(), *training_options())]
    assert len(names) == len(set(names))


def test_a_redeclared_name_keeps_one_entry(tmp_path, monkeypatch):
    """Ours wins over transformers', and a name given in both of theirs is there once."""
    (tmp_path / "trainer_utils.py").write_text("")
    (tmp_path / "training_args.py").write_text(
        "class TrainingArguments:\n"
        "    # --- Output ---\n"
        "    dropout: float = field(default=0.5, metadata={'help': 'theirs'})\n"
        "    both: int = field(default=1, metadata={'help': 'first'})\n"
    )
    (tmp_path / "training_args_seq2seq.py").write_text(
        "class Seq2SeqTrainingArguments(TrainingArguments):\n"
        "    both: Optional[int] = field(default=None, metadata={'help': '100%% sure'})\n"
    )
    monkeypatch.setattr(options, "transformers_folder", lambda: tmp_path)
    table = options.training_options.__wrapped__()
    by_name = {entry.name: entry for entry in table}
    assert len(by_name) == len(table) == len(EXTRAS) + 1
    assert by_name["dropout"].default is None
    assert by_name["both"] == Option("both", "int", None, "100% sure", "generation", optional=True)


def test_transformers_missing(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(UserError, match="pip install transformers"):
        options.transformers_folder()


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
    entry = options.option("either", "int|bool", 1, "group", "Help.")
    assert from_words(entry, ["3"]) == 3
    assert from_words(entry, ["true"]) is True
    with pytest.raises(UserError, match="expected a whole number or true or false, got 'x'"):
        from_words(entry, ["x"])
