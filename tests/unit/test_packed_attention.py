"""Packed rows on stock models: logits, loss and gradients of the pairs run one by one."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from s2s_scale.cpu import CpuFunctions
from s2s_scale.cpu.packed_attention import PackedAttention
from s2s_scale.errors import UserError
from s2s_scale.models import LossHead, decoder_inputs_from_labels
from s2s_scale.models.packed_attention import PackedModel, positions_within, same_segment
from s2s_scale.models.tiny import FIRST_WORD_ID, last_word_id
from tests.support.families import FAMILY_NAMES
from tests.support.training import fresh

PLAN = ((0, 3, 4), (1, 2), (5,))
"""Pairs of each row: three, two, one."""


def pairs_of(model):
    """Six pairs of ragged lengths: source, decoder inputs, labels, each LongTensor[1, length]."""
    generator = torch.Generator().manual_seed(3)

    def ids(length):
        high = last_word_id(model) + 1
        words = torch.randint(FIRST_WORD_ID, high, (1, length), generator=generator)
        return torch.cat([words, torch.tensor([[model.config.eos_token_id]])], dim=1)

    pairs = []
    for source, target in ((3, 5), (7, 2), (1, 1), (6, 4), (2, 8), (5, 3)):
        labels = ids(target)
        inputs = decoder_inputs_from_labels(model, labels, model.config.pad_token_id)
        pairs.append((ids(source), inputs, labels))
    return pairs


def packed(parts, pad):
    """Rows of ``PLAN`` from one tensor per pair, and their segments."""
    rows = [torch.cat([parts[pair] for pair in row], dim=1) for row in PLAN]
    segments = [
        torch.cat([torch.full_like(parts[pair], n + 1) for n, pair in enumerate(row)], dim=1)
        for row in PLAN
    ]
    width = max(row.shape[1] for row in rows)

    def filled(tensors, value):
        return torch.cat([F.pad(t, (0, width - t.shape[1]), value=value) for t in tensors])

    return filled(rows, pad), filled(segments, 0)


def packed_batch(pairs, pad):
    source, source_segments = packed([p[0] for p in pairs], pad)
    inputs, target_segments = packed([p[1] for p in pairs], pad)
    labels, _ = packed([p[2] for p in pairs], -100)
    return source, inputs, labels, source_segments, target_segments


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "own functions"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_packed_rows_give_what_their_pairs_give_alone(family, implementation, monkeypatch):
    model = fresh(family, layers=2)
    own = implementation == "own functions"
    if family != "fsmt":  # it has no other than its own
        model.set_attn_implementation("sdpa" if own else implementation)
    alone = copy.deepcopy(model)
    pairs = pairs_of(model)
    expected, losses = [], []
    for source, inputs, labels in pairs:
        logits = alone(input_ids=source, decoder_input_ids=inputs, use_cache=False).logits
        expected.append(logits[0])
        losses.append(F.cross_entropy(logits[0], labels[0], reduction="sum"))
    sum(losses).backward()

    source, inputs, labels, source_segments, target_segments = packed_batch(
        pairs, model.config.pad_token_id
    )
    assert (target_segments == 0).any() and (source_segments == 0).any()
    by_pairs, plain = [], PackedAttention.__call__
    monkeypatch.setattr(
        PackedAttention, "__call__", lambda *args: by_pairs.append(1) or plain(*args)
    )
    with (
        CpuFunctions(in_place=True) if own else nullcontext(),
        PackedModel(model).packs(source_segments, target_segments) as masks,
    ):
        logits = model(input_ids=source, decoder_input_ids=inputs, **masks, use_cache=False).logits
    # T5 adds its relative positions to the mask, and FSMT's attention is its own.
    assert len(by_pairs) == (3 * 2 if own and family not in ("t5", "fsmt") else 0)
    for row, members in enumerate(PLAN):
        for number, pair in enumerate(members, start=1):
            found = logits[row][target_segments[row] == number]
            scale = expected[pair].abs().max()
            assert (found - expected[pair]).abs().max() < 1e-5 * scale, (row, number)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss.backward()
    assert loss.item() == pytest.approx(sum(losses).item(), rel=1e-5)
    found, wanted = gradients(model), gradients(alone)
    assert set(found) == set(wanted) and len(found) > 30
    whole = max(g.abs().max().item() for g in wanted.values())
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() < 1e-5 * whole, name


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_with_the_loss_head_and_in_bf16_nothing_is_lost(family):
    model = fresh(family)
    pairs = pairs_of(model)
    source, inputs, labels, sources, targets = packed_batch(pairs, model.config.pad_token_id)
    values = {}
    for low in (False, True):
        head = LossHead(model, smoothing=0.1)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=low),
            PackedModel(model).packs(sources, targets) as masks,
            head.ends_in_loss(labels),
        ):
            output = model(input_ids=source, decoder_input_ids=inputs, **masks, use_cache=False)
            values[low] = head.read(output.logits, labels).loss
    assert values[True].isfinite() and values[True].item() == pytest.approx(
        values[False].item(), rel=2e-2
    )


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_model_is_as_before_after_the_call(family):
    model = fresh(family)
    modules = {name: set(vars(module)) for name, module in model.named_modules()}
    segments = torch.tensor([[1, 1, 2]])
    with PackedModel(model).packs(segments, segments):
        assert {name: set(vars(m)) for name, m in model.named_modules()} != modules
    assert {name: set(vars(module)) for name, module in model.named_modules()} == modules


def test_positions_begin_anew_and_masks_are_blocks():
    segments = torch.tensor([[1, 1, 1, 2, 3, 3, 0, 0], [1, 2, 2, 2, 2, 0, 0, 0]])
    assert positions_within(segments).tolist() == [
        [0, 1, 2, 0, 0, 1, 0, 1],
        [0, 0, 1, 2, 3, 0, 1, 2],
    ]
    mask = same_segment(segments[:1], segments[:1], causal=True)[0, 0]
    for query in range(8):
        for key in range(8):
            allowed = segments[0, query] == segments[0, key] and key <= query
            assert mask[query, key] == allowed


def test_another_family_is_refused():
    model = fresh("bart")
    model.config.model_type = "led"
    with pytest.raises(UserError, match="are not among those that can"):
        PackedModel(model)
