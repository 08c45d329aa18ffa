"""Our functions for CPUs against torch's own, float64 and the distributions they promise."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s2s_scale import Seq2SeqTrainer
from s2s_scale.cpu import CpuFunctions
from s2s_scale.cpu.ops import (
    SharedCasts,
    attention,
    can_add_to,
    dropout,
    dropout_mask,
    dropped_levels,
    pad_rows,
    padded_count,
)
from s2s_scale.cpu.packed_attention import PackedAttention
from s2s_scale.data.collators import Seq2SeqCollator
from s2s_scale.models import decoder_inputs_from_labels
from s2s_scale.models.packed_attention import MASKED, additive, same_segment
from tests.support.adam import GRADIENT_ERROR
from tests.support.families import FAMILY_NAMES
from tests.support.training import fresh, history, our_trainer, ragged_rows


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_as_many_as_it_says_and_keeps_the_mean(p, dtype):
    torch.manual_seed(0)
    count = 1_000_003  # not a multiple of four
    dropped = dropout(torch.ones(count, dtype=dtype), p)
    zeros = int((dropped == 0).sum())
    deviation = math.sqrt(count * p * (1 - p))
    assert abs(zeros - count * p) < 4 * deviation
    kept = dropped[dropped != 0]
    exact = 65536 / (65536 - dropped_levels(p))
    assert kept.float().unique().tolist() == [torch.tensor(exact, dtype=dtype).item()]
    assert abs(exact * (1 - p) - 1) < 2e-5


def test_dropped_places_are_independent_of_each_other():
    """Chi-square of the 16 patterns that four neighbours, of one random number, can show."""
    torch.manual_seed(1)
    kept = dropout_mask(torch.empty(400_000), dropped_levels(0.3)).view(-1, 4).long()
    patterns = (kept * torch.tensor([8, 4, 2, 1])).sum(1)
    found = torch.bincount(patterns, minlength=16).double()
    ones = torch.tensor([bin(number).count("1") for number in range(16)])
    q = 1 - dropped_levels(0.3) / 65536
    expected = len(kept) * q**ones * (1 - q) ** (4 - ones)
    statistic = float(((found - expected) ** 2 / expected).sum())
    assert statistic < 37.7, "0.1 % of chi-square with 15 degrees of freedom"


def test_each_of_the_four_parts_of_a_random_number_is_uniform():
    torch.manual_seed(2)
    for levels in (2**14, 2**15, 3 * 2**14):
        kept = dropout_mask(torch.empty(400_000), levels).view(-1, 4).double().mean(0)
        assert torch.allclose(kept, torch.full((4,), 1 - levels / 65536).double(), atol=0.006)


def test_dropout_s_gradient_has_the_same_places_and_a_seed_repeats_them():
    x = torch.rand(50, 7, requires_grad=True)
    torch.manual_seed(3)
    out = dropout(x, 0.4)
    out.sum().backward()
    assert torch.allclose(out, x * x.grad) and 0 < int((x.grad == 0).sum()) < x.numel()
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.4), out)


def attention_inputs(dtype=torch.float64):
    torch.manual_seed(4)
    query = torch.randn(3, 2, 5, 8, dtype=dtype, requires_grad=True)
    key, value = (torch.randn(3, 2, 7, 8, dtype=dtype, requires_grad=True) for _ in range(2))
    return query, key, value


def gradients(outcome, *inputs):
    weights = torch.linspace(-1, 1, outcome.numel(), dtype=outcome.dtype).view_as(outcome)
    return torch.autograd.grad((outcome * weights).sum(), inputs)


@pytest.mark.parametrize("kind", ["none", "bool", "added", "learnt", "causal"])
def test_attention_equals_torch_s_in_value_and_gradients(kind):
    query, key, value = attention_inputs()
    mask, causal = None, kind == "causal"
    if kind == "bool":
        mask = torch.rand(3, 1, 5, 7) > 0.4
        mask[..., 0] = True
    if kind in ("added", "learnt"):
        mask = torch.randn(1, 2, 5, 7, dtype=torch.float64, requires_grad=kind == "learnt")
    inputs = (query, key, value, *((mask,) if kind == "learnt" else ()))
    own = attention(query, key, value, mask, causal=causal, scale=0.3)
    reference = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=0.3
    )
    assert torch.allclose(own, reference, atol=1e-6)
    for ours, theirs in zip(gradients(own, *inputs), gradients(reference, *inputs), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_attention_with_dropout_is_the_formula_with_the_places_that_were_drawn():
    query, key, value = attention_inputs(torch.float32)
    torch.manual_seed(5)
    own = attention(query, key, value, None, p=0.25)
    torch.manual_seed(5)
    levels = dropped_levels(0.25)
    weights = torch.softmax(query @ key.transpose(2, 3) / math.sqrt(8), -1)
    kept = dropout_mask(weights.detach(), levels)
    reference = (weights * kept * (65536 / (65536 - levels))) @ value
    assert torch.allclose(own, reference, atol=1e-6)
    inputs = (query, key, value)
    for ours, theirs in zip(gradients(own, *inputs), gradients(reference, *inputs), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def batch_of(model):
    pad = model.config.pad_token_id
    batch = Seq2SeqCollator(pad)(ragged_rows(model, 6))
    return {**batch, "decoder_input_ids": decoder_inputs_from_labels(model, batch["labels"], pad)}


def two_micro_batches(model, functions=None, *, bf16=False):
    """Loss, and gradients of two backward passes that add up, by parameter name."""
    model.zero_grad()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if functions is None:
                loss = model(**batch_of(model)).loss
            else:
                with functions:
                    loss = model(**batch_of(model)).loss
        loss.float().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), grads


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_model_s_loss_and_gradients_are_those_of_torch_s_functions(family, in_place):
    model = fresh(family)
    loss, grads = two_micro_batches(model)
    own_loss, own_grads = two_micro_batches(model, CpuFunctions(in_place=in_place))
    assert own_loss == pytest.approx(loss, rel=1e-6)
    assert set(own_grads) == set(grads) and len(grads) > 10
    norm = float(nn.utils.get_total_norm(grads.values()))
    for name, grad in grads.items():
        assert (own_grads[name] - grad).abs().max() <= GRADIENT_ERROR * norm, name


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_in_bf16_they_are_as_near_to_fp32_as_torch_s(family):
    model = fresh(family, d_model=64, layers=2)
    _, exact = two_micro_batches(model)

    def error(found):
        off = sum(float((found[n].double() - exact[n].double()).pow(2).sum()) for n in exact)
        return math.sqrt(off / sum(float(g.double().pow(2).sum()) for g in exact.values()))

    theirs = error(two_micro_batches(model, bf16=True)[1])
    ours = error(two_micro_batches(model, CpuFunctions(in_place=True), bf16=True)[1])
    assert 0 < theirs < 0.05
    assert ours < 1.25 * theirs


def test_a_hook_that_waits_for_a_gradient_gets_it():
    layer = nn.Linear(4, 3)
    seen = []
    layer.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    assert not can_add_to(layer.weight)
    with CpuFunctions(in_place=True):
        layer(torch.ones(2, 4)).sum().backward()
    assert len(seen) == 1 and torch.equal(seen[0], torch.full((3, 4), 2.0))


def test_casts_are_made_anew_when_the_weight_has_changed():
    casts, weight = SharedCasts(), nn.Parameter(torch.ones(3))
    first = casts.cast(weight, torch.bfloat16)
    assert casts.cast(weight, torch.bfloat16) is first
    with torch.no_grad():
        weight.add_(1)
    assert casts.cast(weight, torch.bfloat16).tolist() == [2, 2, 2]
    weight.data.add_(1)  # torch does not count this
    casts.clear()
    assert casts.cast(weight, torch.bfloat16).tolist() == [3, 3, 3]


def test_rows_of_an_embedding_s_pad_have_no_gradient():
    table = nn.Embedding(7, 3, padding_idx=-1)
    with CpuFunctions(in_place=True):
        table(torch.tensor([[1, 6, 1], [2, 6, 6]])).sum().backward()
    assert table.weight.grad.sum(1).tolist() == [0, 6, 3, 0, 0, 0, 0]


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_training_is_the_same_with_and_without_them(family, tmp_path):
    """Weights after some accumulated steps with clipping; dropout is off."""
    found = {}
    for choice in ("auto", "off"):
        model = fresh(family)
        trainer = our_trainer(
            model,
            tmp_path / choice,
            ragged_rows(model, 24),
            cpu_functions=choice,
            label_smoothing=0.1,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=5,
        )
        assert (trainer.backend.autocast().__class__ is CpuFunctions) == (choice == "auto")
        trainer.train()
        found[choice] = (history(trainer, "loss"), history(trainer, "grad_norm"))
    for own, theirs in zip(*found.values(), strict=True):
        assert own == pytest.approx(theirs, rel=1e-5) and len(own) == 5


def test_gradients_are_left_to_torch_where_a_subclass_has_a_loss_of_its_own(tmp_path):
    class WithPenalty(Seq2SeqTrainer):
        def _compute_loss(self, model, inputs, labels):
            loss, logits = super()._compute_loss(model, inputs, labels)
            (by_weight,) = torch.autograd.grad(loss, model.lm_head.weight, retain_graph=True)
            self.seen = by_weight
            return loss, logits

    model = fresh("bart")
    plain = our_trainer(model, tmp_path / "a", ragged_rows(model, 8), max_steps=1)
    trainer = WithPenalty(
        model=model,
        args=plain.args,
        train_dataset=ragged_rows(model, 8),
        data_collator=plain.data_collator,
    )
    trainer.train()
    assert plain.backend.autocast().memory.in_place
    assert not trainer.backend.autocast().memory.in_place
    assert trainer.seen.abs().sum() > 0


@pytest.mark.parametrize("kind", ["encoder", "decoder", "cross"])
def test_attention_by_pairs_is_attention_under_the_mask_of_the_pairs(kind):
    """Value and gradients against torch's with the whole mask, in float64; pads give 0."""
    torch.manual_seed(0)
    source = torch.tensor([[1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3, 0], [1, 2, 2, 2] + [0] * 8])
    target = torch.tensor([[1, 2, 2, 2, 2, 3, 3, 0, 0], [1, 1, 1, 2, 2, 2, 2, 2, 0]])
    queries, keys = {
        "encoder": (source, source),
        "decoder": (target, target),
        "cross": (target, source),
    }[kind]
    causal = kind == "decoder"
    shapes = [(2, 4, side.shape[1], 8) for side in (queries, keys, keys)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    mask = additive(same_segment(queries, keys, causal=causal), torch.float64)
    real = (queries > 0)[:, None, :, None]
    by_pairs = PackedAttention(queries, keys, causal=causal, masked=MASKED)
    ours = by_pairs(
        *inputs, lambda *sides: F.scaled_dot_product_attention(*sides[:3], sides[3].double())
    )
    expected = torch.nn.functional.scaled_dot_product_attention(*inputs, mask) * real
    weights = torch.randn_like(expected)
    assert torch.allclose(ours, expected, atol=1e-12)
    for own, reference in zip(
        torch.autograd.grad((ours * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(own, reference, atol=1e-12)


def test_counts_of_positions_are_few_and_not_much_larger():
    """Below 2,048 there are at most 48 of them, and from 512 on at most a sixteenth is added."""
    counts = {n: padded_count(n) for n in range(1, 20_000)}
    assert all(n <= usual for n, usual in counts.items())
    assert all(usual <= n * 17 / 16 for n, usual in counts.items() if n >= 512)
    assert len({usual for n, usual in counts.items() if n < 2_048}) <= 48
    rows = torch.randn(3, 11, 5)
    filled = pad_rows(rows, torch.bfloat16)
    assert filled.shape == (64, 5) and (filled[33:] == 0).all()
    assert (filled[:33].view(3, 11, 5) == rows.bfloat16()).all()
    assert pad_rows(rows, torch.float32).shape == (33, 5)
