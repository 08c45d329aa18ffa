"""Going on from a checkpoint: exactly where nothing changed, with an error where something did."""

from __future__ import annotations

import shutil

import pytest
import torch

from s2s_scale.checkpoint import verify
from s2s_scale.checkpoint.huggingface import convert
from s2s_scale.checkpoint.portable import PortableCheckpoint, read_json
from s2s_scale.errors import UserError
from s2s_scale.trainer.callbacks import step_seed
from tests.support.adam import assert_same_weights
from tests.support.training import fresh, history, our_trainer, ragged_rows, stock_trainer

ROWS = 20
COMMON = {
    "per_device_train_batch_size": 4,
    "num_train_epochs": 3,
    "save_strategy": "steps",
    "save_steps": 7,
    "batching": "sortish",
    "lr_scheduler": "cosine",
    "warmup_steps": 2,
}


def trained(folder, *, resume=None, family="bart", rows=None, dropout=0.2, callbacks=(), **values):
    model = fresh(family, dropout=dropout)
    data = ragged_rows(model, ROWS) if rows is None else rows
    trainer = our_trainer(model, folder, data, callbacks=list(callbacks), **{**COMMON, **values})
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def same(one, two):
    assert one.keys() == two.keys() and len(one) > 10
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor"])
def test_the_same_settings_go_on_exactly(tmp_path, optim):
    """In the middle of an epoch, with dropout, and with evaluations in between."""
    values = {"optim": optim, "eval_strategy": "steps", "eval_steps": 2}
    values["eval_dataset"] = ragged_rows(fresh("bart"), 6)
    whole = trained(tmp_path / "whole", **values)
    saved = tmp_path / "whole" / "checkpoint-7"
    again = trained(tmp_path / "again", resume=saved, **values)
    assert again.state.global_step == whole.state.global_step == 15
    assert history(again, "loss") == history(whole, "loss")
    assert history(again, "learning_rate") == history(whole, "learning_rate")
    assert same(weights(again), weights(whole))


def test_evaluations_leave_the_trajectory_alone(tmp_path):
    plain = trained(tmp_path / "plain")
    rows = ragged_rows(fresh("bart"), 6)
    evaluated = trained(
        tmp_path / "evaluated", eval_dataset=rows, eval_strategy="steps", eval_steps=1
    )
    assert same(weights(plain), weights(evaluated))


def test_other_micro_batches_take_the_same_steps(tmp_path):
    whole = trained(tmp_path / "whole", dropout=0.0)
    saved = tmp_path / "whole" / "checkpoint-7"
    for size, accumulation in ((2, 2), (1, 4)):
        again = trained(
            tmp_path / f"again-{size}",
            resume=saved,
            dropout=0.0,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        assert history(again, "loss") == pytest.approx(history(whole, "loss"), rel=1e-5)
        for name, weight in weights(whole).items():
            assert_same_weights(weights(again)[name], weight, steps=15 - 7)


def test_a_step_seed_depends_on_each_of_its_parts():
    seeds = {
        step_seed(seed, step=step, rank=rank)
        for seed in (0, 42, 2**63)
        for step in range(50)
        for rank in range(4)
    }
    assert len(seeds) == 600 and max(seeds) < 2**63
    assert step_seed(42, step=7, rank=1) == step_seed(42, step=7, rank=1)


# ---- Changed settings ----


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trained(folder)
    return folder


CHANGES = {
    "seed": ({"seed": 7}, "seed: 7 now, but 42 in "),
    "step_size": (
        {"per_device_train_batch_size": 5},
        "rows per optimizer step: 5 now, but 4 in ",
    ),
    "loss": ({"label_smoothing": 0.1}, "label_smoothing: 0.1 now, but 0.0 in "),
    "optimizer": ({"weight_decay": 0.1}, "weight_decay: 0.1 now, but 0.0 in "),
    "schedule": ({"num_train_epochs": 4}, "training steps of the schedule: 20 now, but 15 in "),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_setting_is_refused_with_both_values_and_the_flag(run, tmp_path, change):
    values, message = CHANGES[change]
    with pytest.raises(UserError) as caught:
        trained(tmp_path, resume=run / "checkpoint-7", **values)
    lines = [line for line in caught.value.problems if message in line]
    assert lines, caught.value.problems
    assert str(run / "checkpoint-7") in lines[0]
    assert f"--accept_changes {change}" in lines[0]
    assert "kept" in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_changed_data_and_all_differences_at_once(run, tmp_path):
    rows = ragged_rows(fresh("bart"), ROWS, seed=5)
    with pytest.raises(UserError) as caught:
        trained(tmp_path, resume=run / "checkpoint-7", rows=rows, seed=1, learning_rate=0.5)
    text = str(caught.value)
    for part in ("digest of the training rows", "seed: 1 now", "learning_rate: 0.5 now"):
        assert part in text
    assert "--accept_changes data seed optimizer" in text


def test_an_accepted_schedule_is_entered_at_the_step(run, tmp_path, capsys):
    again = trained(
        tmp_path / "again",
        resume=run / "checkpoint-7",
        num_train_epochs=4,
        accept_changes=["schedule"],
    )
    fresh_run = trained(tmp_path / "fresh", num_train_epochs=4)
    assert history(again, "learning_rate")[7:] == history(fresh_run, "learning_rate")[7:]
    assert "note: schedule has changed, as accepted: weights, optimizer" in capsys.readouterr().err


def test_another_kind_of_optimizer_starts_without_moments(run, tmp_path):
    again = trained(
        tmp_path,
        resume=run / "checkpoint-7",
        optim="adafactor",
        accept_changes=["optimizer"],
        num_train_epochs=3,
    )
    assert again.state.global_step == 15
    steps = {state["step"] for state in again.optimizer.optimizer.state.values()}
    assert steps == {8}, "counted from the resumed step on"


def test_weights_alone_cannot_be_resumed(tmp_path):
    trained(tmp_path / "one", save_only_model=True)
    folder = tmp_path / "one" / "checkpoint-7"
    assert not list(folder.glob("optimizer*"))
    with pytest.raises(UserError, match="--save_only_model .* --model_name_or_path"):
        trained(tmp_path / "two", resume=folder)


def test_intervals_of_this_run_count_not_those_of_the_saved_one(run, tmp_path):
    trained(tmp_path, resume=run / "checkpoint-7", save_steps=3)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-12", "checkpoint-15", "checkpoint-9",
    ]  # fmt: skip


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    model = fresh("t5")
    rows = ragged_rows(model, ROWS)
    trainer = our_trainer(
        model, tmp_path, rows, eval_dataset=rows, max_steps=4, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, metric_for_best_model="loss", greater_is_better=True,
        load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / "checkpoint-1"), "the loss falls, and greater is called better"
    with PortableCheckpoint(tmp_path / "checkpoint-1") as saved:
        read = saved.reader_for(model)
        for name, weight in weights(trainer).items():
            assert torch.equal(read(name).weight, weight)


# ---- Checkpoints of transformers' own trainer, and conversion ----

STOCK = {
    "per_device_train_batch_size": 4,
    "max_steps": 10,
    "save_strategy": "steps",
    "save_steps": 5,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.1,
}


class Stop(Exception):
    pass


def opened(folder, saved, family, **values):
    """Our trainer at the moment at which it would go on from ``saved``."""
    from transformers import TrainerCallback

    class StopAtBegin(TrainerCallback):
        def on_train_begin(self, *_, **__):
            raise Stop

    model = fresh(family)
    rows = ragged_rows(model, ROWS)
    trainer = our_trainer(model, folder, rows, callbacks=[StopAtBegin()], **values)
    with pytest.raises(Stop):
        trainer.train(resume_from_checkpoint=str(saved))
    return trainer


def moments_by_name(trainer):
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return {names[id(p)]: state for p, state in optimizer.state.items()}


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
@pytest.mark.parametrize("family", ["t5", "bart", "marian"])
def test_a_transformers_checkpoint_is_resumed_from(tmp_path, family, optim):
    model = fresh(family)
    theirs = stock_trainer(
        model, tmp_path / "stock", ragged_rows(model, ROWS), **STOCK, optim=optim
    )
    theirs.args.save_steps = 10
    theirs.train()
    saved = tmp_path / "stock" / "checkpoint-10"
    assert (saved / "optimizer.pt").exists()
    values = {**STOCK, "max_steps": 10, "optim": optim, "save_strategy": "no"}
    ours = opened(tmp_path / "ours", saved, family, **values)
    assert same(weights(ours), weights(theirs))
    expected, found = moments_by_name(theirs), moments_by_name(ours)
    assert expected.keys() == found.keys() and len(found) > 10
    for name, state in expected.items():
        kept = {moment: value for moment, value in state.items() if value is not None}
        assert kept.keys() == found[name].keys()
        for moment, value in kept.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(found[name][moment])), moment
    assert ours.lr_scheduler.last_epoch == 10
    assert ours.optimizer.param_groups[0]["lr"] == theirs.optimizer.param_groups[0]["lr"]


def test_what_is_known_of_a_transformers_run_is_compared(tmp_path):
    model = fresh("t5")
    stock_trainer(model, tmp_path / "stock", ragged_rows(model, ROWS), **STOCK).train()
    with pytest.raises(UserError) as caught:
        opened(
            tmp_path / "ours", tmp_path / "stock" / "checkpoint-5", "t5",
            **{**STOCK, "max_steps": 12, "learning_rate": 1e-3},
        )  # fmt: skip
    text = str(caught.value)
    assert "learning_rate: 0.001 now, but 0.01 in" in text
    assert "training steps of the schedule: 12 now, but 10 in" in text


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
def test_a_checkpoint_of_transformers_becomes_portable(tmp_path, optim):
    model, options = fresh("bart"), {**STOCK, "optim": optim}
    theirs = stock_trainer(model, tmp_path / "stock", ragged_rows(model, ROWS), **options)
    theirs.train()
    convert(tmp_path / "stock" / "checkpoint-10", tmp_path / "portable")
    assert verify(tmp_path / "portable").kind == "portable"
    ours = opened(tmp_path / "ours", tmp_path / "portable", "bart", **{**options, "max_steps": 10})
    assert same(weights(ours), weights(theirs))
    saved, read = moments_by_name(theirs), moments_by_name(ours)
    assert saved.keys() == read.keys()
    for name, state in saved.items():
        for moment in ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"):
            if moment in state:
                assert torch.equal(state[moment], read[name][moment])


def test_conversion_refuses_what_it_cannot_do(run, tmp_path):
    saved = run / "checkpoint-7"
    with pytest.raises(UserError, match="is already portable"):
        convert(saved, tmp_path / "new")
    with pytest.raises(UserError, match="already exists; give a new folder"):
        convert(saved, tmp_path)
    sharded = shutil.copytree(saved, tmp_path / "sharded")
    (sharded / "global_step7").mkdir()
    with pytest.raises(UserError, match="sharded by DeepSpeed"):
        convert(sharded, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_training_state_says_where_the_run_stands(run):
    state = read_json(run / "checkpoint-7" / "training_state.json")
    assert state["step"] == 7 and state["plan"]["epoch"] == 1 and state["plan"]["step"] == 2
    assert state["shape"] == {
        "backend": "local",
        "processes": 1,
        "rows_per_device": 4,
        "accumulation": 1,
    }
