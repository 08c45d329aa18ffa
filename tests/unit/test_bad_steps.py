"""Loss spikes, found by a running median, and steps whose update is skipped."""

from __future__ import annotations

import functools
import logging
import statistics

import pytest
import torch

from s2s_scale import Seq2SeqTrainer, Seq2SeqTrainingArguments
from s2s_scale.backends import make_backend
from s2s_scale.errors import UserError
from s2s_scale.trainer.bad_steps import BadSteps, NonFiniteLossError, SpikeDetector
from tests.support.families import tiny_model
from tests.support.training import fresh, history, our_trainer, ragged_rows, settings

ROWS, BATCH, STEPS = 22, 4, 14
"""Six steps make an epoch."""
BAD = 9
SAVING = {"save_strategy": "steps", "save_steps": 5, "max_steps": STEPS}


def test_a_spike_is_a_loss_above_so_many_times_the_median_of_those_before():
    torch.manual_seed(0)
    detector, before = SpikeDetector(1.5, window=5), []
    found = 0
    for loss in (torch.rand(200) + 0.3).tolist():
        values = ([float("inf")] * 5 + before)[-5:]
        expected = loss > 1.5 * statistics.median_low(values)
        assert bool(detector.look(torch.tensor(loss))) is expected
        found += expected
        if not expected:
            before.append(torch.tensor(loss).item())
    assert found > 10


def test_losses_that_are_not_finite_are_no_spikes_and_do_not_count():
    detector = SpikeDetector(2.0, window=3)
    for loss in (1.0, 1.0, 1.0, float("nan"), float("inf")):
        assert not detector.look(torch.tensor(loss))
    assert detector.look(torch.tensor(2.1)) and detector.state() == [1.0, 1.0, 1.0]


def test_a_detector_goes_on_from_its_state():
    first, second = SpikeDetector(2.0, window=4), SpikeDetector(2.0, window=4)
    for loss in (1.0, 2.0, 3.0):
        first.look(torch.tensor(loss))
    second.load(first.state())
    assert second.state() == first.state() == [None, 1.0, 2.0, 3.0]


class Spiking(Seq2SeqTrainer):
    """At one step the loss is a hundred times what it is, or not finite."""

    factor = 100.0

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        bad = self.is_in_train and self.state.global_step + 1 == BAD
        return loss * self.factor if bad else loss


def run(folder, monkeypatch, factor=100.0, **values):
    short = functools.partial(SpikeDetector, window=6)
    monkeypatch.setattr("s2s_scale.trainer.bad_steps.SpikeDetector", short)
    monkeypatch.setattr(Spiking, "factor", factor)
    monkeypatch.setattr("tests.support.training.Seq2SeqTrainer", Spiking)
    model = fresh("t5")
    sizes = {"per_device_train_batch_size": BATCH, **SAVING}
    trainer = our_trainer(model, folder, ragged_rows(model, ROWS), **sizes, **values)
    trainer.train()
    return trainer


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


@pytest.mark.parametrize("factor", [100.0, float("nan")])
def test_the_update_of_a_bad_step_is_skipped(tmp_path, monkeypatch, caplog, factor):
    """The steps before it are those of a sound run, and all later weights differ from its."""
    spikes = {} if factor != factor else {"loss_spike_factor": 3.0}
    with caplog.at_level(logging.WARNING):
        skipped = run(tmp_path / "skip", monkeypatch, factor, **spikes)
    kind = "loss spike" if spikes else "not finite"
    assert f"step {BAD}: the loss" in caplog.text and "the update was skipped" in caplog.text
    sampler = skipped.parts.loaders.train_sampler
    sampler.set_epoch(1)
    rows = sorted(sampler.plan.rows(BAD - 1 - 6).tolist())
    ((step, found, then, shown),) = skipped.parts.bad_steps.table()
    assert (step, found, then) == (str(BAD), kind, "skipped")
    assert sorted(map(int, shown.split(", "))) == rows
    sound = run(tmp_path / "sound", monkeypatch, 1.0, **spikes)
    assert sound.parts.bad_steps.table() == []
    assert history(skipped, "loss")[: BAD - 1] == history(sound, "loss")[: BAD - 1]
    ours, theirs = weights(sound), weights(skipped)
    assert not all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_bad_steps_are_in_the_checkpoint(tmp_path, monkeypatch):
    run(tmp_path, monkeypatch, loss_spike_factor=3.0)
    monkeypatch.setattr(Spiking, "factor", 1.0)
    again = our_trainer(
        fresh("t5"), tmp_path, ragged_rows(tiny_model("t5"), ROWS),
        per_device_train_batch_size=BATCH, **SAVING, loss_spike_factor=3.0,
    )  # fmt: skip
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS}"))
    assert again.parts.bad_steps.spikes == [BAD]


def bad_steps(folder, **values):
    return BadSteps(make_backend("local", "cpu"), output_dir=folder, **{"limit": 3, **values})


def finish(steps, number, optimizer, loss):
    steps.add_loss(torch.tensor(loss))
    steps.finish_step(optimizer, step=number, rows=[number, 7], learning_rate=0.5)


def test_bad_steps_without_a_trainer(tmp_path):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    steps = bad_steps(tmp_path, spike_factor=2.0, device="cpu")
    for number, (loss, moves) in enumerate(
        [(1.0, True), (float("nan"), False), (1.0, True), (float("inf"), False)], start=1
    ):
        before, weight.grad = weight.detach().clone(), torch.ones(2)
        finish(steps, number, optimizer, loss)
        optimizer.step()
        assert torch.equal(weight, before) is not moves
    assert steps.nonfinite == [2, 4] and steps.spikes == []
    assert steps.counts(fp16=False) == {"nonfinite_steps": 2}
    assert steps.table()[0] == ("2", "not finite", "skipped", "2, 7")
    other = bad_steps(tmp_path, spike_factor=2.0)
    other.load(steps.state())
    assert other.state() == steps.state() and other.totals(fp16=True) == {
        "train_nonfinite_steps": 2,
        "train_loss_spikes": 0,
        "train_overflow_steps": 0,
    }
    weight.grad = torch.ones(2)
    with pytest.raises(NonFiniteLossError, match="stopped after 3 such steps .2, 4, 5;") as caught:
        finish(other, 5, optimizer, float("nan"))
    assert caught.value.count == 3


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"max_loss_spikes": 3}, "max_loss_spikes=3: has no effect without --loss_spike_factor"),
        ({"loss_spike_factor": 0.5}, "loss_spike_factor=0.5: expected at least 1"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path, values, problem):
    with pytest.raises(UserError, match=problem):
        Seq2SeqTrainingArguments(**settings(tmp_path, **values))
