"""Token losses of encoder-decoder models: sums over target tokens, pads excluded.

Every function returns sums, never means. The loss of a step is its sum divided by the number of
target tokens in the whole step (all micro-batches, all ranks), which only the trainer knows; the
loss and its gradient then do not depend on how the step is divided.

Shapes: B rows, T target positions, V target vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from s2s_scale.utils import IGNORE_INDEX


class TokenLoss(NamedTuple):
    """Sums over the counted target tokens of a batch; all three are scalars."""

    loss: Tensor
    """The training objective, label-smoothed if smoothing is on, in nats."""
    nll: Tensor
    """Negative log-likelihood without smoothing, in nats, detached."""
    tokens: Tensor
    """Number of counted target tokens, int64."""


def label_smoothed_nll_loss(
    lprobs: Tensor, target: Tensor, epsilon: float, ignore_index: int = IGNORE_INDEX
) -> tuple[Tensor, Tensor]:
    """Sums of the label-smoothed negative log-likelihood, in fairseq's definition.

    ``loss = (1 - epsilon) * nll + epsilon / V * sum over the vocabulary of -lprobs``
    (fairseq ``criterions/label_smoothed_cross_entropy.py``, first version; the same as
    ``torch.nn.functional.cross_entropy(label_smoothing=epsilon, reduction="sum")``).

    Args:
        lprobs: log-probabilities, [..., V].
        target: token ids, [...] or [..., 1]; positions equal to ``ignore_index`` are ignored.
        epsilon: probability mass distributed over the whole vocabulary, in [0, 1).
        ignore_index: -100, or the pad token id.

    Returns:
        ``(loss, nll)``, two scalars: sums over the positions that are not ignored.
    """
    if target.dim() == lprobs.dim() - 1:
        target = target.unsqueeze(-1)
    ignored = target.eq(ignore_index)
    # gather needs a valid index everywhere; ignored places are masked out below.
    nll = -lprobs.gather(dim=-1, index=target.masked_fill(ignored, 0))
    nll_sum = nll.masked_fill(ignored, 0.0).sum()
    spread = -lprobs.sum(dim=-1, keepdim=True)
    spread_sum = spread.masked_fill(ignored, 0.0).sum()
    loss = (1.0 - epsilon) * nll_sum + epsilon / lprobs.size(-1) * spread_sum
    return loss, nll_sum


def mask_pads(labels: Tensor, pad_id: int, eos_id: int | None = None) -> Tensor:
    """Labels [B, T] with every pad replaced by -100; labels may already hold -100.

    If EOS is also the pad token, the first EOS of a row is a target, without which the model would
    never learn to stop, and only those after it are pads.
    """
    pads = labels.eq(pad_id)
    if pad_id == eos_id:
        pads &= pads.long().cumsum(dim=-1) > 1
    return labels.masked_fill(pads, IGNORE_INDEX)


def count_tokens(labels: Tensor) -> Tensor:
    """Number of labels that are not -100, a scalar int64 tensor."""
    return labels.ne(IGNORE_INDEX).sum()


def cross_entropy(logits: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> TokenLoss:
    """Summed cross entropy of ``logits`` [B, T, V] against ``labels`` [B, T], -100 ignored.

    Computed in fp32 whatever the type of the logits: in bf16 a sum over a large vocabulary loses
    the digits that matter for smoothing.
    """
    tokens = count_tokens(labels)
    logits = logits.float()
    if smoothing == 0.0:
        loss = F.cross_entropy(
            logits.reshape(-1, logits.size(-1)),
            labels.reshape(-1),
            ignore_index=IGNORE_INDEX,
            reduction="sum",
        )
        return TokenLoss(loss, loss.detach(), tokens)
    lprobs = F.log_softmax(logits, dim=-1)
    loss, nll = label_smoothed_nll_loss(lprobs, labels, smoothing)
    return TokenLoss(loss, nll.detach(), tokens)


def of_model_mean(loss: Tensor, labels: Tensor) -> TokenLoss:
    """A model's own loss, a mean over labels [B, T] other than -100, as a sum."""
    tokens = count_tokens(labels)
    # The mean of a batch without a target is 0/0; its sum is zero.
    total = torch.where(tokens > 0, loss * tokens, torch.zeros_like(loss))
    return TokenLoss(total, total.detach(), tokens)
