"""Loss spikes, found by a running median; training that goes back to before a bad step."""

from __future__ import annotations

import functools
import logging
import statistics

import pytest
import torch

from s2s_scale import Seq2SeqTrainer, Seq2SeqTrainingArguments
from s2s_scale.errors import UserError
from s2s_scale.trainer.bad_steps import SpikeDetector
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
def test_going_back_and_leaving_the_step_out_is_skipping_it(tmp_path, monkeypatch, caplog, factor):
    """Without dropout the steps between checkpoint and bad step come out the same again."""
    spikes = {} if factor != factor else {"loss_spike_factor": 3.0}
    skipped = run(tmp_path / "skip", monkeypatch, factor, **spikes)
    with caplog.at_level(logging.WARNING):
        rolled = run(tmp_path / "back", monkeypatch, factor, on_bad_step="rollback", **spikes)
    assert f"step {BAD}: back to {tmp_path}/back/checkpoint-5" in caplog.text
    assert f"step {BAD}: its rows are left out" in caplog.text
    ours, theirs = weights(rolled), weights(skipped)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert list(history(rolled, "loss")) == list(history(skipped, "loss"))
    kind = "loss spike" if spikes else "not finite"
    sampler = skipped.train_sampler
    sampler.set_epoch(1)
    rows = sorted(sampler.plan.rows(BAD - 1 - 6).tolist())
    for trainer, done in ((skipped, "skipped"), (rolled, "rolled back")):
        ((step, found, then, shown),) = trainer.bad_steps()
        assert (step, found, then) == (str(BAD), kind, done)
        assert sorted(map(int, shown.split(", "))) == rows
    unspoilt = run(tmp_path / "sound", monkeypatch, 1.0, **spikes)
    assert unspoilt.bad_steps() == []
    sound = weights(unspoilt)
    assert not all(torch.equal(sound[name], theirs[name]) for name in theirs)


def test_what_was_left_out_is_in_the_checkpoint(tmp_path, monkeypatch):
    run(tmp_path, monkeypatch, on_bad_step="rollback", loss_spike_factor=3.0)
    monkeypatch.setattr(Spiking, "factor", 1.0)
    again = our_trainer(
        fresh("t5"), tmp_path, ragged_rows(tiny_model("t5"), ROWS),
        per_device_train_batch_size=BATCH, **SAVING, on_bad_step="rollback", loss_spike_factor=3.0,
    )  # fmt: skip
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS}"))
    assert again._guard.left_out == {BAD} and again._guard.spikes == [BAD]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"max_loss_spikes": 3}, "max_loss_spikes=3: has no effect without --loss_spike_factor"),
        ({"on_bad_step": "ignore"}, "unknown on_bad_step 'ignore'"),
        ({"loss_spike_factor": 0.5}, "loss_spike_factor=0.5: expected at least 1"),
        (
            {"on_bad_step": "rollback", "checkpoint_format": "native"},
            "on_bad_step=rollback: cannot go back to a checkpoint in the native format",
        ),
    ],
)
def test_settings_without_effect_are_refused(tmp_path, values, problem):
    with pytest.raises(UserError, match=problem):
        Seq2SeqTrainingArguments(**settings(tmp_path, **values))
