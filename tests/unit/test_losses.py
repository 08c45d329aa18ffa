"""Losses against torch's own and the textbook formula in float64."""

import pytest
import torch
import torch.nn.functional as F

from s2s_scale.loss.losses import (
    count_tokens,
    cross_entropy,
    label_smoothed_nll_loss,
    mask_pads,
    of_model_mean,
)
from s2s_scale.utils import IGNORE_INDEX

B, T, V, PAD = 3, 7, 11, 1


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(B, T, V, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(2, V, (B, T), generator=generator)
    labels[0, 4:] = IGNORE_INDEX
    labels[2, 6:] = IGNORE_INDEX
    return logits, labels


def textbook(logits, labels, epsilon):
    """The definition, one position after the other, without vectorisation."""
    loss = nll = 0.0
    for row in range(B):
        for position in range(T):
            target = labels[row, position].item()
            if target == IGNORE_INDEX:
                continue
            scores = logits[row, position]
            log_z = scores.exp().sum().log()
            nll += (log_z - scores[target]).item()
            for token in range(V):
                q = epsilon / V + (1 - epsilon) * (token == target)
                loss += q * (log_z - scores[token]).item()
    return loss, nll


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5])
def test_smoothed_loss_equals_textbook_and_torch(batch, epsilon):
    logits, labels = batch
    loss, nll = label_smoothed_nll_loss(logits.log_softmax(-1), labels, epsilon)
    expected, expected_nll = textbook(logits, labels, epsilon)
    torch_loss = F.cross_entropy(
        logits.view(-1, V), labels.view(-1), label_smoothing=epsilon, reduction="sum"
    )
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert nll.item() == pytest.approx(expected_nll, rel=1e-12)
    assert loss.item() == pytest.approx(torch_loss.item(), rel=1e-12)


def test_pad_id_as_ignore_index_counts_the_same_positions(batch):
    logits, labels = batch
    padded = labels.masked_fill(labels == IGNORE_INDEX, PAD)
    lprobs = logits.log_softmax(-1)
    with_pads = label_smoothed_nll_loss(lprobs, padded, 0.1, ignore_index=PAD)
    with_ignored = label_smoothed_nll_loss(lprobs, labels, 0.1)
    assert with_pads == with_ignored


def test_target_with_a_trailing_axis_is_accepted(batch):
    logits, labels = batch
    lprobs = logits.log_softmax(-1)
    flat = label_smoothed_nll_loss(lprobs, labels, 0.1)
    assert label_smoothed_nll_loss(lprobs, labels.unsqueeze(-1), 0.1) == flat


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_gives_sums_counts_and_gradients(batch, smoothing):
    logits, labels = batch
    ours = logits.float().requires_grad_()
    reference = logits.clone().requires_grad_()
    part = cross_entropy(ours, labels, smoothing=smoothing)
    part.loss.backward()
    F.cross_entropy(
        reference.view(-1, V), labels.view(-1), label_smoothing=smoothing, reduction="sum"
    ).backward()
    assert part.tokens.item() == B * T - 3 - 1
    torch.testing.assert_close(ours.grad.double(), reference.grad, rtol=1e-5, atol=1e-6)
    assert not part.nll.requires_grad


def test_half_precision_logits_are_summed_in_fp32(batch):
    logits, labels = batch
    half = logits.bfloat16()
    part = cross_entropy(half, labels, smoothing=0.1)
    exact = cross_entropy(half.float(), labels, smoothing=0.1)
    assert part.loss.dtype == torch.float32
    assert part.loss == exact.loss


def test_pads_become_ignored_and_ignored_stay():
    labels = torch.tensor([[5, 2, PAD, PAD], [5, 6, 2, IGNORE_INDEX]])
    masked = mask_pads(labels, PAD, eos_id=2)
    assert masked.tolist() == [[5, 2, -100, -100], [5, 6, 2, -100]]
    assert count_tokens(masked).item() == 5


def test_the_first_eos_stays_a_target_where_eos_doubles_as_pad():
    labels = torch.tensor([[5, 2, 2, 2], [5, 6, 7, 2]])
    assert mask_pads(labels, 2, eos_id=2).tolist() == [[5, 2, -100, -100], [5, 6, 7, 2]]


def test_a_model_mean_becomes_the_sum_behind_it(batch):
    logits, labels = batch
    mean = F.cross_entropy(logits.view(-1, V), labels.view(-1))
    total = F.cross_entropy(logits.view(-1, V), labels.view(-1), reduction="sum")
    assert of_model_mean(mean, labels).loss.item() == pytest.approx(total.item(), rel=1e-12)


def test_a_batch_without_targets_has_loss_zero():
    labels = torch.full((2, 3), IGNORE_INDEX)
    part = of_model_mean(torch.tensor(float("nan")), labels)
    assert part.loss.item() == 0.0 and part.tokens.item() == 0
