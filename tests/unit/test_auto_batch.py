"""--auto_batch: the largest micro-batch that fits, found by a trial and kept."""

from __future__ import annotations

import json

import pytest
import torch

from s2s_scale.cpu import keep_freed_memory
from s2s_scale.errors import UserError
from s2s_scale.trainer import auto_batch
from s2s_scale.trainer.auto_batch import Trial, find_budget, keep, read_kept
from tests.support.training import fresh, history, our_trainer, ragged_rows


def test_the_budget_is_halved_until_it_fits():
    tried = []

    def fits(rows):
        tried.append(rows)
        return rows <= 13

    assert find_budget(1000, (6, 4), fits) == 12 * 10
    assert tried == [100, 50, 25, 12]


def test_one_row_that_does_not_fit_is_the_user_s_to_mend():
    with pytest.raises(UserError, match="auto_batch: a row of 6 source and 4 target tokens"):
        find_budget(1000, (6, 4), lambda rows: False)


class Memory:
    """A pass that holds so many MiB for each row."""

    def __init__(self, mib_per_row):
        self.mib_per_row = mib_per_row
        self.rows = []

    def __call__(self, batch):
        rows = len(batch["input_ids"])
        self.rows.append(rows)
        torch.ones(rows * self.mib_per_row * 2**18)


def trial(train):
    device = torch.device("cpu")
    return Trial(train, [torch.zeros(3, requires_grad=True)], device=device, vocabulary=9)


def test_on_a_cpu_it_is_what_one_row_and_two_take_that_decides(monkeypatch):
    """A micro-batch that would need more than is free is not tried at all.

    Also where the process keeps what it has freed, as training on a CPU lets it do.
    """
    keep_freed_memory()
    bytearray(100 * 2**20)
    monkeypatch.setattr(auto_batch, "_available", lambda: 400 * 2**20)
    train = Memory(mib_per_row=20)
    on_cpu = trial(train)
    found = find_budget(640, (6, 4), lambda rows: on_cpu.fits(rows, (6, 4)))
    assert found == 16 * 10
    assert train.rows == [1, 2, 16]


def test_gradients_of_a_trial_are_forgotten():
    weight = torch.ones(4, requires_grad=True)

    def train(batch):
        (weight * len(batch["labels"])).sum().backward()

    on_cpu = Trial(train, [weight], device=torch.device("cpu"), vocabulary=9)
    assert on_cpu.fits(2, (3, 2)) and weight.grad is None


def test_what_was_found_is_kept_for_the_same_model_and_data(tmp_path):
    key = {"longest row": [6, 4], "bf16": False}
    assert read_kept(tmp_path, key) is None
    keep(tmp_path / "new", key, 120)
    assert read_kept(tmp_path / "new", key) == 120
    assert read_kept(tmp_path / "new", {**key, "bf16": True}) is None


def test_training_finds_a_budget_once_and_gives_the_same_numbers(tmp_path, monkeypatch, capsys):
    """As without a bound: a step's loss does not depend on its micro-batches."""
    shared = {"batching": "tokens", "tokens_per_step": 300, "groups_per_step": 2, "max_steps": 3}
    found = {}
    for name, more in (("plain", {}), ("auto", {"auto_batch": True})):
        model = fresh("bart")
        trainer = our_trainer(model, tmp_path / name, ragged_rows(model, 60), **shared, **more)
        trainer.train()
        found[name] = history(trainer, "loss"), history(trainer, "nll_loss")
    assert len(found["plain"][0]) == 3
    for auto, plain in zip(found["auto"], found["plain"], strict=True):
        assert auto == pytest.approx(plain, rel=1e-6)
    kept = json.loads((tmp_path / "auto" / auto_batch.FILE).read_text())
    assert trainer.args.max_tokens_per_device == kept["max_tokens_per_device"] > 0
    assert "note: micro-batches of at most" in capsys.readouterr().err
    monkeypatch.setattr(Trial, "fits", lambda *_: pytest.fail("it was known already"))
    model = fresh("bart")
    again = our_trainer(model, tmp_path / "auto", ragged_rows(model, 60), **shared, auto_batch=True)
    again.train()
    assert again.args.max_tokens_per_device == kept["max_tokens_per_device"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"batching": "fixed"}, "auto_batch=True: has no effect with batching=fixed"),
        (
            {"batching": "tokens", "max_tokens_per_device": 99},
            "auto_batch=True and max_tokens_per_device=99",
        ),
    ],
)
def test_settings_that_contradict_it_are_refused(tmp_path, settings, told):
    model = fresh("bart")
    with pytest.raises(UserError, match=told):
        our_trainer(model, tmp_path, ragged_rows(model, 4), auto_batch=True, **settings)
