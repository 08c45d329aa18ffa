"""The trainer's components, each built from values and used without a trainer."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerState

from s2s_scale import Seq2SeqTrainingArguments
from s2s_scale.backends import make_backend
from s2s_scale.checkpoint.portable import read_json
from s2s_scale.data.collators import Seq2SeqCollator
from s2s_scale.loss.losses import count_tokens
from s2s_scale.trainer.bad_steps import BadSteps
from s2s_scale.trainer.callbacks import PreemptionCallback
from s2s_scale.trainer.checkpointing import Checkpointer, Trained
from s2s_scale.trainer.dataloaders import StepBatches, TrainDataLoaders
from s2s_scale.trainer.evaluation import generation_length
from s2s_scale.trainer.loss import CROSS_ENTROPY, SMOOTHED, LossComputer
from s2s_scale.trainer.metrics import TrainingMeter
from s2s_scale.trainer.run_state import Data, RunState
from tests.support.training import fresh, ragged_rows, settings


def arguments(folder, **values):
    return Seq2SeqTrainingArguments(**settings(folder, **values))


def computer(model, **values):
    values = {"mode": SMOOTHED, "smoothing": 0.1, "padding_id": lambda: 0, **values}
    return LossComputer(model.config, **values)


def batches_of(model, sizes):
    collate, rows = Seq2SeqCollator(0), ragged_rows(model, sum(sizes))
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [collate(rows[a : a + n]) for a, n in zip(starts, sizes, strict=True)]


def share_of(loss, model, batch, step_tokens, **more):
    with loss.logits_wanted(False):
        value, _ = loss.compute(model, batch, batch["labels"], model)
    return loss.share(value, batch["labels"], step_tokens, **more)


@pytest.mark.parametrize("mode", [SMOOTHED, CROSS_ENTROPY])
def test_shares_of_micro_batches_add_up_to_the_loss_of_the_step(mode):
    model = fresh("t5")
    loss = computer(model, mode=mode, smoothing=0.1 if mode == SMOOTHED else 0.0)
    (whole,) = batches_of(model, [6])
    parts = batches_of(model, [1, 3, 2])
    tokens = loss.total_tokens(parts)
    assert tokens == count_tokens(whole["labels"])
    step = share_of(loss, model, whole, tokens)
    cut = [share_of(loss, model, part, tokens) for part in parts]
    assert sum(part.share.item() for part in cut) == pytest.approx(step.share.item(), rel=1e-6)
    assert sum(part.nll_share.item() for part in cut) == pytest.approx(step.nll_share.item())
    assert sum(part.sums.tokens.item() for part in cut) == tokens
    four = share_of(loss, model, parts[0], tokens, averaged_ranks=4)
    assert four.share.item() == pytest.approx(4 * cut[0].share.item(), rel=1e-6)


def test_logits_are_built_unless_they_are_not_wanted():
    model = fresh("t5")
    loss, (batch,) = computer(model), batches_of(model, [3])
    value, logits = loss.compute(model, batch, batch["labels"], model)
    assert logits.shape == (*batch["labels"].shape, model.config.vocab_size)
    with loss.logits_wanted(False):
        again, none = loss.compute(model, batch, batch["labels"], model)
    assert none is None and again.item() == pytest.approx(value.item(), rel=1e-6)


def test_micro_batches_are_taken_step_by_step():
    model = fresh("t5")
    loss, made = computer(model), batches_of(model, [2, 3, 1, 2, 1])
    meter = TrainingMeter(torch.device("cpu"))
    batches, source = StepBatches(iter, loss.count_tokens), iter(made)
    for first, last in ((0, 2), (2, 4), (4, 5)):
        found, tokens = batches.take(source, 2, meter)
        assert [id(batch) for batch in found] == [id(batch) for batch in made[first:last]]
        assert tokens == sum(int(count_tokens(batch["labels"])) for batch in made[first:last])
    assert batches.take(source, 2, meter) == ([], None)
    assert 0 < meter.pad_share < 1
    meter.reset()
    assert meter.pad_share is None and meter.totals() == {}
    batches.end()
    assert batches.take(iter([{"input_ids": torch.ones(1, 2)}]), 1, meter)[1] is None


def test_loaders_follow_the_plan_and_set_the_accumulation(tmp_path):
    model, backend = fresh("t5"), make_backend("local", "cpu")
    args = arguments(tmp_path, batching="tokens", tokens_per_step=120, groups_per_step=3)
    loaders = TrainDataLoaders(args, backend, padding_id=lambda: 0, rows_per_device=lambda: 8)
    rows = ragged_rows(model, 40)
    assert loaders.follows_plan(rows) and loaders.num_buckets is None
    sampler = loaders.sampler(rows)
    loader = loaders.planned(rows, sampler, Seq2SeqCollator(0), lambda: pytest.fail("not packed"))
    assert loaders.train_sampler is sampler
    assert args.gradient_accumulation_steps == sampler.accumulation > 1
    assert len(list(loader)) == sampler.steps * sampler.accumulation
    assert loaders.data(rows, None).sampler is sampler
    loaders.forget_training()
    assert loaders.data(rows, None).sampler is None and loaders.rows_per_step() is None


def test_a_checkpoint_gives_back_what_was_trained(tmp_path):
    backend, args = make_backend("local", "cpu"), arguments(tmp_path, save_total_limit=1)
    bad_steps = BadSteps(backend, limit=3, output_dir=tmp_path)
    run_state = RunState(args, backend, bad_steps, loss_mode=SMOOTHED)
    checkpointer = Checkpointer(args, backend)
    data = Data(None, None, None, None, 8)

    def trained_by(steps):
        torch.manual_seed(1)
        model = fresh("t5")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for _ in range(steps):
            (batch,) = batches_of(model, [4])
            model(**batch).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return Trained(model, optimizer, schedule)

    trained, state = trained_by(3), TrainerState(global_step=3, max_steps=10)

    def run_files(loss_scale):
        return run_state.files(state, data, trained.model, trained.schedule, loss_scale)

    def save(step):
        state.global_step = step
        final = tmp_path / f"checkpoint-{step}"
        checkpointer.save(final, trained, run_files=run_files, best=None)
        return final

    run_state.leave_pending(evaluate=True, save=False)
    save(2)
    final = save(3)
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert read_json(final / "training_state.json")["pending"] == {"evaluate": True, "save": False}
    assert checkpointer.newest(tmp_path) == final and len(checkpointer.seconds) == 2
    fresh_one, later = trained_by(0), RunState(args, backend, bad_steps, loss_mode=SMOOTHED)
    name = later.optimizer_name
    with checkpointer.open(final, fresh_one.model, optimizer_name=name) as saved:
        later.resume(final, saved.run, data, max_steps=10)
        identity = later.schedule_identity(max_steps=10)
        checkpointer.load(saved, fresh_one, schedule_identity=identity)
    assert later.take_pending() == {"evaluate": True, "save": False}
    assert later.take_pending() == {"evaluate": False, "save": False}
    for ours, theirs in zip(fresh_one.model.parameters(), trained.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            moments = fresh_one.optimizer.state[ours], trained.optimizer.state[theirs]
            assert torch.equal(*(moment[key] for moment in moments))
    assert fresh_one.schedule.last_epoch == 3
    assert fresh_one.optimizer.param_groups[0]["lr"] == trained.optimizer.param_groups[0]["lr"]


def test_nobody_is_asked_to_stop_where_no_handler_is_active():
    callback = PreemptionCallback(make_backend("local", "cpu"))
    assert not callback.requested() and not callback.due(TrainerState(epoch=0.5))


@pytest.mark.parametrize(
    ("options", "expected"), [({"max_length": 7}, 7), ({"max_new_tokens": 7}, 8), ({}, 20)]
)
def test_the_generation_limit_counts_the_start_token(options, expected):
    assert generation_length(options, fresh("t5").generation_config) == expected
