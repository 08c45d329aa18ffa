"""Batches of fixed shapes through the trainer: few shapes, every row once, the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from s2s_scale import Seq2SeqTrainer, Seq2SeqTrainingArguments
from s2s_scale.data.batch_plan import default_buckets_per_step, default_tokens_per_step
from s2s_scale.data.collators import PadToWidths, Seq2SeqCollator
from s2s_scale.data.packing import PackedSampler
from s2s_scale.data.plan_summary import shape_rows
from s2s_scale.data.samplers import MicroBatch, PlanSampler, TokenSampler
from s2s_scale.errors import UserError
from s2s_scale.trainer.dataloaders import make_sampler
from tests.support.lengths import long_tailed, share_of_pads_at_random
from tests.support.simulated import SimulatedBackend
from tests.support.training import fresh, history, our_trainer, ragged_rows, settings

ROWS = 61
BUCKETS = 3
BY_ROWS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
BY_TOKENS = {"batching": "tokens", "tokens_per_step": 150, "groups_per_step": 3}


def trainer_of(
    folder: Path, backend: Any = None, *, rows: int = ROWS, family: str = "t5", **values: Any
) -> Seq2SeqTrainer:
    model = fresh(family)
    return Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(**settings(folder, **values)),
        train_dataset=ragged_rows(model, rows),
        data_collator=Seq2SeqCollator(model.config.pad_token_id),
        backend=backend,
    )


def batches_of(trainer: Seq2SeqTrainer) -> list[dict[str, torch.Tensor]]:
    loader = trainer.get_train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) > 0
    return batches


def shape_of(batch: dict[str, torch.Tensor]) -> tuple[int, int, int]:
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    return (*batch["input_ids"].shape, batch["labels"].shape[1])


def row_key(batch: dict[str, torch.Tensor], place: int) -> tuple[tuple[int, ...], ...]:
    source = batch["input_ids"][place][batch["attention_mask"][place] == 1].tolist()
    target = [token for token in batch["labels"][place].tolist() if token != -100]
    return tuple(source), tuple(target)


@pytest.mark.parametrize("devices", [1, 4, 8])
@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("per_ordinal", [False, True], ids=["spmd", "ordinals"])
@pytest.mark.parametrize("mode", ["fixed", "sortish", "tokens"])
def test_shares_of_hosts_and_devices(
    tmp_path: Path, mode: str, per_ordinal: bool, hosts: int, devices: int
) -> None:
    """Every row once, equal numbers of micro-batches, and step by step the rows of the plan."""
    world, multiple = (hosts * devices, 1) if per_ordinal else (hosts, devices)
    sizes = BY_TOKENS if mode == "tokens" else {"batching": mode}
    args = Seq2SeqTrainingArguments(**settings(tmp_path, **sizes))
    rows = ragged_rows(fresh("t5"), ROWS)

    def sampler_of(rank: int, world: int, multiple: int, per_device: int) -> Any:
        return make_sampler(
            args,
            rows,
            rows_per_device=per_device,
            rank=rank,
            world_size=world,
            num_buckets=BUCKETS,
            rows_multiple=multiple,
        )

    samplers = [sampler_of(rank, world, multiple, 2) for rank in range(world)]
    plan = sampler_of(0, 1, 1, 2 * hosts * devices).plan
    batches = [list(sampler.micro_batches()) for sampler in samplers]
    assert {len(found) for found in batches} == {samplers[0].n_micro_batches}
    shapes = set()
    seen = []
    for step in range(plan.steps):
        count = len(list(samplers[0].divide(step)))
        assert count == samplers[0].accumulation or step == plan.steps - 1
        ids_of_step = []
        for _ in range(count):
            together = [found.pop(0) for found in batches]
            assert len({(len(ids), ids.widths) for ids in together}) == 1
            assert len(together[0]) % multiple == 0
            shapes.add((len(together[0]), together[0].widths))
            ids_of_step += [row for ids in together for row in ids if row >= 0]
        assert ids_of_step == plan.rows(step).tolist()
        seen += ids_of_step
    assert not any(batches)
    assert sorted(seen) == list(range(ROWS))
    assert len(shapes) <= BUCKETS


@pytest.mark.parametrize("sizes", [BY_ROWS, BY_ROWS | {"batching": "sortish"}, BY_TOKENS])
def test_few_shapes_and_every_row_once(tmp_path: Path, sizes: dict[str, Any]) -> None:
    trainer = trainer_of(tmp_path, num_buckets=BUCKETS, **sizes)
    batches = batches_of(trainer)
    assert len({shape_of(batch) for batch in batches}) <= BUCKETS
    keys = [
        row_key(batch, place)
        for batch in batches
        for place in range(len(batch["labels"]))
        if (batch["labels"][place] != -100).any()
    ]
    rows = [(tuple(r["input_ids"]), tuple(r["labels"])) for r in trainer.train_dataset]
    assert sorted(keys) == sorted(rows)
    assert all((batch["attention_mask"].sum(1) > 0).all() for batch in batches)
    trainer.parts.loaders.train_sampler.set_epoch(3)
    assert (
        len({shape_of(b) for b in batches} | {shape_of(b) for b in batches_of(trainer)}) <= BUCKETS
    )


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("sizes", [BY_ROWS, BY_TOKENS])
def test_padding_to_shapes_changes_no_number(
    tmp_path: Path, family: str, sizes: dict[str, Any]
) -> None:
    """The same rows per step; only pads and empty rows are added."""
    found = []
    for devices, static in ((1, False), (8, True)):
        if "batching" in sizes and not static:  # the same plan, with batches padded as they come
            continue
        backend = SimulatedBackend(devices=devices, static=static)
        values = dict(sizes)
        if not static:
            values["per_device_train_batch_size"] = 32
        trainer = trainer_of(tmp_path, backend, family=family, max_steps=6, **values)
        trainer.train()
        found.append((history(trainer, "loss"), history(trainer, "grad_norm")))
    if "batching" in sizes:
        backend = SimulatedBackend(devices=1)
        trainer = trainer_of(tmp_path, backend, family=family, max_steps=6, **sizes)
        trainer.parts.loaders.padded = lambda collate, *_: collate  # as wide as the longest rows
        trainer.train()
        found.append((history(trainer, "loss"), history(trainer, "grad_norm")))
    (loss, norm), (other_loss, other_norm) = found
    assert len(loss) == 6
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert other_norm == pytest.approx(norm, rel=1e-5)


def test_evaluation_has_few_shapes_and_the_datas_order(tmp_path: Path) -> None:
    model = fresh("t5")
    rows = ragged_rows(model, 37, seed=5)
    plain = our_trainer(model, tmp_path, None, per_device_eval_batch_size=4)
    static = Seq2SeqTrainer(
        model=model,
        args=plain.args,
        data_collator=plain.data_collator,
        backend=SimulatedBackend(devices=4),
    )
    loader = static.get_eval_dataloader(rows)
    assert len({shape_of(batch) for batch in loader}) <= 8
    assert {len(batch["input_ids"]) for batch in loader} == {16}
    static.args.num_buckets = 2
    assert len({shape_of(batch) for batch in static.get_eval_dataloader(rows)}) <= 2
    expected, found = plain.predict(rows), static.predict(rows)
    assert found.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], rel=1e-6)
    assert len(found.label_ids) == 37
    for theirs, ours in zip(expected.label_ids, found.label_ids, strict=True):
        assert theirs[theirs != -100].tolist() == ours[ours != -100].tolist()


def test_rows_are_shared_by_default_where_shapes_must_be_few(tmp_path: Path) -> None:
    static = SimulatedBackend(devices=2)
    assert isinstance(trainer_of(tmp_path, static)._get_train_sampler(), PackedSampler)
    grouped = trainer_of(tmp_path, static, groups_per_step=3)._get_train_sampler()
    assert isinstance(grouped, TokenSampler)
    plain = trainer_of(tmp_path)._get_train_sampler()
    assert isinstance(plain, PlanSampler)
    assert plain.grid is None
    for given in (
        {"per_device_train_batch_size": 8},
        {"gradient_accumulation_steps": 1},
        {"batching": "fixed"},
        {"train_sampling_strategy": "sequential"},
    ):
        sampler = trainer_of(tmp_path, static, **given)._get_train_sampler()
        assert isinstance(sampler, PlanSampler), given
        assert sampler.grid is not None
    sortish = trainer_of(tmp_path, static, sortish_sampler=True)._get_train_sampler()
    assert isinstance(sortish, PlanSampler)
    assert sortish.mode == "sortish"


def test_tokens_sets_the_micro_batches_of_a_step(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, **BY_TOKENS, max_tokens_per_device=60, num_train_epochs=2)
    result = trainer.train()
    sampler = trainer.parts.loaders.train_sampler
    assert trainer.args.gradient_accumulation_steps == sampler.accumulation > 3
    assert trainer.state.global_step == 2 * sampler.steps == len(history(trainer, "loss"))
    assert np.isfinite(result.training_loss)


def test_pads_are_counted_as_planned(tmp_path: Path) -> None:
    """What the logs say of pads, against the plan and against the rows themselves."""
    trainer = trainer_of(tmp_path, num_train_epochs=1, num_buckets=BUCKETS, **BY_TOKENS)
    trainer.train()
    planned = trainer.parts.loaders.plan_summary()
    assert planned is not None
    assert 1 <= len(planned.shapes) <= BUCKETS
    share = trainer.state.log_history[-1]["train_pad_share"]
    assert share == pytest.approx(1 - planned.total.real_share)
    rows = trainer.train_dataset
    real = sum(len(row["input_ids"]) + len(row["labels"]) for row in rows)
    padded = sum(size.padded_tokens for size in planned.steps)
    assert share == pytest.approx(1 - real / padded)
    assert all(0 < value < 1 for value in history(trainer, "pad_share"))
    assert len(history(trainer, "pad_share")) == trainer.state.global_step
    (first, *cells), *_ = shape_rows(planned)
    assert int(first) * (int(cells[0]) + int(cells[1])) == int(cells[2])
    assert trainer.get_total_train_batch_size(trainer.args) == round(ROWS / len(planned.steps))
    assert trainer_of(tmp_path, **BY_ROWS).parts.loaders.plan_summary() is None


def test_nine_of_ten_tokens_are_real_where_shapes_are_few(tmp_path: Path) -> None:
    """With every setting about batches left at its default but the size of a step."""
    lengths = long_tailed(20_000)
    columns = {
        name: [[5] * length for length in side.tolist()]
        for name, side in zip(("input_ids", "labels"), lengths, strict=True)
    }
    model = fresh("t5")
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(output_dir=str(tmp_path), tokens_per_step=32_768),
        train_dataset=datasets.Dataset.from_dict(columns),
        data_collator=Seq2SeqCollator(model.config.pad_token_id),
        backend=SimulatedBackend(devices=4),
    )
    trainer.get_train_dataloader()
    planned = trainer.parts.loaders.plan_summary()
    assert planned is not None and len(planned.shapes) <= trainer.parts.loaders.num_buckets == 8
    assert share_of_pads_at_random(lengths) > 0.6
    assert planned.total.real_share >= 0.9


def test_free_shapes_have_few_pads_and_log_them(tmp_path: Path) -> None:
    shares = {}
    for name, values in (("tokens", BY_TOKENS), ("fixed", {"per_device_train_batch_size": 12})):
        trainer = trainer_of(tmp_path, num_train_epochs=1, **values)
        trainer.train()
        assert trainer.parts.loaders.plan_summary() is None
        shares[name] = trainer.state.log_history[-1]["train_pad_share"]
    assert shares["tokens"] < 0.8 * shares["fixed"]


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter(ragged_rows(fresh("t5"), 8))


def test_few_shapes_need_lengths(tmp_path: Path) -> None:
    model = fresh("t5")
    trainer = our_trainer(model, tmp_path, Stream(), num_buckets=4, max_steps=1)
    with pytest.raises(UserError, match="num_buckets=4: cannot take effect on a data set without"):
        trainer.train()
    trainer = our_trainer(model, tmp_path, Stream(), batching="tokens", max_steps=1)
    with pytest.raises(UserError, match="batching=tokens: cannot take effect on a data set"):
        trainer.train()


def test_settings_without_effect_are_refused() -> None:
    def refused(match: str, **values: Any) -> None:
        with pytest.raises(UserError, match=match):
            Seq2SeqTrainingArguments(output_dir="x", **values)

    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        refused(f"{name}=8: has no effect with batching=tokens", batching="tokens", **{name: 8})
    for name in ("tokens_per_step", "groups_per_step", "max_tokens_per_device"):
        refused(f"{name}=99: has no effect with batching=fixed", batching="fixed", **{name: 99})
        refused(
            f"{name}=99: has no effect with batching=sortish", sortish_sampler=True, **{name: 99}
        )
        refused(f"{name}=0: expected a whole number of at least 1", **{name: 0})
        assert Seq2SeqTrainingArguments(output_dir="x", **{name: 99}).batching == "tokens"
    refused(
        "auto_find_batch_size=True: has no effect", batching="tokens", auto_find_batch_size=True
    )
    refused("num_buckets=0: expected a whole number of at least 1", num_buckets=0)
    refused("sortish_sampler=True and batching=tokens", batching="tokens", sortish_sampler=True)
    args = Seq2SeqTrainingArguments(output_dir="x", batching="tokens")
    found = (args.tokens_per_step, args.groups_per_step, args.max_tokens_per_device)
    assert found == (None, None, None)
    assert Seq2SeqTrainingArguments(output_dir="x").per_device_train_batch_size == 8


@pytest.mark.parametrize(
    ("rows", "expected"), [(1_000, 4_096), (20_000, 4_627), (1_000_000, 32_768)]
)
def test_steps_are_smaller_where_data_are_few(rows: int, expected: int) -> None:
    lengths = long_tailed(rows)
    tokens = default_tokens_per_step(lengths)
    assert tokens == pytest.approx(expected, rel=0.01)
    groups = default_buckets_per_step(lengths, tokens, fixed_shapes=False)
    sampler = TokenSampler(lengths, tokens_per_step=tokens, groups_per_step=groups)
    assert sampler.steps >= min(256, sum(int(side.sum()) for side in lengths) // 4_200)
    few = (lengths[0][:40] * 30, lengths[1][:40] * 30)
    assert default_tokens_per_step(few) == 4 * int((few[0] + few[1]).max()) > 4_096
    assert default_buckets_per_step(few, default_tokens_per_step(few), fixed_shapes=False) == 4


def test_a_step_has_as_many_buckets_as_have_room() -> None:
    lengths = long_tailed(20_000)
    longest, mean = int(sum(lengths).max()), float(sum(lengths).mean())
    for fixed in (False, True):
        assert default_buckets_per_step(lengths, 131_072, fixed_shapes=fixed) == 16
    assert default_buckets_per_step(lengths, 3 * longest, fixed_shapes=False) == 3
    tokens = round(7.5 * 16 * mean)
    assert default_buckets_per_step(lengths, tokens, fixed_shapes=True) == 7
    assert default_buckets_per_step(lengths, tokens, fixed_shapes=False) == min(
        16, tokens // longest
    )
    assert default_buckets_per_step(lengths, 9, fixed_shapes=False) == 1


def test_too_small_budgets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tokens_per_step=9: expected at least"):
        trainer_of(tmp_path, batching="tokens", tokens_per_step=9).train()
    with pytest.raises(UserError, match="max_tokens_per_device=3: expected at least"):
        trainer_of(tmp_path, batching="tokens", max_tokens_per_device=3).train()


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_collator_pads_to_the_widths_of_its_rows(side: str) -> None:
    rows = [
        {"input_ids": [5, 6], "labels": [7], "decoder_input_ids": [2]},
        {"input_ids": [5], "labels": [7, 8], "decoder_input_ids": [2, 7]},
    ]
    collate = PadToWidths(Seq2SeqCollator(0, padding_side=side), pad_token_id=0, padding_side=side)
    plain = collate(rows)
    assert plain["input_ids"].shape == (2, 2)
    batch = collate(MicroBatch(rows, (4, 3)))
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 4)
    assert batch["labels"].shape == batch["decoder_input_ids"].shape == (2, 3)
    for name, pad in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        width = plain[name].shape[1]
        kept = batch[name][:, :width] if side == "right" else batch[name][:, -width:]
        rest = batch[name][:, width:] if side == "right" else batch[name][:, :-width]
        assert torch.equal(kept, plain[name])
        assert (rest == pad).all()
    with pytest.raises(ValueError, match="'labels' has 2 columns; expected at most 1"):
        collate(MicroBatch(rows, (4, 1)))
