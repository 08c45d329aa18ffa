"""Old and modern names of the same setting, and values that are refused."""

import dataclasses

import pytest
import transformers

from s2s_scale import Seq2SeqTrainingArguments
from s2s_scale.errors import UserError


def make(tmp_path, **values):
    return Seq2SeqTrainingArguments(output_dir=str(tmp_path), **values)


def test_defaults_are_those_of_transformers(tmp_path):
    ours = make(tmp_path)
    theirs = transformers.Seq2SeqTrainingArguments(output_dir=str(tmp_path))
    differing = {
        f.name
        for f in dataclasses.fields(theirs)
        if f.init and getattr(ours, f.name) != getattr(theirs, f.name)
    }
    assert differing <= {"logging_dir"}
    assert len(dataclasses.fields(theirs)) > 100


@pytest.mark.parametrize(
    ("old", "modern"),
    [
        ({"label_smoothing": 0.1}, {"label_smoothing_factor": 0.1}),
        ({"lr_scheduler": "cosine"}, {"lr_scheduler_type": "cosine"}),
        ({"lr_scheduler": "constant_w_warmup"}, {"lr_scheduler_type": "constant_with_warmup"}),
        ({"lr_scheduler": "cosine_w_restarts"}, {"lr_scheduler_type": "cosine_with_restarts"}),
        ({"adafactor": True}, {"optim": "adafactor"}),
        ({"sortish_sampler": True}, {"batching": "sortish"}),
        ({"sortish_sampler": True}, {"train_sampling_strategy": "group_by_length"}),
    ],
)
def test_old_and_modern_name_mean_the_same(tmp_path, old, modern):
    by_old, by_modern, by_both = (
        make(tmp_path, **old),
        make(tmp_path, **modern),
        make(tmp_path, **old, **modern),
    )
    for name in ("label_smoothing", "label_smoothing_factor", "lr_scheduler", "adafactor"):
        assert getattr(by_old, name) == getattr(by_modern, name) == getattr(by_both, name)
    for name in ("optim", "lr_scheduler_type", "batching", "sortish_sampler", "schedule_name"):
        assert getattr(by_old, name) == getattr(by_modern, name) == getattr(by_both, name)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"label_smoothing": 0.1, "label_smoothing_factor": 0.2}, ("0.1", "0.2")),
        ({"label_smoothing": 0.1, "label_smoothing_factor": 0.0}, ("label_smoothing_factor=0.0",)),
        ({"lr_scheduler": "cosine", "lr_scheduler_type": "linear"}, ("cosine", "linear")),
        ({"adafactor": True, "optim": "adamw_torch"}, ("adafactor", "adamw_torch")),
        ({"sortish_sampler": True, "batching": "fixed"}, ("sortish_sampler", "fixed")),
        (
            {"batching": "sortish", "train_sampling_strategy": "sequential"},
            ("sequential", "sortish"),
        ),
    ],
)
def test_contradicting_twins_are_an_error_that_names_both(tmp_path, values, names):
    with pytest.raises(UserError) as caught:
        make(tmp_path, **values)
    assert all(name in str(caught.value) for name in (*names, *values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr_scheduler": "cosin"}, "unknown learning-rate schedule 'cosin' (did you mean"),
        ({"optim": "adamw_torhc"}, "unknown optimizer 'adamw_torhc'"),
        ({"batching": "sorted"}, "unknown batching 'sorted'"),
        ({"loss_reduction": "average"}, "unknown loss_reduction"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"dropout": 1.5}, "dropout=1.5"),
        ({"max_nonfinite_steps": 0}, "max_nonfinite_steps=0"),
        ({"fault_timeout_seconds": -1}, "fault_timeout_seconds=-1: expected at least 0"),
        ({"lr_power": 2.0}, "lr_power=2.0: has no effect on the schedule 'linear'"),
        (
            {
                "lr_scheduler": "cosine",
                "lr_num_cycles": 2,
                "lr_scheduler_kwargs": {"num_cycles": 1},
            },
            "give only one of the two",
        ),
        ({"lr_scheduler": "constant", "warmup_steps": 5}, "constant_w_warmup"),
        ({"average_tokens_across_devices": False}, "has no effect"),
    ],
)
def test_bad_values_are_refused_with_the_remedy(tmp_path, values, message):
    with pytest.raises(UserError) as caught:
        make(tmp_path, **values)
    assert message in str(caught.value)


def test_all_problems_are_reported_together(tmp_path):
    with pytest.raises(UserError) as caught:
        make(tmp_path, label_smoothing=2.0, lr_scheduler="x", dropout=-1.0)
    assert len(caught.value.problems) == 3


def test_a_copy_with_a_change_is_accepted(tmp_path):
    args = make(tmp_path, label_smoothing=0.1, lr_scheduler="polynomial", lr_power=2.0)
    copy = dataclasses.replace(args, learning_rate=1e-3)
    assert copy.label_smoothing_factor == 0.1 and copy.schedule_options == {"power": 2.0}


def test_arguments_of_transformers_are_taken_over(tmp_path):
    theirs = transformers.Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), label_smoothing_factor=0.1, optim="adafactor", max_steps=7
    )
    ours = Seq2SeqTrainingArguments.from_transformers(theirs)
    assert (ours.label_smoothing, ours.adafactor, ours.max_steps) == (0.1, True, 7)


def test_a_schedule_that_only_transformers_has_is_left_to_it(tmp_path):
    args = make(tmp_path, lr_scheduler_type="inverse_sqrt", warmup_steps=3)
    assert args.schedule_name is None and args.lr_scheduler_type == "inverse_sqrt"
