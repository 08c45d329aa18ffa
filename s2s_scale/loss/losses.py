"""Token losses of encoder-decoder models: sums over target tokens, pads excluded.

Shapes used below: B rows, T target positions, V target vocabulary.

Every function returns sums, never means: only the trainer knows how many target tokens the whole
step holds (all micro-batches, all ranks), and only dividing the sum by that number gives a loss and
a gradient that do not depend on how the step was cut.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


class TokenLoss(NamedTuple):
    """Sums over the counted target tokens of a batch; all three are scalars."""

    loss: Tensor
    """What training minimises (smoothed, where smoothing is on), in nats."""
    nll: Tensor
    """Plain negative log-likelihood, in nats, detached where it is not what is minimised."""
    tokens: Tensor
    """Number of counted target tokens, int64."""


def label_smoothed_nll_loss(
    lprobs: Tensor, target: Tensor, epsilon: float, ignore_index: int = IGNORE_INDEX
) -> tuple[Tensor, Tensor]:
    """Label-smoothed negative log-likelihood, as sums, with fairseq's definition.

    ``loss = (1 - epsilon) * nll + epsilon / V * sum over the vocabulary of -lprobs``
    (fairseq ``criterions/label_smoothed_cross_entropy.py``, first version; the same as
    ``torch.nn.functional.cross_entropy(label_smoothing=epsilon, reduction="sum")``).

    Args:
        lprobs: log-probabilities, [..., V].
        target: token ids, [...] or [..., 1]; positions equal to ``ignore_index`` count nothing.
        epsilon: probability mass spread over the whole vocabulary, in [0, 1).
        ignore_index: -100, or the pad token id.

    Returns:
        ``(loss, nll)``, two scalars: sums over the positions that count.
    """
    if target.dim() == lprobs.dim() - 1:
        target = target.unsqueeze(-1)
    ignored = target.eq(ignore_index)
    # gather needs a valid index everywhere; what it reads at ignored places is masked out below.
    nll = -lprobs.gather(dim=-1, index=target.masked_fill(ignored, 0))
    nll_sum = nll.masked_fill(ignored, 0.0).sum()
    spread = -lprobs.sum(dim=-1, keepdim=True)
    spread_sum = spread.masked_fill(ignored, 0.0).sum()
    loss = (1.0 - epsilon) * nll_sum + epsilon / lprobs.size(-1) * spread_sum
    return loss, nll_sum


def mask_pads(labels: Tensor, pad_id: int, eos_id: int | None = None) -> Tensor:
    """Labels [B, T] with every pad replaced by -100; labels may already hold -100.

    Where EOS doubles as the pad token, the first EOS of a row is a target that the model must
    learn (else it never stops) and only those after it are pads.
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

    Computed in fp32 whatever the logits' type: in bf16 a sum over a large vocabulary loses the
    digits that smoothing is made of.
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
    """The sum behind a model's own loss: its mean over labels [B, T] other than -100, undone."""
    tokens = count_tokens(labels)
    # A batch with no target at all gives a 0/0 mean in the model; its sum is zero.
    total = torch.where(tokens > 0, loss * tokens, torch.zeros_like(loss))
    return TokenLoss(total, total.detach(), tokens)
