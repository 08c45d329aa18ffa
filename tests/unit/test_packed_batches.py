"""``--batching packed`` through the trainer: each pair once, budgets, and the unpacked numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers

from s2s_scale import Seq2SeqTrainer, Seq2SeqTrainingArguments
from s2s_scale.data.buckets import row_cost
from s2s_scale.data.collators import PackedCollator, Seq2SeqCollator
from s2s_scale.data.packing import PackedSampler
from s2s_scale.data.samplers import FillerRows, MicroBatch
from s2s_scale.errors import UserError
from s2s_scale.models import decoder_inputs_from_labels
from s2s_scale.models.packed_attention import decoder_start
from s2s_scale.trainer.dataloaders import make_sampler
from tests.support.adam import assert_same_weights
from tests.support.families import FAMILY_NAMES
from tests.support.lengths import long_tailed
from tests.support.simulated import SimulatedBackend
from tests.support.training import Unpacked, fresh, history, our_trainer, ragged_rows, settings

PACKED = {"batching": "packed", "tokens_per_step": 150}
ROWS = 61


def trainer_of(folder: Path, *, kind: Any = Seq2SeqTrainer, family: str = "t5", **values: Any):
    backend = values.pop("backend", None)
    model = fresh(family)
    return kind(
        model=model,
        args=Seq2SeqTrainingArguments(**settings(folder, **{**PACKED, **values})),
        train_dataset=ragged_rows(model, ROWS),
        data_collator=Seq2SeqCollator(model.config.pad_token_id),
        backend=backend,
    )


def figures(trainer):
    trainer.train()
    weights = torch.cat([w.detach().double().flatten() for w in trainer.model.parameters()])
    return history(trainer, "loss"), history(trainer, "grad_norm"), weights


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_training_gives_the_numbers_of_unpacked_pairs(tmp_path, family):
    values = {"max_steps": 7, "label_smoothing": 0.1, "max_grad_norm": 0.5}
    alone = figures(trainer_of(tmp_path, kind=Unpacked, family=family, **values))
    assert len(alone[0]) == 7
    for more in ({}, {"max_tokens_per_device": 75}, {"linear_cross_entropy": "off"}):
        found = figures(trainer_of(tmp_path, family=family, **values, **more))
        assert found[0] == pytest.approx(alone[0], rel=1e-5), more
        assert found[1] == pytest.approx(alone[1], rel=1e-5), more
        assert_same_weights(found[2], alone[2], steps=7, grad_norm=0.5)


@pytest.mark.parametrize("family", ["t5", "marian"])
@pytest.mark.parametrize("more", [{"bf16": True}, {"gradient_checkpointing": True}])
def test_other_ways_to_compute_give_the_same_numbers(tmp_path, family, more):
    values = {"max_steps": 4, "label_smoothing": 0.1}
    plain = figures(trainer_of(tmp_path, family=family, **values))
    found = figures(trainer_of(tmp_path, family=family, **values, **more))
    assert found[0] == pytest.approx(plain[0], rel=2e-3 if "bf16" in more else 1e-6)


def test_rows_of_a_mapped_file_give_the_same_batches(tmp_path):
    plain = trainer_of(tmp_path)
    mapped = trainer_of(tmp_path)
    mapped.train_dataset = datasets.Dataset.from_list(plain.train_dataset)
    batches, same = (list(trainer.get_train_dataloader()) for trainer in (plain, mapped))
    assert len(batches) == len(same) > 3
    for batch, other in zip(batches, same, strict=True):
        assert all(torch.equal(batch[name], other[name]) for name in batch)


def test_batches_that_another_process_makes_are_the_same(tmp_path):
    plain, other = (
        list(trainer_of(tmp_path, dataloader_num_workers=workers).get_train_dataloader())
        for workers in (0, 1)
    )
    assert len(plain) == len(other) > 3
    for batch, same in zip(plain, other, strict=True):
        assert all(torch.equal(batch[name], same[name]) for name in batch)


def test_the_models_own_loss_is_that_of_unpacked_pairs(tmp_path):
    """Without smoothing and pad exclusion the model computes its loss from logits and labels."""
    values = {"max_steps": 3}
    alone = trainer_of(tmp_path, kind=Unpacked, **values)
    assert alone.parts.loss.mode == "model"
    expected = figures(alone)
    assert figures(trainer_of(tmp_path, **values))[0] == pytest.approx(expected[0], rel=1e-5)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("static", [False, True])
def test_shares_of_ranks(world, static):
    lengths = long_tailed(900)
    samplers = [
        PackedSampler(
            lengths,
            tokens_per_step=8_000,
            max_tokens=2_500,
            rank=rank,
            world_size=world,
            one_shape=static,
            rows_multiple=2 if static else 1,
        )
        for rank in range(world)
    ]
    first = samplers[0]
    batches = [list(sampler.micro_batches()) for sampler in samplers]
    assert {len(found) for found in batches} == {first.n_micro_batches}
    assert first.n_micro_batches == first.steps * first.accumulation
    assert first.accumulation > 1 or world == 5
    seen = []
    for step in range(first.steps):
        rows_of_step: list[int] = []
        for of_ranks in first.divide(step):
            together = [found.pop(0) for found in batches]
            for rows, same in zip(together, of_ranks, strict=True):
                assert rows.padded_tokens(lengths) <= 2_500
                assert rows == same and rows.counts == same.counts
                assert sum(rows.counts) == len(rows) and len(rows.counts) >= 1
                rows_of_step += rows
            if static:
                assert {len(rows.counts) for rows in together} == {first.rows}
                assert first.rows % 2 == 0
                assert {rows.widths for rows in together} == {first.layout.widths}
        assert sorted(rows_of_step) == sorted(first.plan.rows(step).tolist())
        seen += rows_of_step
    assert sorted(seen) == list(range(900))
    assert len(list(first)) == len(first)


def test_loads_of_eight_ranks_are_level_and_pads_few():
    lengths, ranks = long_tailed(20_000), 8
    sampler = PackedSampler(lengths, tokens_per_step=131_072, world_size=ranks, max_tokens=9_000)
    real = padded = 0
    worst = 0.0
    for step in range(sampler.steps):
        load = np.zeros(ranks)
        for batches in sampler.divide(step):
            for rank, batch in enumerate(batches):
                assert batch.padded_tokens(lengths) <= 9_000
                padded += batch.padded_tokens(lengths)
                real += sum(int(side[batch.rows].sum()) for side in lengths)
                rows, source, target = batch.shape(lengths)
                ends = np.cumsum(batch.counts) - 1
                sums = [np.diff(np.cumsum(side[batch])[ends], prepend=0) for side in lengths]
                assert (rows, source, target) == (len(ends), *(side.max() for side in sums))
                load[rank] += rows * row_cost(np.array([source, target]))
        worst = max(worst, load.max() / load.mean() - 1)
    print(f"pads {1 - real / padded:.2%}, worst load {worst:.2%} above the mean")
    assert real == sum(int(side.sum()) for side in lengths)
    assert 1 - real / padded <= 0.02
    assert worst <= 0.03


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_rows_hold_their_pairs_one_after_the_other(family):
    model = fresh(family)
    pad = model.config.pad_token_id
    pairs = ragged_rows(model, 6)
    counts = [3, 1, 0, 2]
    collate = PackedCollator(pad, start=decoder_start(model.config))
    batch = collate(MicroBatch(pairs, None, counts))
    fixed = collate(MicroBatch(pairs, (40, 50), counts))
    assert fixed["input_ids"].shape == (4, 40) and fixed["labels"].shape == (4, 50)
    pads = {"input_ids": pad, "labels": -100, "decoder_input_ids": pad}
    for name, tensor in batch.items():
        width = tensor.shape[1]
        assert torch.equal(fixed[name][:, :width], tensor)
        assert (fixed[name][:, width:] == pads.get(name, 0)).all()
    assert (batch["attention_mask"] == (batch["source_segment_ids"] > 0)).all()
    number = 0
    for row, count in enumerate(counts):
        for segment in range(1, count + 1):
            pair = pairs[number]
            labels = torch.tensor([pair["labels"]])
            expected = decoder_inputs_from_labels(model, labels, pad)[0].tolist()
            source = batch["source_segment_ids"][row] == segment
            target = batch["target_segment_ids"][row] == segment
            assert batch["input_ids"][row][source].tolist() == pair["input_ids"]
            assert batch["labels"][row][target].tolist() == pair["labels"]
            assert batch["decoder_input_ids"][row][target].tolist() == expected
            number += 1
        for name in ("source_segment_ids", "target_segment_ids"):
            used = batch[name][row][batch[name][row] > 0].tolist()
            assert used == sorted(used) and set(used) == set(range(1, count + 1))
    assert number == 6


def test_what_pairs_bring_along_is_kept():
    pairs = [
        {
            "input_ids": [5, 6, 0],
            "attention_mask": [1, 1, 0],
            "labels": [7, 2],
            "decoder_input_ids": [9, 7],
            "decoder_attention_mask": [1, 1],
        }
    ] * 2
    collate = PackedCollator(0, start=decoder_start(fresh("t5").config))
    batch = collate(MicroBatch(pairs, None, [2]))
    assert batch["source_segment_ids"].tolist() == [[1, 1, 0, 2, 2, 0]]
    assert batch["decoder_input_ids"].tolist() == [[9, 7, 9, 7]]
    with pytest.raises(ValueError, match="packed rows need 'labels'"):
        collate(MicroBatch([{"input_ids": [1]}], None, [1]))
    with pytest.raises(ValueError, match="empty 'labels'"):
        collate(MicroBatch([{"input_ids": [1], "labels": []}], None, [1]))
    with pytest.raises(ValueError, match="'labels' is missing in 1 of 2"):
        collate(MicroBatch([{"input_ids": [1]}, pairs[0]], None, [2]))
    with pytest.raises(ValueError, match="'input_ids' has 6 tokens in a packed row; expected at"):
        collate(MicroBatch(pairs, (5, 9), [2]))


def test_a_rank_without_pairs_trains_on_nothing(tmp_path):
    """More ranks than rows: the micro-batch holds pads alone and has no loss and no gradient."""
    backend = SimulatedBackend(rank=7, world_size=8, static=False)
    trainer = trainer_of(tmp_path, backend=backend, family="bart", label_smoothing=0.1)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape == (1, 1) and (batch["labels"] == -100).all()
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(5))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or (p.grad == 0).all() for p in trainer.model.parameters())
    rows = FillerRows(trainer.train_dataset)
    assert rows.__getitems__(MicroBatch([], None, [0])).counts == [0]


def test_one_shape_where_shapes_must_be_few(tmp_path):
    trainer = trainer_of(tmp_path, backend=SimulatedBackend(devices=4), num_train_epochs=1)
    batches = list(trainer.get_train_dataloader())
    assert len({(b["input_ids"].shape, b["labels"].shape) for b in batches}) == 1
    assert len(batches[0]["labels"]) % 4 == 0
    trainer.train()
    planned = trainer.parts.loaders.plan_summary()
    assert planned is not None and len(planned.shapes) == 1
    share = trainer.state.log_history[-1]["train_pad_share"]
    assert share == pytest.approx(1 - planned.total.real_share)


def test_pads_are_counted_as_planned_and_evaluation_is_unpacked(tmp_path):
    trainer = trainer_of(tmp_path, num_train_epochs=1, label_smoothing=0.1)
    trainer.train()
    sampler = trainer.parts.loaders.train_sampler
    real = sum(int(side.sum()) for side in sampler.lengths)
    padded = sum(
        batch.padded_tokens(sampler.lengths)
        for step in range(sampler.steps)
        for batches in sampler.divide(step)
        for batch in batches
    )
    share = trainer.state.log_history[-1]["train_pad_share"]
    assert share == pytest.approx(1 - real / padded)
    assert trainer.get_total_train_batch_size(trainer.args) == round(ROWS / sampler.steps)
    rows = ragged_rows(trainer.model, 17, seed=5)
    plain = our_trainer(trainer.model, tmp_path, None, label_smoothing=0.1)
    expected = plain.evaluate(rows)["eval_loss"]
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_packed_trainer_logits_are_those_of_unpacked_pairs(tmp_path):
    logits = []
    for kind in (Seq2SeqTrainer, Unpacked):
        trainer = trainer_of(tmp_path, kind=kind, label_smoothing=0.1)
        batch = next(iter(trainer.get_train_dataloader()))
        _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        logits.append(outputs.logits[batch["labels"] != -100])
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-5)
    assert len(logits[0]) > 50


def test_what_cannot_be_packed_is_refused(tmp_path):
    def refused(match: str, model: Any = None, **values: Any) -> None:
        model = model or fresh("bart")
        trainer_only = {n: values.pop(n) for n in ("compute_loss_func",) if n in values}
        with pytest.raises(UserError, match=match):
            Seq2SeqTrainer(
                model=model,
                args=Seq2SeqTrainingArguments(**settings(tmp_path, **PACKED, **values)),
                train_dataset=ragged_rows(model, 9),
                **trainer_only,
            )

    class Own(transformers.BartForConditionalGeneration):
        def forward(self, *args: Any, **options: Any) -> Any:
            return super().forward(*args, **options)

    other = fresh("bart")
    other.config.model_type = "led"
    flash = fresh("bart")
    flash.config._attn_implementation = "flash_attention_2"
    refused("batching=packed: .*type 'led' are not among those that can", other)
    refused("attention 'flash_attention_2' takes no masks of pairs", flash)
    refused("Own has a forward method of its own", Own(fresh("bart").config))
    refused("compute_loss_func takes outputs", compute_loss_func=lambda *_: None)
    refused("torch_compile would compile each step anew", torch_compile=True)


class OwnCollator(Seq2SeqCollator):
    """Stands for one that does more than pad."""


class OwnLoss(Seq2SeqTrainer):
    def _compute_loss(self, *args: Any, **options: Any) -> Any:
        return super()._compute_loss(*args, **options)


class OwnModel(transformers.T5ForConditionalGeneration):
    def forward(self, *args: Any, **options: Any) -> Any:
        return super().forward(*args, **options)


def test_packed_is_the_default_where_shapes_are_few_and_nothing_speaks_against_it(tmp_path):
    def chosen(kind: Any = Seq2SeqTrainer, *, static: bool = True, **given: Any) -> str:
        model = given.pop("model", None) or fresh("t5")
        pad = model.config.pad_token_id
        trainer = kind(
            model=model,
            args=Seq2SeqTrainingArguments(output_dir=str(tmp_path), **given.pop("values", {})),
            train_dataset=ragged_rows(model, 9),
            data_collator=given.pop("collate", Seq2SeqCollator)(pad),
            backend=SimulatedBackend(static=static),
            **given,
        )
        return str(trainer.args.batching)

    assert chosen() == chosen(values={"num_buckets": 4}) == "packed"
    assert chosen(static=False) == "fixed"
    assert chosen(values={"tokens_per_step": 150}) == "packed"
    assert chosen(values={"tokens_per_step": 150}, static=False) == "tokens"
    assert chosen(values={"groups_per_step": 2}) == "tokens"
    assert chosen(values={"per_device_train_batch_size": 2}) == "fixed"
    assert chosen(collate=OwnCollator) == chosen(OwnLoss) == "tokens"
    assert chosen(compute_loss_func=lambda *_: None) == "tokens"
    assert chosen(model=OwnModel(fresh("t5").config)) == "tokens"


def test_a_collator_that_would_not_be_called_is_refused(tmp_path):
    model = fresh("t5")
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(**settings(tmp_path, **PACKED)),
        train_dataset=ragged_rows(model, 9),
        data_collator=lambda rows: rows,
    )
    with pytest.raises(UserError, match="data_collator=function: would not be called"):
        trainer.train()


def test_settings_without_effect_are_refused(tmp_path):
    def refused(match: str, **values: Any) -> None:
        with pytest.raises(UserError, match=match):
            Seq2SeqTrainingArguments(output_dir="x", **values)

    refused("per_device_train_batch_size=8: has no effect with batching=packed", **PACKED,
            per_device_train_batch_size=8)  # fmt: skip
    refused("groups_per_step=2: has no effect with batching=packed", **PACKED, groups_per_step=2)
    refused("tokens_per_row=99: has no effect with batching=tokens", batching="tokens",
            tokens_per_row=99)  # fmt: skip
    refused("tokens_per_row=0: expected a whole number of at least 1", tokens_per_row=0)
    refused("sortish_sampler=True and batching=packed", sortish_sampler=True, batching="packed")
    args = Seq2SeqTrainingArguments(output_dir="x", tokens_per_row=99)
    assert (args.batching, args.tokens_per_step, args.groups_per_step) == ("packed", None, None)
    with pytest.raises(UserError, match="max_tokens_per_device=20: expected at least"):
        trainer_of(tmp_path, max_tokens_per_device=20).train()
    with pytest.raises(UserError, match="tokens_per_step=9: expected at least"):
        trainer_of(tmp_path, tokens_per_step=9).train()


def test_the_budget_moves_no_pair_to_another_step(tmp_path):
    rows = ragged_rows(fresh("t5"), ROWS)
    plans = []
    for world, more in ((1, {}), (3, {"max_tokens_per_device": 50}), (2, {"num_buckets": 1})):
        args = Seq2SeqTrainingArguments(**settings(tmp_path, **PACKED, **more))
        options = {"rows_per_device": 8, "world_size": world, "num_buckets": args.num_buckets}
        sampler = make_sampler(args, rows, **options)
        plans.append([step.tolist() for step in sampler.plan])
    assert plans[0] == plans[1] == plans[2]
