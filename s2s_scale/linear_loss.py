"""Cross entropy from hidden states and an output projection, without ever holding all logits.

Shapes used below: B rows, T target positions, D model width, V target vocabulary, n positions of
one chunk.

``cross_entropy(hidden @ weight.T + bias, labels)`` of ``losses.py`` needs several tensors of
B * T * V values. Here the positions are cut into chunks, and the gradients of a chunk are computed
while its logits are there, in the forward pass: the backward pass only multiplies them by the
loss's own gradient. It needs neither logits nor weights, which is why ZeRO 3, that takes the
weights away after the forward pass, changes nothing.

Smoothing needs no pass over the vocabulary of its own. With z = W h + b the smoothed loss is

    (1 - eps) * nll + eps * (log sum exp z - mean z),    mean z = mean(W) . h + mean(b),

and its gradient by z is softmax(z) - (1 - eps) * onehot - eps / V, whose last term is the same for
all tokens of the vocabulary and enters as a product of two vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from s2s_scale.losses import IGNORE_INDEX, TokenLoss, count_tokens

_CHUNK_VALUES = {"cpu": 2**23}
_ACCELERATOR_CHUNK_VALUES = 2**26
"""Logits held at once. The CPU's number is measured; that of accelerators is not."""
_LEAST_TRAINING_CHUNK = 128
"""Fewer positions than this would add up the gradient of a large W too many times. It is as large
as W, so that these logits stay small beside it."""
_LEAST_CHUNK = 16


class _Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    smoothing: float = 0.0,
    static_shapes: bool = False,
) -> TokenLoss:
    """Sums over the labels that are not -100, as ``losses.cross_entropy`` gives them for logits.

    Products run in autocast's type where autocast is on, else in the tensors' own; softmax, sums
    and the gradient of ``weight`` are in fp32 (fp64 for fp64 inputs).

    Args:
        hidden: what the projection would get, [B, T, D].
        weight: the projection's, [V, D].
        labels: token ids, [B, T]; positions with -100 count nothing.
        bias: added to the logits, [V].
        smoothing: probability mass spread over the whole vocabulary, in [0, 1).
        static_shapes: keep the positions that count nothing, and mask them, so that no shape
            depends on the labels' values.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    tokens = count_tokens(labels)
    if not static_shapes:
        hidden, labels = _counted_only(hidden, labels)
    graded = torch.is_grad_enabled()
    loss, nll = _LinearCrossEntropy.apply(hidden, weight, bias, labels, smoothing, graded)
    return TokenLoss(loss, nll, tokens)


def _counted_only(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The positions that count, in one row: [1, N, D] and [1, N]."""
    flat = labels.reshape(-1)
    counted = flat.ne(IGNORE_INDEX).nonzero().squeeze(1)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    if counted.numel() < flat.numel():
        hidden, flat = hidden.index_select(0, counted), flat.index_select(0, counted)
    return hidden.unsqueeze(0), flat.unsqueeze(0)


def chunk_positions(vocabulary: int, *, device: str, training: bool) -> int:
    """How many positions share a chunk."""
    values = _CHUNK_VALUES.get(device, _ACCELERATOR_CHUNK_VALUES)
    least = _LEAST_TRAINING_CHUNK if training else _LEAST_CHUNK
    return max(values // vocabulary, least)


class _LinearCrossEntropy(torch.autograd.Function):
    """``(loss, nll)`` of hidden [B, T, D], weight [V, D], bias [V] or None, labels [B, T]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        smoothing: float,
        graded: bool,
    ) -> tuple[Tensor, Tensor]:
        needs = _Needs(*(graded and need for need in ctx.needs_input_grad[:3]))
        device = hidden.device.type
        with torch.autocast(device, enabled=False):
            sums = _Sums(weight, bias, dtype=hidden.dtype, smoothing=smoothing, needs=needs)
            positions = chunk_positions(len(weight), device=device, training=any(needs))
            # Along T, so that a batch whose rows lie on several devices stays where it is.
            width = max(1, min(positions // max(1, hidden.shape[0]), hidden.shape[1]))
            parts = [sums.add(*chunk) for chunk in _chunks(hidden, labels, width)]
            ctx.gradients = (_joined(parts, hidden) if needs.hidden else None, *sums.gradients())
        ctx.mark_non_differentiable(sums.nll)
        return sums.loss, sums.nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_loss: Tensor, _by_nll: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the loss's gradients were used already: they are scaled in place, so that a "
                "second backward pass through the same loss is not possible; compute it again"
            )
        # Not kept: what nobody else holds becomes the parameters' gradient without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (None if g is None else g.mul_(by_loss) for g in gradients)
        return (*scaled, None, None, None)


def _chunks(hidden: Tensor, labels: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, hidden.shape[1], width):
        part = hidden[:, start : start + width]
        yield part.reshape(-1, hidden.shape[-1]), labels[:, start : start + width].reshape(-1)


def _joined(parts: list[Tensor | None], hidden: Tensor) -> Tensor:
    """Gradients of the chunks [n, D], in their order, as the gradient of ``hidden``."""
    if not parts:
        return torch.zeros_like(hidden)
    rows, _, width = hidden.shape
    return torch.cat([part.view(rows, -1, width) for part in parts if part is not None], dim=1)


class _Sums:
    """Loss and gradients of one batch, added up chunk by chunk."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        smoothing: float,
        needs: _Needs,
    ) -> None:
        self._exact = exact = torch.promote_types(dtype, torch.float32)
        self._types = weight.dtype, None if bias is None else bias.dtype
        self._weight, self._smoothing, self._needs = weight.to(dtype), smoothing, needs
        self._bias = None if bias is None else bias.to(exact)
        self._mean_weight = self._weight.mean(0, dtype=exact)
        self.loss = weight.new_zeros((), dtype=exact)
        self.nll = torch.zeros_like(self.loss)
        self._tokens = torch.zeros_like(self.loss)
        self._hidden_sum = torch.zeros_like(self._mean_weight)
        self._by_weight = torch.zeros_like(weight, dtype=exact) if needs.weight else None
        self._by_bias = weight.new_zeros(len(weight), dtype=exact) if needs.bias else None
        self._buffers: dict[str, Tensor] = {}

    def add(self, hidden: Tensor, labels: Tensor) -> Tensor | None:
        """Take in a chunk, hidden [n, D] and labels [n]; the gradient by ``hidden``, if needed."""
        keep = labels.ne(IGNORE_INDEX).to(self._exact)
        target = labels.clamp(min=0).unsqueeze(1)
        logits = self._logits(hidden)
        at_target = logits.gather(1, target).squeeze(1).to(self._exact)
        out = self._buffer("lprobs", len(hidden), self._exact)
        lprobs = torch.log_softmax(logits, 1, dtype=self._exact, out=out)
        nll = -lprobs.gather(1, target).squeeze(1)
        mean_logit = hidden.to(self._exact) @ self._mean_weight
        if self._bias is not None:
            mean_logit = mean_logit + self._bias.mean()
        # log sum exp - z_y is the nll, so log sum exp - mean z is this:
        spread = nll + at_target - mean_logit
        # `where` and not a product: what stands at places that don't count may be infinite.
        self.nll += torch.where(keep > 0, nll, 0.0).sum()
        loss = (1.0 - self._smoothing) * nll + self._smoothing * spread
        self.loss += torch.where(keep > 0, loss, 0.0).sum()
        if not any(self._needs):
            return None
        onehot = torch.full_like(target, self._smoothing - 1.0, dtype=self._exact)
        by_logits = lprobs.exp_().scatter_add_(1, target, onehot)
        return self._add_gradients(by_logits, hidden, keep)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] in the type of the products; with a bias at least in fp32."""
        out = self._buffer("logits", len(hidden), hidden.dtype)
        logits = torch.mm(hidden, self._weight.t(), out=out)
        if self._bias is None:
            return logits
        return logits.add_(self._bias) if logits.dtype == self._exact else logits + self._bias

    def _add_gradients(self, by_logits: Tensor, hidden: Tensor, keep: Tensor) -> Tensor | None:
        """``by_logits`` [n, V]: the loss's gradient without the part that smoothing spreads."""
        counted = hidden * keep.unsqueeze(1).to(hidden.dtype)
        low = by_logits.to(hidden.dtype)
        if self._by_weight is not None:
            _add_product(self._by_weight, low.t(), counted)
            self._hidden_sum += counted.sum(0, dtype=self._exact)
        if self._by_bias is not None:
            self._by_bias += keep @ by_logits
            self._tokens += keep.sum()
        if not self._needs.hidden:
            return None
        by_hidden = (low @ self._weight).to(self._exact) - self._smoothing * self._mean_weight
        return (by_hidden * keep.unsqueeze(1)).to(hidden.dtype)

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """By weight and by bias, each in its own type; call it once, after all chunks."""
        by_weight, by_bias = self._by_weight, self._by_bias
        share = self._smoothing / len(self._weight)
        if by_weight is not None:
            by_weight = by_weight.sub_(share * self._hidden_sum).to(self._types[0])
        if by_bias is not None:
            by_bias = by_bias.sub_(share * self._tokens).to(self._types[1])
        return by_weight, by_bias

    def _buffer(self, name: str, rows: int, dtype: torch.dtype) -> Tensor | None:
        """Room for [rows, V] that chunks share, on CPUs: there, large new memory costs much."""
        if self._weight.device.type != "cpu":
            return None
        if name not in self._buffers:
            self._buffers[name] = self._weight.new_empty(rows, len(self._weight), dtype=dtype)
        return self._buffers[name][:rows]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``; the total may be of a wider type than the product."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
