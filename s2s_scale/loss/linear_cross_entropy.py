"""Cross entropy from hidden states and an output projection, without materialising all logits.

``cross_entropy(hidden @ weight.T + bias, labels)`` of ``losses.py`` needs several tensors of
B * T * V values. Here the positions are split into chunks, and the gradients of a chunk are
computed in the forward pass, while its logits exist. The backward pass only multiplies them by the
gradient of the loss. It needs neither logits nor weights, so ZeRO 3, which frees the weights after
the forward pass, makes no difference.

Label smoothing needs no extra pass over the vocabulary. With z = W h + b the smoothed loss is

    (1 - eps) * nll + eps * (log sum exp z - mean z),    mean z = mean(W) . h + mean(b),

and its gradient by z is softmax(z) - (1 - eps) * onehot - eps / V, whose last term is the same for
all tokens of the vocabulary and enters as an outer product.

Shapes: B rows, T target positions, D model width, V target vocabulary, n positions of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from s2s_scale.cpu.ops import SharedCasts, active, add_scaled, can_add_to, padded_count
from s2s_scale.loss.losses import TokenLoss, count_tokens
from s2s_scale.utils import IGNORE_INDEX

_CHUNK_VALUES = {"cpu": 2**25}
_ACCELERATOR_CHUNK_VALUES = 2**26
"""Logits of a chunk. The CPU's number is measured; that of accelerators is not."""
_CACHED_VALUES = 2**19
"""Logits whose softmax is computed at once on a CPU: 2 MiB in fp32."""
_LEAST_TRAINING_CHUNK = 128
"""Positions of a chunk, at least: with fewer, the gradient of a large W would be accumulated too
often. It is as large as W, so the logits of a chunk remain small beside it."""
_LEAST_CHUNK = 16


class _Needs(NamedTuple):
    """Which gradients are needed."""

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
    """Sums over the labels that are not -100, equal to ``losses.cross_entropy`` of the logits.

    Matmuls run in the autocast type if autocast is on, else in the type of the tensors; softmax,
    sums and the gradient of ``weight`` are in fp32 (fp64 for fp64 inputs).

    Args:
        hidden: input of the output projection, [B, T, D].
        weight: of the projection, [V, D].
        labels: token ids, [B, T]; positions with -100 are ignored.
        bias: added to the logits, [V].
        smoothing: probability mass distributed over the whole vocabulary, in [0, 1).
        static_shapes: mask ignored positions instead of leaving them out, so that no shape depends
            on the values of the labels.
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
    """The positions that are not ignored, in one row: [1, N, D] and [1, N]."""
    flat = labels.reshape(-1)
    counted = flat.ne(IGNORE_INDEX).nonzero().squeeze(1)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    if counted.numel() < flat.numel():
        hidden, flat = hidden.index_select(0, counted), flat.index_select(0, counted)
    if hidden.device.type == "cpu" and hidden.dtype.itemsize < 4:
        missing = padded_count(len(flat)) - len(flat)
        if missing:  # ignored positions
            hidden = F.pad(hidden, (0, 0, 0, missing))
            flat = F.pad(flat, (0, missing), value=IGNORE_INDEX)
    return hidden.unsqueeze(0), flat.unsqueeze(0)


def chunk_positions(vocabulary: int, *, device: str, training: bool) -> int:
    """Number of positions of a chunk."""
    values = _CHUNK_VALUES.get(device, _ACCELERATOR_CHUNK_VALUES)
    least = _LEAST_TRAINING_CHUNK if training else _LEAST_CHUNK
    return max(values // vocabulary // 64 * 64, least)


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
            # Along T, so that rows that are sharded over devices stay where they are.
            width = max(1, min(positions // max(1, hidden.shape[0]), hidden.shape[1]))
            parts = [sums.add(*chunk) for chunk in _chunks(hidden, labels, width)]
            ctx.gradients = (_joined(parts, hidden) if needs.hidden else None, *sums.gradients())
        memory = active()
        ctx.kept_in = weight if needs.weight and memory is not None and memory.in_place else None
        ctx.mark_non_differentiable(sums.nll)
        return sums.loss, sums.nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_loss: Tensor, _by_nll: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "trying to backward through the loss a second time: its gradients are scaled in "
                "place and can be used only once; compute the loss again"
            )
        # Not kept: a tensor without another reference becomes ``.grad`` without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        if ctx.kept_in is not None and can_add_to(ctx.kept_in):
            add_scaled(ctx.kept_in, gradients[1], by_loss)
            gradients = (gradients[0], None, gradients[2])
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


def _transposed_matmul(left: Tensor, right: Tensor) -> Tensor:
    """``left.T @ right``, of [n, V] and [n, D].

    Below fp32 on a CPU the smaller one is transposed: oneDNN takes two thirds of the time if the
    left side is contiguous (1,024 x 32,128 and 512, one thread: 39 ms instead of 63).
    """
    if left.device.type == "cpu" and left.dtype.itemsize < 4:
        return (right.t().contiguous() @ left).t()
    return left.t() @ right


class _Sums:
    """Loss and gradients of one batch, accumulated chunk by chunk."""

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
        self._smoothing, self._needs = smoothing, needs
        memory = active()
        casts = SharedCasts() if memory is None else memory.casts
        self._weight = casts.cast(weight, dtype)
        self._mean_weight = casts.get(weight, "mean", lambda w: w.detach().mean(0, dtype=exact))
        self._bias = None if bias is None else bias.to(exact)
        self.loss = weight.new_zeros((), dtype=exact)
        self.nll = torch.zeros_like(self.loss)
        self._tokens = torch.zeros_like(self.loss)
        self._hidden_sum = torch.zeros_like(self._mean_weight)
        self._by_weight: Tensor | None = None
        self._by_bias = weight.new_zeros(len(weight), dtype=exact) if needs.bias else None
        self._buffers: dict[str, Tensor] = {}

    def add(self, hidden: Tensor, labels: Tensor) -> Tensor | None:
        """Add a chunk, hidden [n, D] and labels [n]; returns the gradient by hidden if needed."""
        keep = labels.ne(IGNORE_INDEX).to(self._exact)
        target = labels.clamp(min=0).unsqueeze(1)
        logits = torch.mm(hidden, self._weight.t(), out=self._logits_buffer(len(hidden)))
        at_target = logits.gather(1, target).squeeze(1).to(self._exact)
        mean_logit = hidden.to(self._exact) @ self._mean_weight
        if self._bias is not None:
            at_target = at_target + self._bias[target.squeeze(1)]
            mean_logit = mean_logit + self._bias.mean()
        by_logits, log_sum = self._softmax(logits, target)
        nll = log_sum - at_target
        # `where` instead of a multiplication: at ignored positions values may be infinite.
        self.nll += torch.where(keep > 0, nll, 0.0).sum()
        loss = (1.0 - self._smoothing) * nll + self._smoothing * (log_sum - mean_logit)
        self.loss += torch.where(keep > 0, loss, 0.0).sum()
        if not any(self._needs):
            return None
        return self._add_gradients(by_logits, hidden, keep)

    def _softmax(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient by the logits without the smoothing term, and log sum exp of the logits [n].

        softmax - (1 - eps) * onehot, [n, V]. On CPUs it overwrites ``logits``, a few rows at a
        time, so that values in fp32 stay in the cache.
        """
        if logits.device.type != "cpu":
            whole = logits if self._bias is None else logits + self._bias
            lprobs = torch.log_softmax(whole, 1, dtype=self._exact)
            log_sum = (whole.gather(1, target) - lprobs.gather(1, target)).squeeze(1)
            return self._less_target(lprobs.exp_(), target), log_sum
        rows = max(1, _CACHED_VALUES // logits.shape[1])
        sums = []
        for part, at in zip(logits.split(rows), target.split(rows), strict=True):
            exact = part if part.dtype == self._exact else self._exact_buffer(part)
            if self._bias is not None:
                exact += self._bias
            largest = exact.amax(1)
            torch.softmax(exact, 1, out=exact)
            # At the largest logit, softmax is 1 over the sum of exp(z - largest).
            sums.append(largest - exact.amax(1).log_())
            self._less_target(exact, at)
            if exact is not part:
                part.copy_(exact)
        return logits, torch.cat(sums)

    def _less_target(self, softmax: Tensor, target: Tensor) -> Tensor:
        onehot = torch.full_like(target, self._smoothing - 1.0, dtype=self._exact)
        return softmax.scatter_add_(1, target, onehot)

    def _add_gradients(self, by_logits: Tensor, hidden: Tensor, keep: Tensor) -> Tensor | None:
        """``by_logits`` [n, V]: gradient without the smoothing term; returns it by ``hidden``."""
        counted = hidden * keep.unsqueeze(1).to(hidden.dtype)
        low = by_logits.to(hidden.dtype)
        if self._needs.weight:
            self._add_to_weight(low, counted)
        if self._by_bias is not None:
            self._by_bias += keep @ by_logits.to(self._exact)
            self._tokens += keep.sum()
        if not self._needs.hidden:
            return None
        by_hidden = (low @ self._weight).to(self._exact) - self._smoothing * self._mean_weight
        return (by_hidden * keep.unsqueeze(1)).to(hidden.dtype)

    def _add_to_weight(self, low: Tensor, counted: Tensor) -> None:
        """Add ``low.T @ counted``, and the smoothing term, to the gradient of the weight."""
        if self._smoothing and "logits" in self._buffers:
            # As one more position, at which all tokens have the same gradient.
            low = self._buffers["logits"][: len(low) + 1]
            low[-1] = -self._smoothing / low.shape[1]
            counted = torch.cat([counted, counted.sum(0, keepdim=True)])
        elif self._smoothing:
            self._hidden_sum += counted.sum(0, dtype=self._exact)
        if low.dtype == self._exact and self._by_weight is not None:
            self._by_weight.addmm_(low.t(), counted)
            return
        added = _transposed_matmul(low, counted)
        if self._by_weight is None:
            self._by_weight = added.to(self._exact, memory_format=torch.contiguous_format)
        else:
            self._by_weight += added

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Gradients by weight and bias, in their own types; to be called once, after all chunks."""
        by_weight, by_bias = self._by_weight, self._by_bias
        if self._needs.weight and by_weight is None:  # all positions were ignored
            by_weight = torch.zeros_like(self._weight, dtype=self._exact)
        share = self._smoothing / len(self._weight)
        if by_weight is not None and self._smoothing and "logits" not in self._buffers:
            by_weight = by_weight.sub_(share * self._hidden_sum)
        if by_weight is not None:
            by_weight = by_weight.to(self._types[0])
        if by_bias is not None:
            by_bias = by_bias.sub_(share * self._tokens).to(self._types[1])
        return by_weight, by_bias

    def _logits_buffer(self, rows: int) -> Tensor | None:
        """A buffer for logits [rows, V] that chunks share, on CPUs, where allocation is expensive.

        It has room for one more row.
        """
        if self._weight.device.type != "cpu":
            return None
        if "logits" not in self._buffers:
            shape = rows + 1, len(self._weight)
            self._buffers["logits"] = self._weight.new_empty(shape)
        return self._buffers["logits"][:rows]

    def _exact_buffer(self, part: Tensor) -> Tensor:
        """``part`` in the exact type, in a buffer that parts share."""
        if "exact" not in self._buffers:
            self._buffers["exact"] = torch.empty_like(part, dtype=self._exact)
        return self._buffers["exact"][: len(part)].copy_(part)
